"""ERR-Seg: open-vocabulary semantic segmentation, with every public name loaded on first use."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errseg import ops as ops
    from errseg import testing as testing
    from errseg import verify as verify
    from errseg.accelerated import accelerate as accelerate
    from errseg.accelerated import restore as restore
    from errseg.errors import ErrSegError as ErrSegError
    from errseg.model.clip import DenseCLIP as DenseCLIP
    from errseg.model.clip import DenseFeatures as DenseFeatures
    from errseg.model.decoder import Decoder as Decoder
    from errseg.model.decoder import DecoderOutput as DecoderOutput
    from errseg.model.errseg import ERRSeg as ERRSeg
    from errseg.model.errseg import create_model as create_model
    from errseg.segmentation import Segmentation as Segmentation
    from errseg.segmenter import Segmenter as Segmenter
    from errseg.vocabulary import Vocabulary as Vocabulary

__version__ = "0.1.0"

_HOME_OF = {
    "DenseCLIP": "errseg.model.clip",
    "DenseFeatures": "errseg.model.clip",
    "Decoder": "errseg.model.decoder",
    "DecoderOutput": "errseg.model.decoder",
    "ERRSeg": "errseg.model.errseg",
    "ErrSegError": "errseg.errors",
    "Segmentation": "errseg.segmentation",
    "Segmenter": "errseg.segmenter",
    "Vocabulary": "errseg.vocabulary",
    "accelerate": "errseg.accelerated",
    "create_model": "errseg.model.errseg",
    "restore": "errseg.accelerated",
}
_SUBMODULES = ("ops", "testing", "verify")

__all__ = [*_HOME_OF, *_SUBMODULES, "__version__"]

# In a checkout `kernels/` and `bench/` are neighbours of this folder; installed, they lie inside it.
_root = Path(__file__).parent.parent
if not (Path(__file__).parent / "kernels").is_dir() and (_root / "kernels" / "__init__.py").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"errseg.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'errseg' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
