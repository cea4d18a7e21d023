"""Threads that work ahead: in order, within bounds, and gone when the caller is."""

from __future__ import annotations

import threading
import time
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from errseg.data.images import read_image, to_square
from errseg.data.loader import default_workers, in_order, load_image
from errseg.errors import ErrSegError


def threads() -> int:
    return sum(thread.name.startswith("errseg") for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_order(workers: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.003 * (item % 3))
        return -item

    found = [(item, future.result()) for item, future in in_order(work, range(20), workers=workers, ahead=5)]
    assert found == [(item, -item) for item in range(20)]
    assert threads() == 0
    assert list(in_order(work, [], workers=workers, ahead=5)) == []


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_is_that_of_its_item(workers: int) -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ErrSegError("two")
        return item

    futures = dict(in_order(work, range(5), workers=workers, ahead=2))
    assert [futures[i].result() for i in (0, 1, 3, 4)] == [0, 1, 3, 4]
    with pytest.raises(ErrSegError, match="two"):
        futures[2].result()


@pytest.mark.parametrize("workers", [0, 3])
def test_no_more_than_so_many_ahead(workers: int) -> None:
    taken: list[int] = []

    def endless() -> object:
        while True:
            taken.append(len(taken))
            yield taken[-1]

    with closing(in_order(lambda item: item, endless(), workers=workers, ahead=4)) as results:
        for expected in range(50):
            assert next(results)[0] == expected
            assert len(taken) <= expected + (4 if workers else 1)
    assert threads() == 0


def test_what_is_done_is_not_held_back() -> None:
    done = threading.Event()

    def slow() -> object:
        yield 1
        assert done.wait(5)
        time.sleep(0.05)
        yield 2
        pytest.fail("the first result was held back")

    results = in_order(lambda item: done.set(), slow(), workers=1, ahead=9)
    assert next(results)[0] == 1
    results.close()


def test_closing_waits_for_what_is_under_way_and_forgets_the_rest() -> None:
    started, finished = [], []

    def work(item: int) -> None:
        started.append(item)
        time.sleep(0.02)
        finished.append(item)

    results = in_order(work, range(100), workers=2, ahead=10)
    next(results)
    results.close()
    assert threads() == 0
    assert sorted(started) == sorted(finished) and len(started) < 10


def test_workers_by_cores() -> None:
    assert 1 <= default_workers() <= 16


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (641, 37), (1, 1), (5, 2), (333, 777), (1600, 1200), (3000, 40)])
@pytest.mark.parametrize("edge", [64, 160])
def test_squares_are_those_of_pytorch(size: tuple[int, int], edge: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = F.interpolate(planes, size=(edge, edge), mode="bilinear", align_corners=False)
    square = to_square(Image.fromarray(pixels), edge)
    # The positions of the centres may round differently: by 2 ** -23 of the position, times 255.
    torch.testing.assert_close(square, expected, rtol=0, atol=max(size) * 255 * 2**-22)


def test_loading(tmp_path: Path) -> None:
    Image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 64)
    assert loaded.source == tmp_path / "a.png" and loaded.picture.size == (50, 40)
    assert torch.equal(loaded.square, to_square(read_image(tmp_path / "a.png"), 64))
    assert loaded.read_seconds > 0 and loaded.resize_seconds > 0
    with pytest.raises(ErrSegError, match="no such file"):
        load_image(tmp_path / "b.png", 64)


def test_threads_leave_the_filters_of_warnings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # of which Pillow warns from 1,500 to 3,000
    paths = [tmp_path / f"{i}.png" for i in range(24)]
    for path in paths:
        Image.effect_noise((50, 40), 60).save(path)
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        for _, future in in_order(lambda path: load_image(path, 32), paths, workers=4, ahead=8):
            future.result()
        assert warnings.filters == inside and not caught
        warnings.warn("seen", stacklevel=1)
        assert len(caught) == 1
    assert warnings.filters == before
