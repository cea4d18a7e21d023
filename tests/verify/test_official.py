"""Reading a checkout of the published code; the comparison itself needs one: ERRSEG_OFFICIAL names it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from errseg import ops, verify
from errseg.errors import ErrSegError
from errseg.model.decoder import Upsampler
from errseg.verify import checkout, official, official_decoder
from errseg.verify.checks import Check
from errseg.verify.official_decoder import Answer
from errseg.verify.official_settings import SMALL
from errseg.verify.rows import Row


def test_a_folder_that_is_no_checkout_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ErrSegError, match=r"no checkout of the published ERR-Seg code: it has no err_seg.modeling"):
        verify.run(quick=True, official=tmp_path)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


OURS = {
    "err_seg/__init__.py": "raise ImportError('detectron2 data sets')",
    "err_seg/modeling/modules/decoder.py": "from .part import WIDTH\nclass Decoder: width = WIDTH",
    "err_seg/modeling/modules/part.py": "WIDTH = 3",
    "err_seg/err_seg_model.py": (
        "from detectron2.config import configurable\n"
        "from detectron2.modeling import META_ARCH_REGISTRY\n"
        "@META_ARCH_REGISTRY.register()\n"
        "class ERRSeg:\n    def forward(self, inputs): return inputs, self.training"
    ),
    "open_clip/src/open_clip/__init__.py": "raise ImportError('not to be run')",
    "open_clip/src/open_clip/model.py": "from .timm_model import NAME\nclass CLIP: name = NAME",
    "open_clip/src/open_clip/timm_model.py": "NAME = 'vendored'",
    "open_clip/src/open_clip/tokenizer.py": "def tokenize(texts): return texts",
}


def test_modules_load_under_private_names_without_their_packages(tmp_path: Path) -> None:
    write(tmp_path, OURS)
    before = {name for name in sys.modules if name.split(".")[0] in ("open_clip", "err_seg", "detectron2")}
    code = checkout.load_official(tmp_path)
    assert code.decoder_module.Decoder.width == 3 and code.clip_module.CLIP.name == "vendored"
    model = type("Model", (), {"training": False})()
    assert code.forward(model, [1]) == ([1], False)
    after = {name for name in sys.modules if name.split(".")[0] in ("open_clip", "err_seg", "detectron2")}
    assert after == before


def test_a_checkout_that_does_not_import_says_so(tmp_path: Path) -> None:
    write(tmp_path, OURS | {"err_seg/modeling/modules/part.py": "import a_module_that_nobody_has"})
    with pytest.raises(ErrSegError, match="does not import: No module named 'a_module_that_nobody_has'"):
        checkout.load_official(tmp_path)


def test_maps_follow_their_classes_into_another_order() -> None:
    ids = torch.tensor([[4, 1, 7], [0, 2, 9]])
    wanted = torch.tensor([[1, 7, 4], [9, 0, 2]])
    maps = ids[:, :, None, None].expand(2, 3, 2, 5)
    assert official_decoder.same_classes(ids, wanted) and not official_decoder.same_classes(ids, ids + 1)
    assert official_decoder.reordered(maps, ids, wanted)[:, :, 1, 4].equal(wanted)


def test_gates_at_a_kink_excuse_what_they_move_and_no_more() -> None:
    exact = Answer(torch.zeros(1, 1), torch.zeros(1), gradients={"w": torch.tensor([1.0, 2.0]).double()})
    theirs = exact._replace(gradients={"w": torch.tensor([1.0, 2.0])})
    ours = exact._replace(gradients={"w": torch.tensor([1.0, 2.001])})
    kinks = {"w": torch.tensor([0.0, 0.0010001]).double()}

    def passes(answer: Answer, moved: dict[str, torch.Tensor] | None) -> bool:
        return all(check.passed for check in official_decoder.compare_gradients(answer, theirs, exact, moved))

    assert not passes(ours, None) and passes(ours, kinks)
    assert not passes(exact._replace(gradients={"w": torch.tensor([1.001, 2.0])}), kinks)
    assert not passes(exact._replace(gradients={}), kinks)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ops.BackendError("gated_mlp cannot run: no GPU"), "gated_mlp cannot run: no GPU"),
        (KeyError("ids"), "KeyError: 'ids'"),
    ],
)
def test_whatever_is_raised_fails_the_comparison(error: Exception, reason: str) -> None:
    """A comparison that was begun and not made is no reason to pass."""

    def compare() -> list[Check]:
        raise error

    row = official._run(Row("official", "default", "float32", "decoder"), compare, SMALL, torch.device("cpu"))
    assert (row.status, row.reason) == ("fail", reason)


def test_what_a_decoder_selects_and_scores_is_seen_while_it_is_watched() -> None:
    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Conv2d(1, 1, 1)

        def select_classes(self, votes: torch.Tensor, *, count: int) -> torch.Tensor:
            return votes.argsort(1)[:, :count]

        def forward(self, votes: torch.Tensor) -> torch.Tensor:
            return self.head(self.select_classes(votes, count=2).float()[:, :, None, None].flatten(0, 1)[:, None])

    decoder, votes = Decoder(), torch.tensor([[2, 0, 1]])
    with official_decoder.watched(decoder) as seen:
        scores = decoder(votes)
    assert seen["ids"].tolist() == [[1, 2]] and torch.equal(seen["logits"], scores)
    decoder(votes.flip(1))
    assert seen["ids"].tolist() == [[1, 2]]


needs_checkout = pytest.mark.skipif("ERRSEG_OFFICIAL" not in os.environ, reason="ERRSEG_OFFICIAL names no checkout")


@needs_checkout
def test_the_published_code_agrees_at_small_sizes() -> None:
    rows = verify.run(quick=True, official=os.environ["ERRSEG_OFFICIAL"])
    assert verify.succeeded(rows), [row.name for row in rows if row.status == "fail"]


@needs_checkout
@pytest.mark.parametrize("part", ["evaluation", "training"])
def test_a_decoder_that_is_a_little_off_fails(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Upsampler.forward
    monkeypatch.setattr(Upsampler, "forward", lambda *args: 1.00001 * forward(*args))
    rows = verify.run(quick=True, official=os.environ["ERRSEG_OFFICIAL"], only=[f"decoder, {part}: small, square"])
    assert [row.status for row in rows] == ["fail", "fail"]
