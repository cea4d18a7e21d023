"""Reading pictures: every mode Pillow has, and one clear line for every bad file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from errseg.data.images import find_images, read_image, resized, to_square
from errseg.errors import ErrSegError


def gradient(height: int = 12, width: int = 20) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 20, columns * 12, rows * 5 + columns * 5], -1).astype(np.uint8)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(gradient())


def read(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    image.save(path, **options)
    result = read_image(path)
    assert result.mode == "RGB"
    return np.asarray(result)


def test_the_same_picture_from_every_kind_of_source(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "a.png")
    pixels = gradient()
    sources = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        photo,
        pixels,
        pixels[:, ::-1][:, ::-1],
        torch.from_numpy(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
    ]
    for source in sources:
        assert np.array_equal(np.asarray(read_image(source)), pixels)


def test_the_picture_given_is_left_alone(photo: Image.Image) -> None:
    read_image(photo).putpixel((0, 0), (1, 2, 3))
    assert photo.getpixel((0, 0)) == (0, 0, 0)


def test_exif_rotation_is_applied(photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated by 90 degrees clockwise
    pixels = read(photo, tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels, np.rot90(gradient(), -1))


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "HSV", "P"])
def test_other_colour_spaces(photo: Image.Image, mode: str) -> None:
    converted = photo.convert(mode)
    assert np.array_equal(np.asarray(read_image(converted)), np.asarray(converted.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "clear", "opaque"),
    [("RGBA", (9, 8, 7, 0), (9, 8, 7, 255)), ("LA", (9, 0), (9, 255)), ("RGBa", (0, 0, 0, 0), (9, 8, 7, 255))],
)
def test_transparency_shows_white(mode: str, clear: tuple[int, ...], opaque: tuple[int, ...]) -> None:
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), opaque)
    shown = read_image(image)
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((1, 0)) == ((9, 9, 9) if mode == "LA" else (9, 8, 7))


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    pixels = read(image, tmp_path / "a.png", transparency=0)
    assert pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_keeps_its_range(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257 * 100, 65535]], np.uint16)
    pixels = read(Image.fromarray(values), tmp_path / f"a{suffix}")
    assert pixels[..., 0].tolist() == [[0, 0, 1, 100, 255]]


def test_big_endian_sixteen_bit(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 7, 65535]], ">u2")
    header = b"MM\0*" + struct.pack(">I", 8)
    data_at = 8 + 2 + 12 * 8 + 4
    tags = [
        (256, 4, 3), (257, 4, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, data_at), (278, 4, 1), (279, 4, 6)
    ]  # fmt: skip
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", v, 0) if kind == 3 else struct.pack(">I", v))
        for tag, kind, v in tags
    )
    path = tmp_path / "a.tif"
    path.write_bytes(header + struct.pack(">H", len(tags)) + entries + b"\0\0\0\0" + values.tobytes())
    assert np.asarray(read_image(path))[..., 0].tolist() == [[0, 7, 255]]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0xFFFF, 0x8080, 0)))
    assert read_image(path).getpixel((0, 0)) == (255, 128, 0)


def test_panorama(tmp_path: Path) -> None:
    Image.new("RGB", (8000, 800), (1, 2, 3)).save(tmp_path / "wide.jpg")
    assert read_image(tmp_path / "wide.jpg").size == (8000, 800)


def bad_files(folder: Path) -> dict[str, str]:
    """File name -> what its line must say."""
    good = folder / "good.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(good)
    data = good.read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "flipped.png").write_bytes(data[:60] + bytes([data[60] ^ 255]) + data[61:])
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "bomb.png").write_bytes(png(30_000, 30_000, 1, 0, b""))
    (folder / "flat.png").write_bytes(png(0, 5, 8, 2, b""))
    (folder / "folder.png").mkdir()
    Image.fromarray(np.full((2, 2), 1e6, np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((2, 2), 70_000, np.int32)).save(folder / "long.tif")
    return {
        "cut.png": "picture",
        "flipped.png": "picture",
        "cut.jpg": "truncated",
        "empty.png": "not a picture",
        "text.jpg": "not a picture",
        "bomb.png": "decompression bomb",
        "flat.png": "picture",
        "folder.png": "is a folder",
        "missing.png": "no such file",
        "float.tif": "unknown range",
        "long.tif": "unknown range",
    }


def test_bad_files_are_one_line_with_their_name(tmp_path: Path) -> None:
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(ErrSegError) as caught:
            read_image(tmp_path / name)
        line = str(caught.value)
        assert str(tmp_path / name) in line and reason in line and "\n" not in line, (name, line)


@pytest.mark.parametrize(
    ("source", "got"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32 [4, 4, 3] array"),
        (np.zeros((4, 4), np.uint8), "uint8 [4, 4] array"),
        (np.zeros((4, 4, 4), np.uint8), "uint8 [4, 4, 4] array"),
        (np.zeros((3, 4, 5), np.uint8), "uint8 [3, 4, 5] array"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels (5 x 0)"),
        (torch.zeros(4, 4, 3), "float32 [4, 4, 3] tensor"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "uint8 [1, 3, 4, 4] tensor"),
        (Image.new("RGB", (0, 3)), "no pixels (0 x 3)"),
        (42, "got int"),
        (None, "got NoneType"),
    ],
)
def test_bad_arrays_are_quoted(source: object, got: str) -> None:
    with pytest.raises(ErrSegError) as caught:
        read_image(source)
    assert got in str(caught.value)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folders_are_searched_and_outputs_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", "x/c.tiff", "x/y/d.webp", "notes.txt", ".hidden.png", ".h/e.png")
    touch(tmp_path, "a.labels.png", "a.overlay.png")
    found = find_images([tmp_path])
    assert [(f.path.relative_to(tmp_path).as_posix(), f.output) for f in found] == [
        ("a.png", "a"),
        ("b.JPG", "b"),
        ("x/c.tiff", str(Path("x/c"))),
        ("x/y/d.webp", str(Path("x/y/d"))),
    ]


def test_globs_and_files_come_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "odd.xyz", "x/a.png", "[1].png")
    found = find_images([f"{tmp_path}/*.png", tmp_path / "b.png", tmp_path / "odd.xyz", tmp_path / "[1].png"])
    assert sorted(f.path.name for f in found) == ["[1].png", "a.png", "b.png", "odd.xyz"]
    assert len(find_images([f"{tmp_path}/**/a.png"])) == 2
    assert len(find_images([f"{tmp_path}/**"])) == 5


def test_equal_names_do_not_meet(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.png", "y/a.png", "y/a.jpg", "z/a.png", "x/A.png", "b.c.png")
    given = ("x/a.png", "y/a.png", "y/a.jpg", "z/a.png", "x/A.png")
    names = [file.output for file in find_images(tmp_path / name for name in given)]
    assert names == ["a", "a_png", "a_jpg", "a_2", "A_3"]
    assert find_images([tmp_path / "b.c.png"])[0].output == "b.c"


def test_no_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ErrSegError, match="no pictures in"):
        find_images([tmp_path])


def test_a_missing_file_is_kept_to_be_reported(tmp_path: Path) -> None:
    assert [f.path.name for f in find_images([tmp_path / "gone.png", f"{tmp_path}/*.bmp"])] == ["gone.png", "*.bmp"]


@pytest.mark.parametrize(
    ("edges", "short_edge", "expected"),
    [
        ((480, 640), 640, (640, 853)),
        ((640, 480), 640, (853, 640)),
        ((427, 640), 640, (640, 959)),
        ((100, 400), 640, (333, 1333)),
        ((293, 586), 800, (666, 1333)),  # by way of 800 x 1600.00...: 666.49..., not 666.5
    ],
)
def test_sizes_are_detectron2s(edges: tuple[int, int], short_edge: int, expected: tuple[int, int]) -> None:
    assert resized(*edges, short_edge, 1333) == expected
    if short_edge == 800:
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*edges, 3), dtype=np.uint8))
        enlarged = picture.resize(expected[::-1], Image.Resampling.BILINEAR)
        assert torch.equal(to_square(picture, 64, "published"), to_square(enlarged, 64))
