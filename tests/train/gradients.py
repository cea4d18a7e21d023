"""One step's gradients of a configuration as a file; a program for torchrun: CONFIG OUT FILE."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from errseg.configs import load_config
from errseg.train.settings import TrainConfig
from errseg.train.trainer import Trainer


def step_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Of the trainer's first step, with its loss."""
    loss = trainer.accelerator.reduce(trainer.compute(trainer.batches(0)), "mean")
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {"loss": loss} | {name: grad.clone() for name, grad in found.items()}


def main() -> None:
    trainer = Trainer(load_config(Path(sys.argv[1]), TrainConfig), Path(sys.argv[2]), note=print)
    trainer.start()
    gradients = step_gradients(trainer)
    if trainer.accelerator.is_main_process:
        save_file(gradients, sys.argv[3])
    trainer.update()
    trainer.states.save(trainer.step)
    trainer.finish()


if __name__ == "__main__":
    main()
