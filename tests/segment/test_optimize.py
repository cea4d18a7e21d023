"""What `Segmenter.optimize` does: the same results, by another road."""

from __future__ import annotations

import subprocess
import sys
from functools import partialmethod

import numpy as np
import pytest
import torch
from torch import Tensor

from errseg import Segmenter
from errseg.graphs import Graph, GraphCache
from errseg.model.decoder import DecoderOutput
from errseg.settings import default_dtype
from errseg.testing import assert_absolutely_close

WORDS = ["red star", "grass", "sky", "blue ring"]


@pytest.fixture
def pictures() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (60 + 8 * i, 80, 3), dtype=np.uint8) for i in range(3)]


def test_results_agree(pictures: list[np.ndarray]) -> None:
    plain, fast = (Segmenter("errseg-tiny", vocabulary=WORDS, device="cpu") for _ in range(2))
    assert fast.optimize() is fast
    for wanted, found in zip(*(s(pictures, return_scores=True) for s in (plain, fast)), strict=True):
        assert torch.equal(found.class_ids, wanted.class_ids)
        assert_absolutely_close(found.scores, wanted.scores, 1e-4)
        assert (found.labels == wanted.labels).float().mean() > 0.999  # but for near ties


def test_timings_are_still_there(pictures: list[np.ndarray]) -> None:
    result = Segmenter("errseg-tiny", vocabulary=WORDS, device="cpu").optimize()(pictures[0], timings=True)
    assert set(result.timings) >= {"towers", "upsampler"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_kept() -> None:
    """After some rounds a large tensor no longer takes a fresh page from the system."""
    script = """
import resource, torch
from errseg.memory import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fresh():
    before = faults(); torch.ones(12 << 20); return faults() - before
plain = min(fresh() for _ in range(20))
assert keep_freed_memory()
for _ in range(20): fresh()
print(plain, min(fresh() for _ in range(20)))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    plain, kept = map(int, run.stdout.split())
    assert kept < 100 < plain


class Recorder:
    """A network and a capture that stand for those of a GPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def network(self, images: Tensor, embeddings: Tensor, *, num_selected: int) -> DecoderOutput:
        self.calls.append("call")
        logits = images.mean((1, 2, 3))[:, None, None, None] + embeddings.sum() + num_selected
        return DecoderOutput(logits, torch.arange(len(images))[:, None])

    def capture(self, network: object, images: Tensor, embeddings: Tensor, options: dict[str, int]) -> Graph:
        self.calls.append("capture")
        static, output = images.clone(), self.network(images, embeddings, **options)
        self.calls.pop()

        def replay() -> None:
            self.calls.append("replay")
            again = self.network(static, embeddings, **options)
            self.calls.pop()
            output.logits.copy_(again.logits)

        return Graph(static, replay, output, (embeddings,))


def test_a_call_that_comes_back_is_captured_and_replayed() -> None:
    recorder = Recorder()
    cache = GraphCache(recorder.network, capture=recorder.capture)
    words, other = torch.randn(5, 4), torch.randn(5, 4)
    results = []
    for _ in range(4):
        images = torch.randn(2, 3, 8, 8)
        results.append(cache(images, words, num_selected=3))
        assert torch.equal(results[-1].logits, recorder.network(images, words, num_selected=3).logits)
        recorder.calls.pop()
    assert recorder.calls == ["call", "capture", "replay", "replay", "replay"]
    assert len({r.logits.data_ptr() for r in results}) == 4  # nobody's result is overwritten
    recorder.calls.clear()
    cache(torch.randn(1, 3, 8, 8), words, num_selected=3)
    cache(torch.randn(2, 3, 8, 8), other, num_selected=3)
    cache(torch.randn(2, 3, 8, 8), words, num_selected=4)
    assert recorder.calls == ["call"] * 3
    assert len(cache._graphs) == 4


def test_the_graph_unused_longest_makes_room() -> None:
    recorder = Recorder()
    cache = GraphCache(recorder.network, limit=2, capture=recorder.capture)
    words = torch.randn(5, 4)
    for batch in (1, 1, 2, 1, 3, 1):
        cache(torch.randn(batch, 3, 4, 4), words, num_selected=2)
    assert recorder.calls == ["call", "capture", "replay", "call", "replay", "call", "replay"]
    assert {key[0][0] for key in cache._graphs} == {1, 3}


def test_graphs_are_given_up_when_the_weights_move() -> None:
    recorder, places = Recorder(), [1]
    cache = GraphCache(recorder.network, capture=recorder.capture, places=lambda: places[0])
    words, images = torch.randn(5, 4), torch.randn(1, 3, 4, 4)
    for _ in range(2):
        cache(images, words, num_selected=2)
    places[0] = 2
    for _ in range(2):
        cache(images, words, num_selected=2)
    assert recorder.calls == ["call", "capture", "replay"] * 2


def test_loading_and_moving_weights_is_a_move() -> None:
    segmenter = Segmenter("errseg-tiny", device="cpu").optimize()
    places = [segmenter._places()]
    segmenter.model.load_state_dict(segmenter.model.state_dict())
    places.append(segmenter._places())
    segmenter.model.to(torch.bfloat16)
    places.append(segmenter._places())
    segmenter.optimize()
    places.append(segmenter._places())
    assert len(set(places)) == 4


def test_a_compiled_tower_gives_the_same(pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def remembered(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:  # Inductor takes long
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=remembered))
    plain, fast = (Segmenter("errseg-tiny", vocabulary=WORDS, device="cpu", size=64) for _ in range(2))
    assert torch.equal(fast.optimize(compile_tower=True)(pictures[0]).labels, plain(pictures[0]).labels)
    assert graphs


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_half_precision_where_a_gpu_has_it(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_dtype(torch.device("cuda")) == dtype
    assert default_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_what_was_asked_for(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(backend, "allow_tf32", not tf32)
    Segmenter("errseg-tiny", device="cuda", dtype=torch.float32).optimize(tf32=tf32)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_what_calls_give(pictures: list[np.ndarray], dtype: torch.dtype) -> None:
    plain, fast = (Segmenter("errseg-tiny", vocabulary=WORDS, device="cuda", dtype=dtype) for _ in range(2))
    fast.optimize()
    for _ in range(3):  # as it is, captured, replayed
        for picture in pictures:
            wanted, found = plain(picture, return_scores=True), fast(picture, return_scores=True)
            assert_absolutely_close(found.scores, wanted.scores, 1e-4 if dtype == torch.float32 else 0.05)
    assert any(fast._network._graphs.values())  # captured indeed
    # Threads pin memory while the shape of a whole batch is captured.
    for wanted, found in zip(plain(pictures * 8), fast.stream(pictures * 8, workers=4, batch_size=2), strict=True):
        assert (found.labels == wanted.labels).float().mean() > (0.999 if dtype == torch.float32 else 0.97)
