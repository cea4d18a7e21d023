"""What a Ray actor does: one Segmenter, and task after task of pictures through it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import compress
from operator import not_
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from errseg.errors import ErrSegError

if TYPE_CHECKING:
    import pyarrow

    from errseg.segmentation import Segmentation
    from errseg.segmenter import Segmenter
    from errseg.vocabulary import Vocabulary

FORMATS = ("parquet", "png")
_WORDS = "errseg.words"  # metadata of a Parquet file: digest of the vocabulary


@dataclass(frozen=True)
class Job:
    """What to do with pictures, in a form that travels.

    model, weights, vocabulary (or its file), device: as in `Segmenter`; `segmenter` holds its other settings, `call`
    those of `Segmenter.stream`. Without `out` the label maps are handed on; otherwise they are written there, in
    `format`; with `resume`, but for pictures whose results for these words are there.
    """

    model: str
    weights: str | None
    vocabulary: Vocabulary | str
    device: str
    segmenter: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    out: str | None = None
    format: str = "parquet"
    overlay: bool = False
    resume: bool = False


class PictureActor:
    """Segments the pictures of a task; a picture that fails is a row with its error."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.segmenter: Segmenter | None = None
        self.problem: ErrSegError | None = None
        self.earlier: set[str] | None = None  # pictures in Parquet files
        try:
            self.segmenter = _open(job)
        except ErrSegError as error:  # Ray would start it again and again; it is told by the first task
            self.problem = error

    def __call__(self, task: Mapping[str, Sequence[Any]]) -> pyarrow.Table:
        """Return a row for each picture, in `row_schema`, or in `written_schema` where they were written.

        Args:
            task: columns "path" and perhaps "output", a name for what is made of the picture, and "bytes", the
                picture's file, or "image", uint8 [H, W, 3]; without these the path is read.
        """
        import pyarrow as pa

        if self.job.out is None:
            return pa.Table.from_pylist(self._rows(task), schema=row_schema())
        try:
            rows = self._written(task, Path(self.job.out))
        except ErrSegError as error:
            rows = [{"fatal": str(error)}]
        return pa.Table.from_pylist(rows, schema=written_schema())

    def _written(self, task: Mapping[str, Sequence[Any]], out: Path) -> list[dict[str, Any]]:
        """Rows of a task's pictures, once what is to be written of them is."""
        finished = [self.job.resume and self._is_finished(*names) for names in zip(*_names(task), strict=True)]
        kept = [{"path": str(path), "kept": True} for path, there in zip(task["path"], finished, strict=True) if there]
        if len(kept) == len(finished):
            return kept
        rows = self._rows({name: list(compress(column, map(not_, finished))) for name, column in task.items()})
        if self.job.format == "parquet":
            file = _write_parquet(rows, out, self._words())
            rows = [{"file": file, **row} for row in rows]
        return rows + kept

    def _is_finished(self, path: str, output: str) -> bool:
        from errseg.data.finished import is_finished

        assert self.job.out is not None
        if self.job.format == "parquet":
            if self.earlier is None:
                self.earlier = _pictures_in(Path(self.job.out), self._words())
            return path in self.earlier
        target = Path(self.job.out, f"{output}.labels.png")
        return is_finished(path, target, self._words(), overlay=self.job.overlay)

    def _words(self) -> list[str]:
        """The vocabulary of the results."""
        from errseg.segmenter import background_included

        words = self._ready().vocabulary
        assert words is not None
        return background_included(words.words) if self.job.call["background"] else words.words

    def _ready(self) -> Segmenter:
        if self.segmenter is None:
            raise self.problem or ErrSegError("no segmenter")
        return self.segmenter

    def _rows(self, task: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        from errseg.data.loader import in_order

        self._ready()
        paths, names = _names(task)
        rows: list[dict[str, Any]] = [{"path": path} for path in paths]
        workers = self.job.call["workers"]
        results = self._segment(_sources(task), rows)

        def finish(numbered: tuple[int, Segmentation]) -> dict[str, Any]:
            number, result = numbered
            result.source = paths[number]
            return self._finish(result, names[number])

        finished = in_order(finish, results, workers=workers, ahead=workers + 1)
        with closing(finished), closing(results):
            for (number, _), facts in finished:
                try:
                    rows[number] |= facts.result()
                except ErrSegError as error:
                    rows[number]["error"] = _line(rows[number]["path"], error)
        return rows

    def _segment(
        self, sources: list[Any], rows: list[dict[str, Any]]
    ) -> Generator[tuple[int, Segmentation], None, None]:
        """Each result with its number; what fails is marked in its row."""
        assert self.segmenter is not None
        number_of = {id(source): number for number, source in enumerate(sources)}

        def fail(source: Any, error: ErrSegError) -> None:
            row = rows[number_of[id(source)]]
            row["error"] = _line(row["path"], error)

        # Results come in order, and what failed before one of them has been told before it comes.
        left = iter(range(len(rows)))
        with closing(self.segmenter.stream(sources, on_error=fail, **self.job.call)) as results:
            for result in results:
                yield next(number for number in left if "error" not in rows[number]), result

    def _finish(self, result: Segmentation, name: str) -> dict[str, Any]:
        from errseg.data.labels import encode_labels
        from errseg.data.overlay import word_colors

        if self.job.out is not None and self.job.format == "png":
            written = result.save(Path(self.job.out, f"{name}.labels.png"), overlay=self.job.overlay)
            return {"file": str(written[0])}
        words = result.vocabulary
        return {
            "height": result.labels.shape[0],
            "width": result.labels.shape[1],
            "labels": encode_labels(result.labels, len(words), word_colors(words) if len(words) <= 255 else None),
            "areas": result.areas(),
        }


def row_schema() -> pyarrow.Schema:
    """path; height, width, labels (bytes of a PNG; of a TIFF beyond 65,535 words) and areas; or error."""
    import pyarrow as pa

    area = {"id": pa.int32(), "word": pa.string(), "pixels": pa.int64(), "fraction": pa.float64()}
    columns = {"path": pa.string(), "height": pa.int32(), "width": pa.int32(), "labels": pa.binary()}
    return pa.schema([*columns.items(), ("areas", pa.list_(pa.struct(list(area.items())))), ("error", pa.string())])


def written_schema() -> pyarrow.Schema:
    """path; file that holds its labels; error; what stopped it all; whether it was there already."""
    import pyarrow as pa

    return pa.schema([*((name, pa.string()) for name in ("path", "file", "error", "fatal")), ("kept", pa.bool_())])


def _open(job: Job) -> Segmenter:
    from errseg.segmenter import Segmenter
    from errseg.vocabulary import Vocabulary

    words = Vocabulary.load(job.vocabulary) if isinstance(job.vocabulary, str) else job.vocabulary
    segmenter = Segmenter(job.model, job.weights, device=job.device, **job.segmenter).optimize()
    segmenter.set_vocabulary(words, background=job.call["background"])
    return segmenter


def _sources(task: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Pictures for `Segmenter.stream`, each an object of its own."""
    if "image" in task:
        return list(task["image"])
    if "bytes" in task:
        return [io.BytesIO(data) for data in task["bytes"]]
    return [Path(str(path)) for path in task["path"]]


def _names(task: Mapping[str, Sequence[Any]]) -> tuple[list[str], list[str]]:
    """Paths of a task's pictures, and the names for what is made of them."""
    return [str(path) for path in task["path"]], [_output_name(str(n)) for n in task.get("output", task["path"])]


def _output_name(path: str) -> str:
    """The path below the folder of results, whatever it is."""
    parts = PurePath(path.split("://", 1)[-1]).parts
    return "/".join(part for part in parts if part not in ("/", "..")) or "picture"


def _line(path: str, error: ErrSegError) -> str:
    line = " ".join(str(error).split())
    return line if path in line else f"{path}: {line}"


def _write_parquet(rows: list[dict[str, Any]], folder: Path, words: list[str]) -> str:
    """Write a file whole, under a name of its pictures: a task that Ray repeats writes it again, not once more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from errseg.data.labels import replacing

    name = hashlib.sha256("\n".join(row["path"] for row in rows).encode()).hexdigest()[:24]
    target = folder / f"{name}.parquet"
    table = pa.Table.from_pylist(rows, schema=row_schema().with_metadata({_WORDS: _digest(words)}))
    with replacing(target) as temporary:
        pq.write_table(table, temporary)
    return str(target)


def _pictures_in(folder: Path, words: list[str]) -> set[str]:
    """Paths in a folder's Parquet files, but for those with an error; ErrSegError if they are not for these words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths: set[str] = set()
    for file in sorted(folder.glob("*.parquet")):
        try:
            table = pq.read_table(file, columns=["path", "error"])
        except (OSError, pa.ArrowException) as error:
            raise ErrSegError(f"{file}: unreadable ({' '.join(str(error).split()):.200}); delete it") from error
        if (table.schema.metadata or {}).get(_WORDS.encode()) != _digest(words).encode():
            raise ErrSegError(f"{file} holds label maps for other words: choose another folder")
        paths.update(row["path"] for row in table.to_pylist() if row["error"] is None)
    return paths


def _digest(words: list[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
