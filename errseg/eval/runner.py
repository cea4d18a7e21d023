"""A model over a labelled set: pictures in, one confusion matrix out, resumable, on one process or many."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from errseg.configs.schema import EvalConfig, ModelSettings
from errseg.data.datasets import LabelledSet, Pair, open_data
from errseg.data.labels import save_labels
from errseg.data.overlay import palette
from errseg.errors import ErrSegError
from errseg.eval.metrics import Metrics
from errseg.eval.parts import Part, file_digest, joined_parts, load_part, part_files, part_path
from errseg.eval.resuming import PARTS, PREDICTIONS, prediction_path, to_do
from errseg.scale.processes import Processes
from errseg.settings import DTYPES, PUBLISHED_WEIGHTS

if TYPE_CHECKING:
    from errseg.segmentation import Segmentation
    from errseg.segmenter import Segmenter

_SAMPLES = 256  # of every parameter, to tell weights apart
Report = Callable[[int, int], object]


class Evaluation(NamedTuple):
    """What came out: scores, the set, the pictures counted and those skipped (with why), and the settings in use."""

    metrics: Metrics
    data: LabelledSet
    pictures: int
    skipped: dict[str, str]
    settings: dict[str, Any]


def build_segmenter(config: EvalConfig, processes: Processes) -> Segmenter:
    """The network of a configuration, on this process's device."""
    from errseg.segmenter import Segmenter

    model: ModelSettings = config.model
    if model.weights is None and model.name != "errseg-tiny":
        raise ErrSegError(f"model: {model.name} needs weights: a checkpoint, or the published {PUBLISHED_WEIGHTS}")
    if config.eval.dtype not in DTYPES:
        raise ErrSegError(f"eval: dtype: expected one of {', '.join(DTYPES)}, got {config.eval.dtype!r}")
    return Segmenter(
        model.name,
        model.weights,
        size=model.size,
        num_selected=model.num_selected,
        prompt=model.prompt,
        device=processes.device(config.eval.device),
        dtype=DTYPES[config.eval.dtype],
    )


def evaluate(
    config: EvalConfig,
    out: Path,
    *,
    processes: Processes | None = None,
    restart: bool = False,
    progress: Report | None = None,
) -> Evaluation | None:
    """Evaluate by the published protocol; what the folder `out` holds already is not done again.

    Pictures are counted in `out/parts`, at most `save_seconds` of work is lost with a process. Call it in every
    process; the result is that of the first, the others get None.

    Raises:
        ErrSegError: bad settings, data or weights, another evaluation's folder, files that have changed since, a file
            that cannot be read (unless `bad_files` is "skip") or written. Of several processes the first has it.
        SystemExit: in the other processes, then.
    """
    processes = processes or Processes()
    data, segmenter = processes.all_or_none(partial(_open, config, processes))
    settings = describe(config, data, segmenter)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    # The first process looks, so that all share out the same list whatever the others have begun to write.
    look = partial(to_do, config, data, out, key, restart, processes.workers)
    run, left = processes.agree(processes.all_or_none(look if processes.rank == 0 else lambda: (0, [])))
    pairs = {pair.stem: pair for pair in data.pairs}
    job = _Job(config, data, segmenter, out, part_path(out / PARTS, run, processes.rank), key, processes.workers)
    mine = [pairs[stem] for stem in processes.share(left)]
    # A mistake in one ends the run when the others have done, and saved, their share.
    processes.all_or_none(partial(job.run, mine, progress))
    if processes.rank:
        return None
    total = _collect(data, out / PARTS, key)
    skipped = {stem: line for stem, line in total.skipped.items() if stem not in total.done}
    return Evaluation(Metrics(total.confusion), data, len(total.done), skipped, settings)


def _open(config: EvalConfig, processes: Processes) -> tuple[LabelledSet, Segmenter]:
    """The set, and the network with its words."""
    need_torchmetrics()
    data = open_data(config.data)
    # The published numbers were measured under PyTorch's own settings: convolutions in TF32, products not.
    segmenter = build_segmenter(config, processes).optimize(tf32=None)
    segmenter.set_vocabulary(list(data.words))
    return data, segmenter


def describe(config: EvalConfig, data: LabelledSet, segmenter: Segmenter) -> dict[str, Any]:
    """What the numbers depend on, as JSON values; the files themselves are compared when an evaluation goes on."""
    content = json.dumps([[pair.stem for pair in data.pairs], data.words, data.classes, data.class_of_word])
    return {
        "set": data.name,
        "pictures": len(data),
        "content": hashlib.sha256(content.encode()).hexdigest()[:16],
        "model": segmenter.model.config.name,
        "weights": weights_digest(segmenter.model),
        "size": segmenter.size,
        "num_selected": segmenter.num_selected or segmenter.model.config.num_selected,
        "prompt": segmenter.prompt,
        "protocol": config.eval.protocol,
        "dtype": config.eval.dtype,
    }


def weights_digest(model: nn.Module) -> str:
    """Digest of samples of every parameter: tells checkpoints apart."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        samples = value.flatten()[:: max(1, value.numel() // _SAMPLES)]
        digest.update(name.encode() + samples.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _collect(data: LabelledSet, folder: Path, key: str) -> Part:
    """The sum of all parts, which must cover the set."""
    total = joined_parts([load_part(path, key) for path in part_files(folder)], len(data.classes))
    missing = {pair.stem for pair in data.pairs} - total.done.keys() - total.skipped.keys()
    if missing:
        raise ErrSegError(f"{len(missing)} pictures were not evaluated, {min(missing)} for one: run it again")
    if not total.confusion.any():
        raise ErrSegError(f"{data.name}: there is no labelled pixel to score")
    return total


@dataclass
class _Job:
    """One process's pictures."""

    config: EvalConfig
    data: LabelledSet
    segmenter: Segmenter
    out: Path
    path: Path
    key: str
    workers: int

    def run(self, pairs: list[Pair], progress: Report | None) -> None:
        """Count all of them; what was counted is on disk, however this ends."""
        if not pairs:
            return
        counts = _Counts(len(self.data.classes), self.data.class_of_word, self.segmenter.device)
        part = Part(counts.numpy())
        with self._kept(part, counts) as keep:
            for pair, result in self._results(pairs, part):
                self._count(pair, result, counts, part)
                keep()
                if progress is not None:
                    progress(len(part.done) + len(part.skipped), len(pairs))

    def _results(self, pairs: list[Pair], part: Part) -> Iterator[tuple[Pair, Segmentation]]:
        """Each pair with its result; pictures that cannot be read stop it or are skipped, as configured."""
        by_path = {os.fspath(pair.image): pair for pair in pairs}
        settings = self.config.eval

        def skip(source: Any, error: ErrSegError) -> None:
            # Only the fault of this picture: running out of memory is another matter.
            if not str(error).startswith(str(source)):
                raise error
            part.skipped[by_path[source].stem] = str(error)

        for result in self.segmenter.stream(
            list(by_path),
            workers=self.workers if settings.workers is None else settings.workers,
            batch_size=settings.batch_size,
            protocol="published" if settings.protocol == "published" else None,
            on_error=skip if settings.bad_files == "skip" else None,
        ):
            yield by_path[str(result.source)], result

    def _count(self, pair: Pair, result: Segmentation, counts: _Counts, part: Part) -> None:
        try:
            truth = self.data.labels(pair)
            if truth.shape != tuple(result.labels.shape):
                height, width = result.labels.shape
                raise ErrSegError(
                    f"{pair.label}: {truth.shape[0]} x {truth.shape[1]} pixels, its picture {height} x {width}"
                )
        except ErrSegError as error:
            if self.config.eval.bad_files == "stop":
                raise
            part.skipped[pair.stem] = str(error)
            return
        predicted = counts.classes(result.labels)
        if self.config.eval.predictions:
            number = len(self.data.classes)
            colours = palette(number) if number <= 255 else None
            save_labels(predicted.cpu(), prediction_path(self.out / PREDICTIONS, pair.stem, number), number, colours)
        digest = file_digest(pair)
        # Last, and at once: what fails before leaves the picture uncounted.
        counts.add(predicted, truth)
        part.done[pair.stem] = digest

    @contextmanager
    def _kept(self, part: Part, counts: _Counts) -> Iterator[Callable[[], None]]:
        """Yield what saves the part every so often, and save it at the end, even one that is no good end."""
        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            part.confusion = counts.numpy()
            part.save(self.path, self.key)
            saved = time.monotonic()

        def keep() -> None:
            if time.monotonic() - saved >= self.config.eval.save_seconds:
                save()

        try:
            yield keep
        finally:
            save()


class _Counts:
    """The confusion matrix of a process, kept by torchmetrics on the network's device."""

    def __init__(self, num_classes: int, class_of_word: Iterable[int], device: torch.device) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.class_of_word = torch.tensor(list(class_of_word), device=device)
        self.metric = MulticlassConfusionMatrix(num_classes, ignore_index=-1, validate_args=False).to(device)

    def classes(self, words: Tensor) -> Tensor:
        """Words [H, W] as the classes that they count as, on the device."""
        return self.class_of_word[words.to(self.class_of_word.device).long()]

    def add(self, predicted: Tensor, truth: np.ndarray) -> None:
        """Count a picture: predicted classes [H, W] on the device, true classes [H, W] with -1 ignored."""
        self.metric.update(predicted, torch.from_numpy(truth).to(predicted.device))

    def numpy(self) -> np.ndarray:
        confusion = self.metric.confmat
        assert isinstance(confusion, Tensor)
        return confusion.cpu().numpy().astype(np.int64)


def need_torchmetrics() -> None:
    """Raise ErrSegError, saying how to get it, where torchmetrics is not installed."""
    try:
        import torchmetrics.classification  # noqa: F401
    except ImportError as error:
        raise ErrSegError(f"evaluation needs torchmetrics ({error}): pip install 'errseg[eval]'") from error
