"""Packages that only preparing some of the sets needs: `pip install "errseg[data]"`."""

from __future__ import annotations

import importlib
from types import ModuleType

from errseg.errors import ErrSegError


def need(module: str, benchmark: str) -> ModuleType:
    """The module, or ErrSegError saying how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"cv2": "opencv-python-headless"}.get(module, module.partition(".")[0])
        raise ErrSegError(
            f"{benchmark} needs the package {package} ({error}): pip install 'errseg[data]' or pip install {package}"
        ) from error
