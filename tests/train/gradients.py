"""What two processes do, as files in a folder; a program for torchrun: CONFIG RUN FOLDER.

gradients.safetensors and labelled.safetensors hold one step's gradients, of the loss over all pixels and over the
labelled ones; stopped.txt says how the first process ended when the second had been told to stop.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from errseg.configs import load_config
from errseg.errors import ErrSegError
from errseg.train.settings import TrainConfig
from errseg.train.trainer import Trainer


def step_gradients(trainer: Trainer, *, exclude_ignored: bool = False) -> dict[str, Tensor]:
    """Of the trainer's first step, with its loss."""
    trainer.settings = replace(trainer.settings, exclude_ignored=exclude_ignored)
    trainer.accelerator.unwrap_model(trainer.objective).exclude_ignored = exclude_ignored
    trainer.optimizer.zero_grad()
    loss = trainer.accelerator.reduce(trainer.compute(trainer.batches(0)), "mean")
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {"loss": loss} | {name: grad.clone() for name, grad in found.items()}


def main() -> None:
    folder = Path(sys.argv[3])
    trainer = Trainer(load_config(Path(sys.argv[1]), TrainConfig), Path(sys.argv[2]), note=print)
    trainer.start()
    first = trainer.accelerator.is_main_process
    for name, exclude_ignored in (("labelled", True), ("gradients", False)):
        gradients = step_gradients(trainer, exclude_ignored=exclude_ignored)
        if first:
            save_file(gradients, folder / f"{name}.safetensors")
    trainer.update()
    trainer.states.save(trainer.step)

    def tell_the_second(step: int, total: int) -> None:
        if step == 2 and not first:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        trainer.run(tell_the_second)
    except (ErrSegError, SystemExit) as end:
        if first:
            (folder / "stopped.txt").write_text(f"{type(end).__name__}: {end}")
    trainer.finish()


if __name__ == "__main__":
    main()
