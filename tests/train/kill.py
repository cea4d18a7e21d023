"""Kill a training at random moments, go on each time, and compare the weights with an undisturbed run's.

A program: python tests/train/kill.py --kills 20 [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import errseg.train.trainer as trainer  # before the forks, so that children need not import it again
from errseg.model.tokenizer import import_open_clip
from errseg.train.settings import TrainConfig
from tests.train.world import config, make_folder

STEPS = 10


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def start(settings: TrainConfig, out: Path) -> int:
    """A child process that trains; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        trainer.train(settings, out)
        code = 0
    except BaseException as error:
        sys.stderr.write(f"training failed: {error!r}\n")
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Its exit code, -9 when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_whole(out: Path) -> int:
    """Read every file of every checkpoint; the step of the newest."""
    step = 0
    for folder in sorted((out / "checkpoints").glob("step-*")):
        names = {path.name for path in folder.iterdir()}
        assert names == {"model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "state.json"}
        load_file(folder / "model.safetensors")
        for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
            torch.load(folder / name, weights_only=False)
        step = json.loads((folder / "state.json").read_text())["step"]
        assert folder.name == f"step-{step:08d}"
    for path in out.glob("*.json"):
        json.loads(path.read_text())
    return step


def same_weights(first: Path, second: Path) -> bool:
    a, b = (load_file(out / "model/model.safetensors") for out in (first, second))
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import_open_clip()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        settings = config(make_folder(base / "toy"), steps=STEPS, save_every=1, keep=2)
        began = time.perf_counter()
        assert wait(start(settings, base / "whole")) == 0
        seconds = time.perf_counter() - began
        say(f"undisturbed: {seconds:.1f} s")
        kills = runs = resumed = 0
        while kills < options.kills or not runs:
            out, before = base / f"run{runs}", 0
            while True:
                child = start(settings, out)
                if kills < options.kills:
                    time.sleep(rng.uniform(0.05, 1.0) * seconds)
                    os.kill(child, signal.SIGKILL)
                code = wait(child)
                assert code in (0, -signal.SIGKILL), code
                if code == 0:
                    break
                kills += 1
                after = check_whole(out)
                assert after >= before, "a checkpoint was lost"
                resumed += after > 0
                say(f"kill {kills}: step {before} -> {after}")
                before = after
            assert same_weights(out, base / "whole"), "other weights than the undisturbed run's"
            runs += 1
        say(f"{kills} kills, {resumed} with a checkpoint to go on from, {runs} runs ended with the same weights")


if __name__ == "__main__":
    main()
