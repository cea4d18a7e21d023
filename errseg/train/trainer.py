"""Training by the published recipe on labelled pictures: resumable, on one process or many."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from errseg.data.datasets import LabelledSet, open_data
from errseg.errors import ErrSegError
from errseg.model.errseg import ERRSeg
from errseg.scale.processes import Processes, leaving_in_order, speaking_for_the_machine, take_leave
from errseg.settings import default_num_selected
from errseg.train import recipe
from errseg.train.augment import Augmentation
from errseg.train.checkpoints import Checkpoints
from errseg.train.loop import make_accelerator
from errseg.train.objective import Objective, build_model, check_words, checkpoint_towers
from errseg.train.records import Log, Window, locked, move_aside, record_start
from errseg.train.samples import Batch, Positions, TrainingSamples, make_loader, num_labelled
from errseg.train.settings import TrainConfig, check, sequence
from errseg.train.states import States
from errseg.train.stopping import stop_when_told
from errseg.vocabulary import Vocabulary

CHECKPOINTS, AVERAGE = "checkpoints", "ema"
_MOST_READERS = 8  # of pictures, for each training process
Report = Callable[[int, int], object]
Note = Callable[[str], object]


def train(
    config: TrainConfig,
    out: Path,
    *,
    restart: bool = False,
    progress: Report | None = None,
    note: Note = lambda line: None,
) -> Path:
    """Train, from the folder's last checkpoint if it has one; return the folder of the final weights.

    `out` gets checkpoints/, log.jsonl, config.yaml, environment.json, tensorboard/ and, at the end, model/ (and ema/),
    which `create_model` and `errseg eval` take as weights. Whenever it is killed, the same call goes on from the last
    checkpoint and ends with the same weights. `restart` first renames the folder of an earlier run. Call it in every
    process; `progress(done, steps)` and `note(line)` tell how it goes, in the first process, and files that were
    skipped, in each.

    SIGTERM, as schedulers send it, ends the run behind the step under way, with a checkpoint.

    Raises:
        ErrSegError: bad settings or data, another run's folder, a file that cannot be read (unless `bad_files` is
            "skip") or written, a loss that is no number; stopped by SIGTERM. Of several processes the first has it.
        SystemExit: in the other processes, then.
    """
    # Depthwise weights are [C, 1, 7, 7]: the stride along a single entry means nothing, and costs nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with leaving_in_order(), ExitStack() as stack:
        trainer = Trainer(config, out, note=note)

        def take_folder() -> None:
            if not trainer.accelerator.is_main_process:
                return
            if restart and out.exists():
                with locked(out):
                    note(f"the earlier run is now {move_aside(out)}")
            stack.enter_context(locked(out))

        trainer.processes.all_or_none(take_folder)
        trainer.start()
        trainer.run(progress)
        trainer.finish()
    return out / "model"


class Trainer:
    """One process of a run: data, network, optimizer, and how they go to disk and back."""

    def __init__(self, config: TrainConfig, out: Path, *, note: Note = lambda line: None) -> None:
        settings = config.train
        self.config, self.settings, self.out, self.note = config, settings, out, note
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used
            torch.use_deterministic_algorithms(True)
        with speaking_for_the_machine():
            self.accelerator = make_accelerator(
                settings.device,
                dtype=settings.dtype,
                accumulate=settings.accumulate,
                folder=out,
                tracker=None if settings.tracker == "none" else settings.tracker,
            )
        self.processes = Processes.of(self.accelerator)
        self.data = self.processes.all_or_none(self._open_data)
        self.step, self.skipped = 0, dict[str, None]()
        self.checkpoints = Checkpoints(out / CHECKPOINTS, settings.keep)
        self.log = Log(out)
        torch.manual_seed(settings.seed)  # of weights that start at random, the same in all processes
        self.model = self.processes.first_of_each_machine_first(partial(build_model, config))  # one download
        self._prepare()

    def _open_data(self) -> LabelledSet:
        """The set, once the settings are found good."""
        check(self.config, self.processes.count)
        data = open_data(self.config.data)
        check_words(data.words, data.class_of_word)
        return data

    def _prepare(self) -> None:
        """The network and its optimizer on this process's device."""
        settings, words = self.settings, Vocabulary(list(self.data.words)).words
        model, accelerator = self.model.train(), self.accelerator
        recipe.freeze(model.clip)
        model.to(accelerator.device)
        self.average: AveragedModel | None = None
        if settings.ema is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        if settings.gradient_checkpointing:
            checkpoint_towers(model.clip)
        objective = Objective(
            model,
            words,
            num_selected=model.config.num_selected or default_num_selected(len(words)),
            fused=settings.fused,
            exclude_ignored=settings.exclude_ignored,
        )
        groups = recipe.parameter_groups(
            model, lr=settings.lr, clip_lr=settings.clip_lr, weight_decay=settings.weight_decay
        )
        optimizer = recipe.make_adamw(groups)
        scheduler = LambdaLR(optimizer, recipe.warmup_cosine(settings.steps, settings.warmup_steps))
        self.objective, self.optimizer, self.scheduler = accelerator.prepare(objective, optimizer, scheduler)
        content = json.dumps([[pair.stem for pair in self.data.pairs], self.data.words])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        decides = sequence(self.config) | {"pictures and words": digest}
        average = None if self.average is None else self.averaged_model()
        self.states = States(
            accelerator, self.processes, self.checkpoints, model, average, decides, settings.batch_size
        )
        torch.manual_seed(settings.seed + 1 + accelerator.process_index)  # of what is dropped

    # ---- the course of a run

    def start(self) -> None:
        """Go on from the last checkpoint, if there is one, and put this start on record."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            self.checkpoints.clear_remains()
        accelerator.wait_for_everyone()
        if latest := self.checkpoints.latest():
            self._go_on(latest)
        if accelerator.is_main_process:
            self.log.rewind(self.step)
            record_start(
                self.out,
                self.config,
                step=self.step,
                processes=accelerator.num_processes,
                device=_device_name(accelerator.device),
            )
        if self.settings.tracker != "none":
            purge = {"purge_step": self.step} if self.step else {}
            accelerator.init_trackers(self.settings.tracker, init_kwargs={self.settings.tracker: purge})

    def _go_on(self, checkpoint: Path) -> None:
        """Go back to a checkpoint, exactly."""
        count, here = self.processes.all_or_none(partial(self.states.check, checkpoint)), self.processes.count
        self.step = self.processes.all_or_none(partial(self.states.load, checkpoint))
        if self.average is not None:
            self.average.n_averaged.fill_(self.step)
        if self.accelerator.is_main_process:
            if count != here:
                self.note(f"{count} processes until now, {here} from here on: other random drops")
            self.note(f"going on from step {self.step:,}, {checkpoint}")

    def run(self, progress: Report | None = None) -> None:
        """All steps that are left, with a checkpoint every so often and behind the last."""
        settings = self.settings
        window = Window(self.accelerator.device)
        if progress is not None:
            progress(self.step, settings.steps)
        with closing(self.batches(self.step)) as batches, stop_when_told() as stop:
            while self.step < settings.steps:
                window.add(self.compute(batches))
                self.update()
                last = self.step == settings.steps
                told = self.processes.any(stop.told)
                if self.step % settings.log_every == 0 or last:
                    self._record(window)
                    window = Window(self.accelerator.device)
                if self.step % settings.save_every == 0 or last or told:
                    self._check_finite(window)
                    self.states.save(self.step)
                if progress is not None:
                    progress(self.step, settings.steps)
                if told and not last:
                    safe = f"{self.checkpoints.latest()} is safe, the same command goes on from there"
                    self._end(f"stopped by SIGTERM behind step {self.step:,}: {safe}")

    def _end(self, line: str) -> NoReturn:
        """Stop all processes, which are all here, by one line."""

        def stop() -> NoReturn:
            raise ErrSegError(line)

        self.processes.all_or_none(stop)
        raise AssertionError

    def finish(self) -> None:
        """Write the final weights, and the averaged ones, and close the tracker."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(self.out / "model")
            if self.average is not None:
                self.averaged_model().save_pretrained(self.out / AVERAGE)
        take_leave()
        self.accelerator.end_training()

    # ---- one step

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """This process's parts of all steps from `start` on."""
        settings, accelerator = self.settings, self.accelerator
        samples = TrainingSamples(
            self.data,
            Augmentation.of(settings, self.model.config.size),
            seed=settings.seed,
            skip=settings.bad_files == "skip",
        )
        positions = Positions(
            start,
            settings.steps,
            batch_size=settings.batch_size,
            parts=settings.accumulate,
            rank=accelerator.process_index,
            count=accelerator.num_processes,
        )
        workers = settings.workers
        if workers is None:
            workers = min(self.processes.workers, _MOST_READERS)
        loader = make_loader(samples, positions, workers=workers, pin=accelerator.device.type == "cuda")
        return self._checked(iter(loader))

    def _checked(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """Batches without fatal faults; each skipped file is noted once."""
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ErrSegError(
                    "a process that reads pictures has died, perhaps for memory: lower train.workers"
                ) from error
            for line in batch.skipped:
                if line not in self.skipped:
                    self.skipped[line] = None
                    self.note(f"skipped: {line}")
            if batch.fatal is not None:
                raise ErrSegError(batch.fatal)
            yield batch

    def compute(self, batches: Iterator[Batch]) -> Tensor:
        """Gradients of one step's loss, averaged over its parts and processes; the loss of this process."""
        device, losses = self.accelerator.device, []
        parts = self.processes.all_or_none(partial(self._take, batches))
        for batch, weight in zip(parts, self._weights(parts), strict=True):
            images, targets = (t.to(device, non_blocking=True) for t in (batch.images, batch.targets))
            with self.accelerator.accumulate(self.objective):
                loss = self.objective(images, targets) * weight
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _take(self, batches: Iterator[Batch]) -> list[Batch]:
        """A step's parts: all of them, so that a file that cannot be read ends all processes before they compute."""
        return [next(batches) for _ in range(self.settings.accumulate)]

    def _weights(self, parts: list[Batch]) -> list[float]:
        """What each part's loss counts for in the mean over parts and processes, which is the whole batch's loss."""
        if not self.settings.exclude_ignored:
            return [1.0] * len(parts)
        # A part's loss is the mean over its own labelled pixels.
        counts = [num_labelled(batch) for batch in parts]
        mean = self.processes.total(sum(counts)) / (len(parts) * self.processes.count)
        return [count / mean if mean else 1.0 for count in counts]

    def update(self) -> None:
        """Move the weights along the gradients, and on to the next step."""
        if self.settings.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.clip_norm)
        self.rates = self.scheduler.get_last_lr()  # towers, decoder, norms: of this step
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None:
            self.average.update_parameters(self.model)

    def averaged_model(self) -> ERRSeg:
        """The network whose weights are the average."""
        assert self.average is not None and isinstance(self.average.module, ERRSeg)
        return self.average.module

    # ---- records

    def _record(self, window: Window) -> None:
        """One line of the log, for the tracker and the reader too."""
        loss = self._mean(window)
        if not self.accelerator.is_main_process:
            return
        speed = window.steps * self.settings.batch_size / window.seconds()
        values = {"loss": loss, "lr": self.rates[1], "clip_lr": self.rates[0], "pictures_per_second": speed}
        self.log.add({"step": self.step} | values | {"skipped_files": len(self.skipped)})
        self.accelerator.log(values, step=self.step)
        self.note(f"step {self.step:,} of {self.settings.steps:,}: loss {loss:.5g}, {speed:.3g} pictures/s")

    def _mean(self, window: Window) -> float:
        """Mean loss of a window over all processes; ErrSegError if it is no number."""
        mean = self.accelerator.reduce(window.total / max(window.steps, 1), "mean")
        assert isinstance(mean, Tensor)
        loss = float(mean)
        if not math.isfinite(loss):
            last = self.checkpoints.latest()
            where = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            cure = "lower train.lr, or choose bfloat16 or float32"
            self._end(f"the loss is {loss} at step {self.step:,}: {cure}; {where}")
        return loss

    def _check_finite(self, window: Window) -> None:
        """Never save weights that a loss which is no number has spoilt."""
        if window.steps:
            self._mean(window)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
