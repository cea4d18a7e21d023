"""Pictures by the million on a cluster: Ray Data in, label maps out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errseg.errors import ErrSegError
from errseg.scale.actor import FORMATS, Job, PictureActor

if TYPE_CHECKING:
    import torch

    from errseg.vocabulary import Vocabulary

    Words = Vocabulary | Sequence[str | Sequence[str]] | Mapping[str, Sequence[str]] | str | PathLike[str]

_MOST_PER_TASK = 256
_TASKS_PER_ACTOR = 4  # at least, so that a slow one does not hold up the rest


@dataclass
class Summary:
    """What `segment_dataset` did: pictures segmented, {path: what is wrong with it} of the others, the seconds.

    `kept` counts those whose results were there already.
    """

    pictures: int = 0
    kept: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Of the whole run, starting the actors included."""
        return self.pictures / self.seconds if self.seconds else 0.0


def segment_dataset(
    pictures: Any,
    *,
    out: str | PathLike[str],
    format: str = "parquet",
    overlay: bool = False,
    resume: bool = False,
    **settings: Any,
) -> Summary:
    """Segment pictures with Ray Data and write their label maps; a picture that fails does not stop the rest.

    Runs on the Ray cluster that this process is connected to, that RAY_ADDRESS names, or a local one. Every file is
    whole or absent.

    Args:
        pictures: as in `segment_rows`.
        out: a folder that all machines share.
        format: "parquet", files with the rows of `segment_rows`, or "png", label maps, JSON files of areas and, with
            `overlay`, overlays, named after the pictures as `errseg segment` does; those of a dataset after its
            column "output", else after the whole path.
        overlay: write overlays too; with "png" only.
        resume: leave pictures whose results for these words `out` has; other settings are not compared. A picture
            that failed is tried again, and keeps its row with the error in a Parquet file.
        settings: model, weights, vocabulary, concurrency and all others as in `segment_rows`.

    Raises:
        ErrSegError: as `segment_rows`; a wrong format; Parquet files in `out` already (to `resume`, those for other
            words); they cannot be written.
    """
    folder = os.path.abspath(out)
    if format not in FORMATS:
        raise ErrSegError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if overlay and format != "png":
        raise ErrSegError('overlay: goes with format "png"')
    if format == "parquet" and not resume and any(Path(folder).glob("*.parquet")):
        raise ErrSegError(f"{out} holds Parquet files already: choose another folder, or resume=True to add to them")
    rows, job, plan = _prepare(pictures, **settings)
    start = time.perf_counter()
    job = replace(job, out=folder, format=format, overlay=overlay, resume=resume)
    summary = collect(plan.apply(rows, job))
    summary.seconds = time.perf_counter() - start
    return summary


def segment_rows(pictures: Any, **settings: Any) -> Any:
    """Segment pictures with Ray Data, lazily: a ray.data.Dataset to go on with, `write_parquet("s3://...")` for one.

    Its columns are path; height, width, labels (bytes of a palette or 16-bit PNG, of a TIFF beyond 65,535 words, read
    by `errseg.data.labels.load_labels`) and areas [{id, word, pixels, fraction}]; or error, what is wrong with the
    picture.

    Args:
        pictures: paths, folders or globs that all machines see, one or a list; or a ray.data.Dataset with the column
            "path" and perhaps "bytes" (`ray.data.read_binary_files(..., include_paths=True)`, which reads from cloud
            storage) or "image" (`ray.data.read_images(..., include_paths=True)`).
        model, weights: "errseg-b", "errseg-l" or "errseg-tiny" (a toy world), and its weights, as in `Segmenter`.
        vocabulary: words as in `Segmenter.set_vocabulary`, or a file of `errseg vocab build` that all machines see.
        concurrency: actors, each with its own model; one per GPU by default, or one in all. (least, most) lets Ray
            choose as it goes.
        num_gpus: of an actor, fractions too; by default 1 where the cluster has GPUs, else 0. Ray waits for machines
            that have them.
        num_cpus: of an actor, 1 by default.
        workers: threads of an actor that read, and that encode, pictures; by default as many as its CPUs.
        batch_size: pictures at once through the network; 4 on a GPU, else 1.
        per_task: pictures handed to an actor, and in a Parquet file, at a time; 256 by default, fewer for short lists.
        num_selected, size, prompt, dtype: as in `Segmenter`.
        background, threshold, protocol: as in a call of a Segmenter.

    Raises:
        ErrSegError: Ray is missing, no pictures, no weights, a wrong word or setting.
    """
    rows, job, plan = _prepare(pictures, **settings)
    return plan.apply(rows, job)


@dataclass(frozen=True)
class _Plan:
    """How actors share the work."""

    concurrency: tuple[int, int]
    num_gpus: float
    num_cpus: float
    per_task: int

    def apply(self, rows: Any, job: Job) -> Any:
        least, most = self.concurrency
        pool = {"size": least} if least == most else {"min_size": least, "max_size": most}
        return rows.map_batches(
            PictureActor,
            fn_constructor_args=(job,),
            batch_size=self.per_task,
            batch_format="numpy",
            compute=_ray_data().ActorPoolStrategy(**pool),
            num_gpus=self.num_gpus,
            num_cpus=self.num_cpus,
        )


def _prepare(
    pictures: Any,
    *,
    vocabulary: Words,
    model: str = "errseg-b",
    weights: str | PathLike[str] | None = None,
    concurrency: int | tuple[int, int] | None = None,
    num_gpus: float | None = None,
    num_cpus: float = 1,
    workers: int | None = None,
    batch_size: int | None = None,
    per_task: int | None = None,
    num_selected: int | None = None,
    size: int | None = None,
    prompt: str | None = None,
    dtype: torch.dtype | None = None,
    background: Sequence[str] = (),
    threshold: float | None = None,
    protocol: str | None = None,
) -> tuple[Any, Job, _Plan]:
    """Rows to segment, what to do with them, and by how many; everything that can be is checked before Ray starts."""
    from errseg.settings import check_num_selected, check_options, check_prompt, check_size

    _ray_data()
    check_options(threshold, protocol, batch_size, workers)
    check_num_selected(num_selected)
    if size is not None:
        check_size(size)
    if prompt is not None:
        check_prompt(prompt)
    if per_task is not None and per_task < 1:
        raise ErrSegError(f"per_task: expected at least 1, got {per_task}")
    pool = None if concurrency is None else _check_concurrency(concurrency)
    words = _check_words(vocabulary)
    job = Job(
        model=model,
        weights=_check_weights(model, weights),
        vocabulary=words,
        device="cpu",
        segmenter={"num_selected": num_selected, "size": size, "prompt": prompt, "dtype": dtype},
        call={
            "background": tuple(background),
            "threshold": threshold,
            "protocol": protocol,
            "batch_size": batch_size,
            "workers": max(1, int(num_cpus)) if workers is None else workers,
        },
    )
    items = None if hasattr(pictures, "map_batches") else list_pictures(pictures)
    gpus, pool = _share_out(num_gpus, pool)
    if items is None:
        rows, per_task = _check_dataset(pictures), per_task or _MOST_PER_TASK
    else:
        rows = _ray_data().from_items(items)
        per_task = per_task or min(_MOST_PER_TASK, math.ceil(len(items) / (_TASKS_PER_ACTOR * pool[1])))
    return rows, replace(job, device="cuda" if gpus else "cpu"), _Plan(pool, gpus, num_cpus, per_task)


def _ray_data() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise ErrSegError(f"this needs Ray Data ({error}): pip install 'errseg[ray]'") from error
    return ray.data


def _check_words(vocabulary: Words) -> Vocabulary | str:
    from errseg.vocabulary import Vocabulary

    if isinstance(vocabulary, str | PathLike):
        Vocabulary.load(vocabulary)  # only looked at: it stays a file, which the actors share memory-mapped
        return os.path.abspath(vocabulary)
    return vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary(vocabulary)


def _check_weights(model: str, weights: str | PathLike[str] | None) -> str | None:
    from errseg.settings import PUBLISHED_WEIGHTS

    if weights is None:
        if model in ("errseg-b", "errseg-l"):
            raise ErrSegError(f"{model} needs weights: a checkpoint, or the published {PUBLISHED_WEIGHTS}")
        return None
    return os.path.abspath(weights) if os.path.exists(weights) else fspath(weights)


def list_pictures(pictures: Any) -> list[dict[str, str]]:
    from errseg.data.images import find_images

    given = [pictures] if isinstance(pictures, str | PathLike) else list(pictures)
    for path in given:
        if "://" in fspath(path):
            raise ErrSegError(f"{path}: give ray.data.read_binary_files(..., include_paths=True) instead")
    return [{"path": os.path.abspath(file.path), "output": file.output} for file in find_images(given)]


def _check_dataset(rows: Any) -> Any:
    columns = rows.columns() or []
    if "path" not in columns:
        raise ErrSegError(f'the dataset has no column "path", only {", ".join(columns)}: read it with include_paths')
    return rows.select_columns([name for name in ("path", "output", "bytes", "image") if name in columns])


def _check_concurrency(concurrency: int | tuple[int, int]) -> tuple[int, int]:
    least, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    if not 1 <= least <= most:
        raise ErrSegError(f"concurrency: expected at least 1, or (least, most), got {concurrency}")
    return least, most


def _share_out(num_gpus: float | None, pool: tuple[int, int] | None) -> tuple[float, tuple[int, int]]:
    """GPUs of an actor, and the least and most actors, by what the cluster has where nobody said."""
    import ray

    if not ray.is_initialized():
        ray.init()
    there = ray.cluster_resources().get("GPU", 0)
    if num_gpus is None:
        num_gpus = 1 if there else 0
    if pool is None:
        actors = max(1, int(there / num_gpus)) if num_gpus else 1
        pool = (actors, actors)
    return num_gpus, pool


def collect(written: Any) -> Summary:
    """Count the rows of the actors as they come; the first that says why all must stop, stops it."""
    summary = Summary()
    for row in written.iter_rows():
        if row["fatal"] is not None:
            raise ErrSegError(row["fatal"])
        if row["kept"]:
            summary.kept += 1
        elif row["error"] is None:
            summary.pictures += 1
        else:
            summary.failures[row["path"]] = row["error"]
    return summary
