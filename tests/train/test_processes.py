"""Two processes under torchrun compute what one does with all of the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from errseg.train.trainer import Trainer, train
from tests.train.gradients import step_gradients
from tests.train.world import config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind after one step in two parts."""
    out = tmp_path_factory.mktemp("two")
    settings = config(scenes, batch_size=4, accumulate=2, drop_path=0.0, decoder_drop_path=0.0, steps=2)
    (out / "toy.yaml").write_text(yaml.safe_dump(asdict(settings)))
    program, files = (
        str(Path(__file__).with_name("gradients.py")),
        [str(out / "run"), str(out / "gradients.safetensors")],
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(program, str(out / "toy.yaml"), *files),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_gradients_are_those_of_one_process(two: Path, scenes: Path, tmp_path: Path) -> None:
    settings = config(scenes, batch_size=4, drop_path=0.0, decoder_drop_path=0.0, steps=2)
    trainer = Trainer(settings, tmp_path)
    alone, shared = step_gradients(trainer), load_file(two / "gradients.safetensors")
    assert (
        alone.keys()
        == shared.keys()
        == {"loss"} | {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    )
    for name, value in alone.items():
        bound = max(1e-3 * float(value.norm()), 1e-7)
        assert float((shared[name] - value).norm()) < bound, name
    assert float(alone["loss"]) == pytest.approx(float(shared["loss"]), rel=1e-6)


def test_another_number_of_processes_goes_on(two: Path, scenes: Path) -> None:
    checkpoint = two / "run/checkpoints/step-00000001"
    assert {path.name for path in checkpoint.glob("random_states_*")} == {f"random_states_{i}.pkl" for i in range(2)}
    before = load_file(checkpoint / "model.safetensors")
    settings = config(scenes, batch_size=4, drop_path=0.0, decoder_drop_path=0.0, steps=2)
    notes: list[str] = []
    train(replace(settings, train=replace(settings.train, accumulate=4)), two / "run", note=notes.append)
    assert notes[0] == "2 processes until now, 1 from here on: other random drops"
    assert notes[1].startswith("going on from step 1, ")
    after = load_file(two / "run/model/model.safetensors")
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
