"""`errseg segment` under torchrun: each picture once, one sum, one line per failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from errseg.data.labels import load_labels
from errseg.errors import ErrSegError
from errseg.scale.processes import Processes
from errseg.segmenter import Segmenter

ROOT = Path(__file__).parents[2]
WORDS = ["red star", "grass", "sky"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i, name in enumerate(("a.png", "x/a.png", "x/b.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:700])
    return folder


def torchrun(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [*launch, "-m", "errseg", "segment", *map(str, args), "--model", "errseg-tiny", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_two_processes_share_the_pictures(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = torchrun(photos, "--words", ", ".join(WORDS), "--out", out, "--json", "--timings", cwd=tmp_path)
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr  # of the process; torchrun's own is 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {photos}/cut.png: ")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (sums,) = [line for line in lines if "pictures" in line]
    assert (sums["pictures"], sums["failed"], sums["processes"]) == (3, 1, 2)
    assert sums["images_per_second"] == pytest.approx(3 / sums["seconds"], rel=0.01)
    assert sums["timings"]["towers"] > 0
    images = [line["image"] for line in lines if "image" in line]
    assert sorted(images) == sorted(str(photos / name) for name in ("a.png", "cut.png", "x/a.png", "x/b.png"))
    segmenter = Segmenter("errseg-tiny", vocabulary=WORDS, device="cpu")
    for name in ("a", "x/a", "x/b"):
        expected = segmenter(photos / f"{name}.png").labels.numpy()
        assert (load_labels(out / f"{name}.labels.png") == expected).mean() > 0.999  # other threads, other rounding


@dataclass(frozen=True)
class Beside(Processes):
    """A process of two, and what the other one sends."""

    other: str | None = None

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


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Processes(rank=5, count=8, local_rank=1, local_count=4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [second.device(name) for name in (None, "cuda", "cuda:3", "cpu")] == ["cuda:1", "cuda:1", "cuda:3", "cpu"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert second.device(None) is None
    parts = [Processes(rank, 3).share(list(range(8))) for rank in range(3)]
    assert sorted(chain(*parts)) == list(range(8))
