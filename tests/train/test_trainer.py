"""Runs of the tiny model: resumed exactly, written whole, and never mixed up."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from errseg.errors import ErrSegError
from errseg.model.errseg import create_model
from errseg.scale.processes import Processes
from errseg.train.records import locked
from errseg.train.settings import TrainConfig
from errseg.train.trainer import Trainer, train
from tests.disk import files_of_at_most
from tests.train.world import config, fresh_accelerate


class Killed(Exception):
    """In the place of a power cut."""


def run(settings: TrainConfig, out: Path, *, until: int | None = None, **options: object) -> list[str]:
    """Train and return what was noted; `until` ends it behind that step, checkpoint included."""

    def progress(done: int, total: int) -> None:
        if done == until:
            raise Killed

    notes: list[str] = []
    with fresh_accelerate():
        if until is None:
            train(settings, out, note=notes.append, **options)
        else:
            with pytest.raises(Killed):
                train(settings, out, note=notes.append, progress=progress, **options)
    return notes


def weights(out: Path, kind: str = "model") -> dict[str, Tensor]:
    return load_file(out / kind / "model.safetensors")


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def steps(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def done(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six steps, with an average."""
    out = tmp_path_factory.mktemp("done") / "run"
    run(config(scenes, ema=0.5), out)
    return out


def test_an_interrupted_run_ends_with_the_same_weights(done: Path, scenes: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", config(scenes, ema=0.5)
    run(settings, out, until=3)  # one step beyond the checkpoint is lost
    assert steps(out) == ["step-00000002"]
    torch.manual_seed(99)
    notes = run(settings, out)
    assert notes[0] == f"going on from step 2, {out / 'checkpoints/step-00000002'}"
    assert equal(weights(out), weights(done)) and equal(weights(out, "ema"), weights(done, "ema"))
    assert not equal(weights(out), weights(out, "ema"))
    curves = [[(line["step"], line["loss"], line["lr"]) for line in log(folder)] for folder in (out, done)]
    assert curves[0] == curves[1] and [step for step, *_ in curves[0]] == [1, 2, 3, 4, 5, 6]
    assert notes[1:] and notes[-1].startswith("step 6 of 6: loss ")


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 needs a GPU")


@pytest.mark.parametrize(
    ("dtype", "device"), [("bfloat16", "cpu"), pytest.param("float16", "cuda", marks=on_gpu, id="float16-cuda")]
)
def test_half_the_bits_end_with_the_same_weights_too(dtype: str, device: str, scenes: Path, tmp_path: Path) -> None:
    settings = config(scenes, dtype=dtype, device=device, steps=4, deterministic=device == "cuda")
    try:
        run(settings, tmp_path / "whole")
        run(settings, tmp_path / "run", until=3)
        assert "going on from step 2" in run(settings, tmp_path / "run")[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    losses = [line["loss"] for line in log(tmp_path / "run")]
    run(config(scenes, device=device, steps=1), tmp_path / "plain")
    exact = log(tmp_path / "plain")[0]["loss"]
    assert losses[0] != exact and losses[0] == pytest.approx(exact, rel=0.05)  # autocast computes, and well


def test_told_to_stop_it_ends_behind_its_step(done: Path, scenes: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", config(scenes, ema=0.5, save_every=100, workers=1)
    handler = signal.getsignal(signal.SIGTERM)

    def tell(step: int, total: int) -> None:
        if step == 3:  # as a scheduler does: this process and those that read pictures for it, from outside
            readers = [child.pid for child in multiprocessing.active_children()]
            assert readers
            subprocess.run(["kill", "-TERM", *map(str, [os.getpid(), *readers])], check=True)

    with fresh_accelerate(), pytest.raises(ErrSegError) as caught:
        train(settings, out, progress=tell)
    checkpoint = out / "checkpoints/step-00000004"
    assert str(caught.value) == (
        f"stopped by SIGTERM behind step 4: {checkpoint} is safe, the same command goes on from there"
    )
    assert not multiprocessing.active_children() and signal.getsignal(signal.SIGTERM) is handler
    assert "going on from step 4" in run(settings, out)[0]
    assert equal(weights(out), weights(done)) and equal(weights(out, "ema"), weights(done, "ema"))


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_training_moves_what_it_should(done: Path) -> None:
    model = create_model("errseg-tiny")
    before, after = model.state_dict(), create_model("errseg-tiny", done / "model").state_dict()
    frozen = ("clip.token_embedding.weight", "clip.visual.head.proj.weight", "clip.visual.trunk.stem.0.weight")
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    for name in ("clip.visual.trunk.stages.3.blocks.0.mlp.fc1.weight", "decoder.upsampler.head.weight"):
        assert not torch.equal(before[name], after[name])


def test_a_finished_run_is_left_as_it_is(done: Path, scenes: Path) -> None:
    before = weights(done)
    notes = run(config(scenes, ema=0.5), done)
    assert len(notes) == 1 and "going on from step 6" in notes[0] and equal(weights(done), before)


def test_a_checkpoint_is_a_model_and_the_last_ones_are_kept(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(scenes, save_every=1, keep=2, steps=4), out)
    assert steps(out) == ["step-00000003", "step-00000004"]
    last = create_model("errseg-tiny", out / "checkpoints/step-00000004").state_dict()
    assert equal(last, create_model("errseg-tiny", out / "model").state_dict())


def test_the_run_folder_tells_how_it_came_about(done: Path, scenes: Path) -> None:
    settings = yaml.safe_load((done / "config.yaml").read_text())
    assert settings["train"]["ema"] == 0.5 and settings["data"]["folder"] == str(scenes)
    start = json.loads((done / "environment.json").read_text())["starts"][0]
    assert (
        start["step"] == 0 and start["processes"] == 1 and start["versions"]["torch"] == torch.__version__.split("+")[0]
    )
    assert start["git"] is None or len(start["git"]["commit"]) == 40


@pytest.mark.parametrize("exclude_ignored", [False, True])
def test_parts_of_a_batch_add_up(exclude_ignored: bool, strips: Path, tmp_path: Path) -> None:
    settings = config(strips, drop_path=0.0, decoder_drop_path=0.0, steps=2, exclude_ignored=exclude_ignored)
    run(settings, tmp_path / "whole")
    run(replace(settings, train=replace(settings.train, accumulate=2, workers=1)), tmp_path / "parts")
    for whole, parts in zip(log(tmp_path / "whole"), log(tmp_path / "parts"), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_clipped_gradients_and_tensorboard(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(scenes, clip_norm=1e-9, steps=1, warmup_steps=0, tracker="tensorboard"), out)
    (events,) = (out / "tensorboard").glob("events.out.tfevents.*")
    assert b"pictures_per_second" in events.read_bytes()
    # The smallest gradients vanish beside AdamW's epsilon: nothing but the decay moves.
    name = "decoder.upsampler.head.bias"
    value = create_model("errseg-tiny").state_dict()[name]
    after = create_model("errseg-tiny", out / "model").state_dict()[name]
    torch.testing.assert_close(after, value * (1 - 1e-3 * 1e-4), rtol=0, atol=1e-3 * 0.2)


def test_another_runs_folder_is_refused_and_restart_keeps_it(done: Path, scenes: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "run")
    other = config(scenes, ema=0.5, lr=3e-3)
    with pytest.raises(ErrSegError) as caught:
        run(other, out)
    assert str(caught.value).startswith(f"{out} holds a run with train.lr 0.001, not 0.003: choose another folder")
    notes = run(other, out, until=1, restart=True)
    assert notes[0] == f"the earlier run is now {out}.1"
    assert equal(weights(Path(f"{out}.1")), weights(done)) and not (out / "checkpoints").exists()


def test_other_pictures_are_another_run(done: Path, scenes: Path, tmp_path: Path) -> None:
    out, folder = shutil.copytree(done, tmp_path / "run"), shutil.copytree(scenes, tmp_path / "toy")
    run(config(folder, ema=0.5), out)  # moved, but the same
    for part in ("images", "labels"):
        (folder / part / "4.png").unlink()
    with pytest.raises(ErrSegError, match="holds a run with pictures and words"):
        run(config(folder, ema=0.5), out)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_a_damaged_checkpoint_is_named(name: str, done: Path, scenes: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "run")
    path = out / "checkpoints/step-00000006" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ErrSegError) as caught:
        run(config(scenes, ema=0.5), out)
    assert str(caught.value).startswith(f"{path.parent}: damaged checkpoint (")
    shutil.rmtree(path.parent)
    run(config(scenes, ema=0.5), out)
    assert equal(weights(out), weights(done))


@pytest.mark.parametrize("size", [4_000_000, 9_000_000])
def test_a_full_disk_loses_nothing(size: int, done: Path, scenes: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", config(scenes, ema=0.5)
    run(settings, out, until=2)
    # The weights take 8.6 MB, the optimizer's state 10 MB.
    with files_of_at_most(size), pytest.raises(ErrSegError) as caught:
        run(settings, out)
    line = str(caught.value)
    assert line.startswith(f"cannot write checkpoint 4 to {out / 'checkpoints'}: ") and "\n" not in line
    assert line.endswith(f"{out / 'checkpoints/step-00000002'} is safe, the same command goes on from there")
    assert steps(out) == ["step-00000002"]
    run(settings, out)
    assert equal(weights(out), weights(done))


def test_a_loss_that_is_no_number_stops_and_saves_nothing(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with fresh_accelerate(), pytest.raises(ErrSegError) as caught:
        trainer = Trainer(config(scenes, log_every=100), out)
        trainer.start()
        with torch.no_grad():
            trainer.model.decoder.upsampler.head.weight.fill_(torch.nan)
        trainer.run()
    assert str(caught.value).startswith("the loss is nan at step 2: lower train.lr")
    assert not (out / "checkpoints").exists()


def test_two_trainings_cannot_share_a_folder(scenes: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ErrSegError, match="another training writes there"):
        run(config(scenes), tmp_path)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dtype": "float16"}, "training in float16 needs a GPU"),
        ({"device": "cuda"}, "no such device: cuda"),
        ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_that_are_not_there(settings: dict[str, object], line: str, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ErrSegError, match=line):
        Trainer(config(scenes, **settings), tmp_path)


def test_without_a_tracker_it_says_so(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    with pytest.raises(ErrSegError, match=r"pip install 'errseg\[train\]'"):
        Trainer(config(scenes, tracker="tensorboard"), tmp_path)


def test_deterministic_products_on_a_gpu_need_a_word_to_cublas(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        Trainer(config(scenes, deterministic=True), tmp_path)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.are_deterministic_algorithms_enabled()
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        Trainer(config(scenes, deterministic=True), tmp_path)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_reading_processes_are_a_share_of_the_machines_cores(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, asked = Trainer(config(scenes, workers=None), tmp_path), []
    monkeypatch.setattr("errseg.scale.processes.default_workers", lambda: 12)
    monkeypatch.setattr("errseg.train.trainer.make_loader", lambda *_, workers, pin: asked.append(workers) or [])
    for local_count in (1, 4):  # of sixteen
        trainer.processes = Processes(count=16, local_count=local_count)
        trainer.batches(0)
    assert asked == [8, 3]
