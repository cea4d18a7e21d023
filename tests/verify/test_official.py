"""Reading a checkout of the published code; the comparison itself needs one: ERRSEG_OFFICIAL names it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from errseg import verify
from errseg.errors import ErrSegError
from errseg.verify import checkout


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


@pytest.mark.skipif("ERRSEG_OFFICIAL" not in os.environ, reason="ERRSEG_OFFICIAL names no checkout")
def test_the_published_code_agrees_at_small_sizes() -> None:
    rows = verify.run(quick=True, official=os.environ["ERRSEG_OFFICIAL"])
    assert verify.succeeded(rows), [row.name for row in rows if row.status == "fail"]
