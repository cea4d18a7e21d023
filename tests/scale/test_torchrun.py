"""`errseg segment` under torchrun: each picture once, one sum, one line per failure."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errseg.data.labels import load_labels
from errseg.errors import ErrSegError
from errseg.scale.processes import Processes, speaking_for_the_machine, take_leave
from tests.launch import one_line, torchrun
from tests.scale.world import WORDS, agree


def test_two_processes_share_the_pictures(photos: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--words", ", ".join(WORDS), "--out", out, "--json", "--timings", "--model", "errseg-tiny")
    done = torchrun("-m", "errseg", "segment", photos, *options, "--device", "cpu", cwd=tmp_path)
    assert one_line(done).startswith(f"error: {photos}/cut.png: ")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (sums,) = [line for line in lines if "pictures" in line]
    assert (sums["pictures"], sums["failed"], sums["processes"]) == (3, 1, 2)
    assert sums["images_per_second"] == pytest.approx(3 / sums["seconds"], rel=0.01)
    assert sums["timings"]["towers"] > 0
    images = [line["image"] for line in lines if "image" in line]
    assert sorted(images) == sorted(str(photos / name) for name in ("a.png", "cut.png", "x/a.png", "x/b.png"))
    for name, labels in expected.items():
        assert agree(load_labels(out / f"{name}.labels.png"), labels)


@pytest.mark.parametrize(("command", "settings"), [("eval", ""), ("train", "train: {dtype: float32, tracker: none}")])
def test_a_wrong_folder_is_one_line_of_one_process(command: str, settings: str, tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(f"data: {{folder: gone}}\nmodel: {{name: errseg-tiny}}\n{settings}\n")
    done = torchrun("-m", "errseg", command, "toy.yaml", "--device", "cpu", cwd=tmp_path)
    assert one_line(done) == "error: gone: no such folder" and done.stdout == ""


@dataclass(frozen=True)
class Beside(Processes):
    """A process of two, and what the other one sends."""

    other: str | None = None

    def any(self, flag: bool) -> bool:
        return flag or self.other is not None

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other] if self.rank == 0 else [self.other, value]


def fail() -> int:
    raise ErrSegError("mine")


def test_one_mistake_stops_all_and_the_first_tells_it() -> None:
    assert Beside(1, 2).all_or_none(lambda: 7) == 7
    for work, other, line in ((fail, None, "mine"), (fail, "theirs", "mine"), (lambda: 7, "theirs", "theirs")):
        with pytest.raises(ErrSegError, match=f"^{line}$"):
            Beside(0, 2, other=other).all_or_none(work)
    for work, other in ((fail, None), (fail, "theirs"), (lambda: 7, "theirs")):
        with pytest.raises(SystemExit) as stopped:
            Beside(1, 2, other=other).all_or_none(work)
        assert stopped.value.code == 0  # torchrun would end the first before it has spoken


def test_one_process_needs_no_group() -> None:
    alone = Processes()
    assert alone.share([1, 2, 3]) == [1, 2, 3] and alone.gather(4) == [4] and alone.agree(5) == 5
    assert alone.all_or_none(lambda: 6) == 6 and alone.device("cuda") == "cuda"
    assert alone.total(7) == 7 and alone.any(True) and not alone.any(False)
    assert alone.first_of_each_machine_first(lambda: 8) == 8


def test_the_first_of_each_machine_goes_first() -> None:
    turns: list[str] = []

    class Watched(Processes):
        def any(self, flag: bool) -> bool:
            turns.append("all are here")
            return flag

    for local_rank, order in (
        (0, ["work", "all are here", "all are here"]),
        (1, ["all are here", "work", "all are here"]),
    ):
        turns.clear()
        assert (
            Watched(2 + local_rank, 4, local_rank, 2).first_of_each_machine_first(lambda: turns.append("work") or 5)
            == 5
        )
        assert turns == order


def test_before_they_are_connected_the_first_of_a_machine_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, kind in (("0", ErrSegError), ("1", SystemExit)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(kind), speaking_for_the_machine():
            fail()


class Store:
    """Counts, with others that come or do not, and may be gone itself."""

    def __init__(self, others: list[int]) -> None:
        self.others, self.count = others, 0

    def add(self, key: str, amount: int) -> int:
        if not self.others:
            raise RuntimeError("Connection reset by peer")
        self.count += amount
        return self.count + (self.others.pop(0) if len(self.others) > 1 else self.others[0])


@pytest.mark.parametrize(
    ("others", "waits"),
    [([2], False), ([0, 0, 1, 1, 2], False), ([], False), ([1], True)],
    ids=["the last", "one by one", "no store any more", "one never comes"],
)
def test_nobody_hangs_up_before_all_have_heard(others: list[int], waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(others)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    monkeypatch.setattr("errseg.scale.processes._FAREWELL", 0.2)
    start = time.monotonic()
    take_leave()
    assert (time.monotonic() - start >= 0.2) == waits
    assert len(store.others) <= 1  # it went on asking until all had come


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errseg.scale.processes.default_workers", lambda: 12)
    assert [Processes(0, 16, 0, count).workers for count in (1, 2, 5, 16)] == [12, 6, 2, 1]


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Processes(rank=5, count=8, local_rank=1, local_count=4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [second.device(name) for name in (None, "cuda", "cuda:3", "cpu")] == ["cuda:1", "cuda:1", "cuda:3", "cpu"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert second.device(None) is None
    parts = [Processes(rank, 3).share(list(range(8))) for rank in range(3)]
    assert sorted(chain(*parts)) == list(range(8))
