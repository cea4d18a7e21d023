"""All that the rest of a run depends on, to disk and back, exactly."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from errseg.errors import ErrSegError
from errseg.model.errseg import ERRSeg, save_model
from errseg.model.published import check_state_dict, published_state_dict, read_checkpoint
from errseg.scale.processes import Processes
from errseg.train.checkpoints import Checkpoints, damaged, naming_the_last, read_state

if TYPE_CHECKING:
    from accelerate import Accelerator

WEIGHTS, AVERAGE = "model.safetensors", "ema"


class States:
    """Weights, optimizer, schedule, scaler and random states of all processes, by accelerate; one for each run.

    Weights are written in the published layout, so that a checkpoint is a model too. `sequence` are the settings that
    decide what is computed: a checkpoint made with others is refused.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        processes: Processes,
        checkpoints: Checkpoints,
        model: ERRSeg,
        average: ERRSeg | None,
        sequence: dict[str, Any],
        batch_size: int,
    ) -> None:
        self.accelerator, self.processes, self.checkpoints = accelerator, processes, checkpoints
        self.sequence, self.batch_size = sequence, batch_size
        self.models = {WEIGHTS: model} | ({} if average is None else {f"{AVERAGE}/{WEIGHTS}": average})
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, step: int) -> None:
        """Write the checkpoint of a step; all processes together, into a folder that all of them see.

        Raises:
            ErrSegError, SystemExit: it cannot be written, as `Processes.all_or_none`; what was there is untouched.
        """
        for turn in (self._begin, self._write, self._finish):
            self.processes.all_or_none(partial(self._take, turn, step))

    def _take(self, turn: Callable[[int], None], step: int) -> None:
        with naming_the_last(self.checkpoints, step):
            turn(step)

    def _begin(self, step: int) -> None:
        if self.processes.rank == 0:
            self.checkpoints.begin(step)

    def _write(self, step: int) -> None:
        self.accelerator.save_state(str(self.checkpoints.temporary(step)))

    def _finish(self, step: int) -> None:
        if self.processes.rank == 0:
            samples, count = step * self.batch_size, self.processes.count
            state = {"step": step, "samples": samples, "processes": count, "sequence": self.sequence}
            self.checkpoints.finish(step, state)

    def check(self, checkpoint: Path) -> int:
        """How many processes wrote a checkpoint; ErrSegError if it is damaged or another run's."""
        state = read_state(checkpoint)
        for name, value in self.sequence.items():
            if (was := state["sequence"].get(name)) != value:
                raise ErrSegError(
                    f"{self.checkpoints.folder.parent} holds a run with {name} {was}, not {value}: "
                    "choose another folder with --out, or begin anew with --restart"
                )
        return int(state["processes"])

    def load(self, checkpoint: Path) -> int:
        """Put everything back, and return the step.

        Raises:
            ErrSegError: the checkpoint belongs to another run, or is damaged.
        """
        count = self.check(checkpoint)
        try:
            self._load(checkpoint, with_random=self.accelerator.process_index < count)
        except (ErrSegError, OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise damaged(checkpoint, error) from error
        return int(read_state(checkpoint)["step"])

    def _load(self, checkpoint: Path, *, with_random: bool) -> None:
        """By accelerate, which would pass over random states that it cannot read."""
        from accelerate.utils import load

        name = f"random_states_{self.accelerator.process_index}.pkl"
        states = load(checkpoint / name) if with_random else None
        self.accelerator.load_state(str(checkpoint))
        self.accelerator.step = 0  # parts of a batch done: none, in however many it was computed until now
        if states is not None and not torch.equal(torch.get_rng_state(), states["torch_manual_seed"]):
            raise ValueError(f"{name} cannot be restored")

    def _save_weights(self, models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()  # accelerate writes none
        if self.accelerator.is_main_process:
            for name, model in self.models.items():
                save_model(model, Path(folder) / name)

    def _load_weights(self, models: list[Any], folder: str) -> None:
        models.clear()  # accelerate reads none
        for name, model in self.models.items():
            _copy_weights(Path(folder) / name, model)


@torch.no_grad()
def _copy_weights(path: Path, model: ERRSeg) -> None:
    """Put a checkpoint's tensors into the network in place, whose optimizer knows its parameters."""
    stored, own = read_checkpoint(path), published_state_dict(model.clip, model.decoder)
    check_state_dict(stored, own, str(path))
    for name, value in own.items():
        value.copy_(stored[name])
