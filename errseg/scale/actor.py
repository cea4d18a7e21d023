"""What a Ray actor does: one Segmenter, and task after task of pictures through it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from errseg.errors import ErrSegError

if TYPE_CHECKING:
    import pyarrow

    from errseg.segmentation import Segmentation
    from errseg.segmenter import Segmenter
    from errseg.vocabulary import Vocabulary

FORMATS = ("parquet", "png")


@dataclass(frozen=True)
class Job:
    """What to do with pictures, in a form that travels.

    model, weights, vocabulary (or its file), device: as in `Segmenter`; `segmenter` holds its other settings, `call`
    those of `Segmenter.stream`. Without `out` the label maps are handed on; otherwise they are written there, in
    `format`.
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


class PictureActor:
    """Segments the pictures of a task; a picture that fails is a row with its error."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.segmenter: Segmenter | None = None
        self.problem: ErrSegError | None = None
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

        try:
            rows = self._rows(task)
            if self.job.out is None:
                return pa.Table.from_pylist(rows, schema=row_schema())
            if self.job.format == "parquet":
                file = _write_parquet(rows, Path(self.job.out))
                rows = [{"file": file, **row} for row in rows]
        except ErrSegError as error:
            if self.job.out is None:
                raise
            rows = [{"path": None, "file": None, "error": None, "fatal": str(error)}]
        return pa.Table.from_pylist(rows, schema=written_schema())

    def _rows(self, task: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        from errseg.data.loader import in_order

        if self.segmenter is None:
            raise self.problem or ErrSegError("no segmenter")
        rows: list[dict[str, Any]] = [{"path": str(path)} for path in task["path"]]
        names = [_output_name(str(name)) for name in task.get("output", task["path"])]
        workers = self.job.call["workers"]
        results = self._segment(_sources(task), rows)

        def finish(numbered: tuple[int, Segmentation]) -> dict[str, Any]:
            return self._finish(numbered[1], names[numbered[0]])

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
    """path; file that holds its labels; error; what stopped it all."""
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in ("path", "file", "error", "fatal")])


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


def _output_name(path: str) -> str:
    """The path below the folder of results, whatever it is."""
    parts = PurePath(path.split("://", 1)[-1]).parts
    return "/".join(part for part in parts if part not in ("/", "..")) or "picture"


def _line(path: str, error: ErrSegError) -> str:
    line = " ".join(str(error).split())
    return line if path in line else f"{path}: {line}"


def _write_parquet(rows: list[dict[str, Any]], folder: Path) -> str:
    """Write a file whole, under a name of its pictures: a task that Ray repeats writes it again, not once more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from errseg.data.labels import replacing

    name = hashlib.sha256("\n".join(row["path"] for row in rows).encode()).hexdigest()[:24]
    target = folder / f"{name}.parquet"
    with replacing(target) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=row_schema()), temporary)
    return str(target)
