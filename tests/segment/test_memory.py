"""Peak memory of errseg-b at its full size: a large vocabulary must not cost large tensors."""

from __future__ import annotations

import json

from errseg.testing.memory import measure_peak_memory

_SETUP = """
import json, torch
from PIL import Image
from errseg import Segmenter, Vocabulary
from errseg.model.config import CONFIGS
from errseg.model.errseg import ERRSeg
from errseg.testing import memory

# Fast stand-ins for the slow initialisation of 189 M parameters: only sizes matter here.
for name in ("trunc_normal_", "normal_", "kaiming_uniform_", "uniform_", "xavier_uniform_"):
    setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor.detach().uniform_(-0.02, 0.02))
torch.manual_seed(0)
segmenter = Segmenter(ERRSeg(CONFIGS["errseg-b"]), device="cpu")
photo = Image.effect_noise((256, 192), 60).convert("RGB").resize((1024, 768))
peaks = {}

def measured(name, run):
    start, _ = memory.current_rss(), memory.reset_peak_rss()
    result = run()
    peaks[name] = memory.peak_rss() - start
    return result
"""

_BODY = """
def vocabulary(num_words):
    return Vocabulary([f"w{i}" for i in range(num_words)], torch.randn(num_words, 640))

measured("words: encode", lambda: segmenter.set_vocabulary([f"thing{i}" for i in range(256)]))  # one whole batch
result = measured("847 words", lambda: segmenter(photo, vocabulary=vocabulary(847)))
assert result.labels.shape == (768, 1024) and len(result.class_ids) == 48
segmenter._offers.clear()
large = vocabulary(100_000)
result = measured("100,000 words", lambda: segmenter(photo, vocabulary=large))
assert len(result.class_ids) == 48
print(json.dumps(peaks))
"""


def test_many_words_at_full_size_stay_within_memory() -> None:
    measured = measure_peak_memory(_SETUP, _BODY)
    peaks = json.loads(measured.stdout.splitlines()[-1])
    assert peaks["words: encode"] < 1e9
    assert peaks["847 words"] < 3e9
    assert peaks["100,000 words"] < 1e9
