"""Pictures from files and memory as upright 8-bit RGB, and the files behind folders and globs."""

from __future__ import annotations

import glob
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from errseg.errors import ErrSegError

if TYPE_CHECKING:
    from torch import Tensor

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

# What is looked for in folders; a file named outright may be anything that Pillow reads.
SUFFIXES = frozenset(
    (
        *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
        *(".ppm", ".tga", ".tif", ".tiff", ".webp"),
    )
)
# What `Segmentation.save` and the command line write: never taken for pictures in a folder.
_OWN_OUTPUT = (".labels.png", ".labels.tif", ".overlay.png")

# What Pillow's decoders raise on damaged files.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, RuntimeError),
    *(struct.error, zlib.error),
)
SHORT_EDGE, MAX_EDGE = 800, 1333  # of the published protocol
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def read_image(source: Any, name: str | None = None) -> Image.Image:
    """Return a picture as upright 8-bit RGB.

    Transparent pictures are laid on white, 16-bit ones scaled by 1/257 (full range to full range), grey,
    palette and CMYK ones converted; the EXIF orientation is applied; of several frames the first counts.

    Args:
        source: a path, an open binary file (io.BytesIO), a PIL image, or uint8 [H, W, 3] as an array or tensor
            ([3, H, W] too for a tensor).
        name: what to call it in errors; by default its path or kind.

    Raises:
        ErrSegError: naming the source, when it cannot be read or is not such a picture.
    """
    if isinstance(source, str | PathLike):
        return _read_path(Path(fspath(source)), name or fspath(source))
    if isinstance(source, io.IOBase):
        return _read_file(cast("IO[bytes]", source), name or "the open file")
    if isinstance(source, Image.Image):
        return _decode(source, name or "the PIL image")
    if isinstance(source, np.ndarray) or type(source).__module__.startswith("torch"):
        return _from_array(source, name)
    raise ErrSegError(
        f"{name or 'image'}: expected a path, a PIL image or uint8 [H, W, 3], got {type(source).__name__}"
    )


def _read_path(path: Path, name: str) -> Image.Image:
    if not path.exists():
        raise ErrSegError(f"{name}: no such file")
    if path.is_dir():
        raise ErrSegError(f"{name}: is a folder, not a picture")
    return _read_file(path, name)


def _read_file(file: Path | IO[bytes], name: str) -> Image.Image:
    try:
        # Pillow warns of odd tags and of its pixel limit, and raises beyond twice that: the line drawn here.
        with _quiet_pillow, Image.open(file) as image:
            return _decode(image, name)
    except UnidentifiedImageError as error:
        raise ErrSegError(f"{name}: not a picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ErrSegError(f"{name}: {_bomb(error)}") from error
    except PermissionError as error:
        raise ErrSegError(f"{name}: no permission to read it") from error
    except _DECODER_ERRORS as error:
        raise ErrSegError(f"{name}: unreadable picture ({_reason(error)})") from error


class _QuietPillow:
    """A context without Pillow's warnings, for any number of threads (warnings.catch_warnings is for one)."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.entry: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                warnings.filterwarnings("ignore", module=r"PIL\.|errseg\.data\.images$")
                self.entry = warnings.filters[0]
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users and self.entry in warnings.filters:
                cast("list[Any]", warnings.filters).remove(self.entry)


_quiet_pillow = _QuietPillow()


def _bomb(error: Exception) -> str:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return f"more than {limit:,} pixels, perhaps a decompression bomb: shrink it first ({_reason(error)})"


def _decode(image: Image.Image, name: str) -> Image.Image:
    if not image.width or not image.height:
        raise ErrSegError(f"{name}: has no pixels ({image.width} x {image.height})")
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except MemoryError as error:
        raise ErrSegError(f"{name}: {image.width} x {image.height} pixels do not fit into memory") from error
    except _DECODER_ERRORS as error:
        what = "truncated or damaged" if isinstance(error, OSError) else "unreadable"
        raise ErrSegError(f"{name}: {what} picture ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert any mode to RGB without dropping what its file says about range or transparency."""
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ErrSegError(f"{name}: its pixels are {kind} of unknown range; convert it to 8 or 16 bit first")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _from_array(source: Any, name: str | None) -> Image.Image:
    is_array = isinstance(source, np.ndarray)
    array = source if is_array else source.detach().cpu()
    if not is_array and array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.permute(1, 2, 0)
    kind = str(array.dtype).removeprefix("torch.")
    if array.ndim != 3 or array.shape[-1] != 3 or kind != "uint8":
        raise ErrSegError(
            f"{name or 'image'}: expected uint8 [H, W, 3], got {kind} {list(source.shape)} "
            f"{'array' if is_array else 'tensor'}"
        )
    if 0 in array.shape:
        raise ErrSegError(f"{name or 'image'}: has no pixels ({array.shape[1]} x {array.shape[0]})")
    return Image.fromarray(np.ascontiguousarray(array if is_array else array.numpy()))


def to_square(picture: Image.Image, size: int, protocol: str | None = None) -> Tensor:
    """Return an RGB picture as [1, 3, size, size] float32, 0..255: bilinear, half-pixel centres, no antialias.

    With "published" the shortest edge first becomes 800 (longest at most 1333) in uint8 by Pillow. One thread, so
    that workers may do it side by side; of large pictures only the pixels in use are converted.
    """
    import torch

    if protocol == "published":
        height, width = resized(picture.height, picture.width, SHORT_EDGE, MAX_EDGE)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    # Four bytes a pixel, so that a pixel is one number to gather.
    pixels = np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint32).reshape(picture.height, picture.width)
    (top, bottom, down), (left, right, along) = (_neighbours(edge, size) for edge in pixels.shape)
    if picture.height > 2 * size:
        pixels = pixels.take(np.concatenate([top, bottom]), axis=0)
        top, bottom = np.arange(size), np.arange(size, 2 * size)
    sides = [pixels.take(columns, axis=1).view(np.uint8).reshape(-1, size, 4) for columns in (left, right)]
    square = np.empty((1, 3, size, size), np.float32)
    for channel in range(3):
        west, east = (side[..., channel].astype(np.float32) for side in sides)
        rows = _blend(west, east, along)
        square[0, channel] = _blend(rows.take(top, axis=0), rows.take(bottom, axis=0), down[:, None])
    return torch.from_numpy(square)


def resized(height: int, width: int, short_edge: int, max_edge: int) -> tuple[int, int]:
    """Height and width with the shortest edge `short_edge`, but no edge beyond `max_edge`; rounded half up.

    Source: detectron2's ResizeShortestEdge, to the order of its roundings.
    """
    scale = short_edge / min(height, width)
    tall, wide = (short_edge, scale * width) if height < width else (scale * height, short_edge)
    if max(tall, wide) > max_edge:
        scale = max_edge / max(tall, wide)
        tall, wide = tall * scale, wide * scale
    return max(1, int(tall + 0.5)), max(1, int(wide + 0.5))


def _neighbours(edge: int, size: int) -> tuple[IntArray, IntArray, FloatArray]:
    """Per output pixel the two input pixels beside its centre, and the weight of the second; as PyTorch has them."""
    centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(edge / size) - np.float32(0.5)
    centres = np.maximum(centres, np.float32(0))
    first = np.minimum(centres.astype(np.int64), edge - 1)
    return first, np.minimum(first + 1, edge - 1), np.clip(centres - first, 0, 1).astype(np.float32)


def _blend(first: FloatArray, second: FloatArray, weight: FloatArray) -> FloatArray:
    """(1 - weight) first + weight second, in place of both."""
    first *= 1 - weight
    second *= weight
    first += second
    return first


class ImageFile(NamedTuple):
    """A picture to read and the name, unique in its list and without suffix, for what is made of it."""

    path: Path
    output: str


def find_images(arguments: Iterable[str | PathLike[str]]) -> list[ImageFile]:
    """Return the pictures behind files, folders and globs, each once, in the order given.

    Folders are searched recursively, in sorted order, for the common suffixes; hidden files and this
    project's own outputs are passed over. A file named outright is kept, missing or not, so that reading it
    can report it. Output names follow the path below a folder; equal ones get the suffix, then a number
    (`cat`, `cat_png`, `cat_2`).

    Raises:
        ErrSegError: there is no picture at all.
    """
    given = [fspath(argument) for argument in arguments]
    found: dict[Path, str] = {}
    for argument in given:
        for path, below in _expand(argument):
            found.setdefault(path, below)
    if not found:
        raise ErrSegError(f"no pictures in {', '.join(given) or 'an empty list'}")
    return _name_outputs(found)


def _expand(argument: str) -> Iterator[tuple[Path, str]]:
    """Yield (path, path below the folder searched) of one argument."""
    path = Path(argument)
    if path.is_dir():
        yield from _search(path)
    elif path.exists() or not glob.has_magic(argument):
        yield path, path.name
    else:
        matches = sorted(glob.glob(argument, recursive=True))
        if not matches:
            yield path, path.name
        for match in map(Path, matches):
            if not match.is_dir():
                yield match, match.name
            elif "**" not in argument:  # a recursive glob already lists what is inside
                yield from _search(match)


def _search(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        passed_over = any(part.startswith(".") for part in below.parts) or path.name.endswith(_OWN_OUTPUT)
        if path.suffix.lower() in SUFFIXES and not passed_over and path.is_file():
            yield path, str(below)


def _name_outputs(found: dict[Path, str]) -> list[ImageFile]:
    files: list[ImageFile] = []
    taken: set[str] = set()  # case folded: some file systems do not tell A from a
    for path, below in found.items():
        plain = str(Path(below).with_suffix(""))
        candidates = [plain, plain + path.suffix.replace(".", "_")]
        number = 2
        while candidates[0].casefold() in taken:
            candidates.pop(0)
            if not candidates:
                candidates.append(f"{plain}_{number}")
                number += 1
        taken.add(candidates[0].casefold())
        files.append(ImageFile(path, candidates[0]))
    return files
