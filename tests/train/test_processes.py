"""Two processes under torchrun compute what one does with all of the batch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from errseg.train.settings import TrainConfig
from errseg.train.trainer import Trainer, train
from tests.launch import torchrun
from tests.train.gradients import step_gradients
from tests.train.world import config

GRADIENTS = Path(__file__).with_name("gradients.py")


@pytest.fixture(scope="module")
def two(strips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind after one step in two parts, and two more until one was told to stop."""
    out = tmp_path_factory.mktemp("two")
    (out / "toy.yaml").write_text(yaml.safe_dump(asdict(settings(strips, accumulate=2))))
    done = torchrun(GRADIENTS, out / "toy.yaml", out / "run", out, cwd=out)
    assert done.returncode == 0, done.stderr
    return out


def settings(folder: Path, **changes: int) -> TrainConfig:
    return config(folder, batch_size=4, drop_path=0.0, decoder_drop_path=0.0, steps=4, save_every=100, **changes)


@pytest.mark.parametrize(("name", "exclude_ignored"), [("gradients", False), ("labelled", True)])
def test_gradients_are_those_of_one_process(
    name: str, exclude_ignored: bool, two: Path, strips: Path, tmp_path: Path
) -> None:
    trainer = Trainer(settings(strips), tmp_path)
    alone = step_gradients(trainer, exclude_ignored=exclude_ignored)
    shared = load_file(two / f"{name}.safetensors")
    assert (
        alone.keys()
        == shared.keys()
        == {"loss"} | {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    )
    for name, value in alone.items():
        bound = max(1e-3 * float(value.norm()), 1e-7)
        assert float((shared[name] - value).norm()) < bound, name
    assert float(alone["loss"]) == pytest.approx(float(shared["loss"]), rel=1e-6)


def test_one_that_is_told_to_stop_stops_all_with_a_checkpoint(two: Path) -> None:
    checkpoint = two / "run/checkpoints/step-00000003"
    line = f"stopped by SIGTERM behind step 3: {checkpoint} is safe, the same command goes on from there"
    assert (two / "stopped.txt").read_text() == f"ErrSegError: {line}"
    assert {path.name for path in checkpoint.glob("random_states_*")} == {f"random_states_{i}.pkl" for i in range(2)}


def test_another_number_of_processes_goes_on(two: Path, strips: Path) -> None:
    before = load_file(two / "run/checkpoints/step-00000003/model.safetensors")
    notes: list[str] = []
    train(settings(strips, accumulate=4), two / "run", note=notes.append)
    assert notes[0] == "2 processes until now, 1 from here on: other random drops"
    assert notes[1].startswith("going on from step 3, ")
    after = load_file(two / "run/model/model.safetensors")
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
