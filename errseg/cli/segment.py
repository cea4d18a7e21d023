"""`errseg segment`: label maps, overlays and areas of pictures, by words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errseg.errors import ErrSegError

if TYPE_CHECKING:
    from errseg.data.images import ImageFile
    from errseg.segmenter import Segmenter
    from errseg.vocabulary import Vocabulary


def segment(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...", help="Pictures, folders (searched recursively) and globs.", show_default=False
        ),
    ],
    words: Annotated[
        str | None, typer.Option(help='Commas between words, bars between synonyms: "cat, sofa|couch".')
    ] = None,
    words_file: Annotated[Path | None, typer.Option(help="One class a line, commas between synonyms, UTF-8.")] = None,
    vocabulary: Annotated[Path | None, typer.Option(help="A saved errseg.Vocabulary, instead of words.")] = None,
    model: Annotated[str, typer.Option(help="errseg-b, errseg-l, or errseg-tiny (a toy world).")] = "errseg-b",
    weights: Annotated[
        str | None, typer.Option(help="Checkpoint or Hugging Face user/repo; errseg-tiny brings its own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("errseg-out"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    size: Annotated[int | None, typer.Option(help="Side of the model's input, a multiple of 32.")] = None,
    num_selected: Annotated[
        int | None, typer.Option(help="Words kept per picture (K); by the number of words.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A sentence with {} for the word.")] = None,
    synonyms: Annotated[str, typer.Option(help="first (the published rule) or mean.")] = "first",
    background: Annotated[str | None, typer.Option(help='Words whose pixels become "background", with commas.')] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Pixels with a lower probability (0 to 1) become unknown.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help='"published" resizes the shortest edge to 800 first, as the benchmarks do.')
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures at once; 4 on a GPU, else 1.")] = None,
    overlay: Annotated[bool, typer.Option(help="Write overlays with names too.")] = True,
    timings: Annotated[bool, typer.Option("--timings", help="Print the seconds of each stage.")] = False,
) -> None:
    """Segment pictures into words: for each a label map, an overlay and a JSON of areas.

    PICTURE.labels.png is a palette PNG up to 255 words, 16 bit up to 65,535, a 32-bit TIFF beyond; unknown is the
    largest value of the type. A picture that cannot be read is reported and the rest goes on; the exit code is
    then 2.
    """
    import logging

    from errseg.data.images import find_images
    from errseg.segmenter import check_options

    # Pillow logs oddities of damaged files; here each failure is one line.
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    files = find_images(images)
    check_options(threshold, protocol, batch_size)
    wanted = _collect_words(words, words_file, vocabulary, synonyms)
    ignored = [] if background is None else _plain_words(background)
    segmenter = _build(model, weights, device=device, dtype=dtype, size=size, prompt=prompt, k=num_selected)
    options = {
        "background": ignored,
        "threshold": threshold,
        "protocol": protocol,
        "timings": timings,
    }
    jobs = _Jobs(segmenter, out, batch_size or segmenter.default_batch_size, overlay, options)
    jobs.run(files, wanted)
    jobs.report()
    if jobs.failed:
        raise typer.Exit(2)


def _collect_words(words: str | None, words_file: Path | None, saved: Path | None, synonyms: str) -> Vocabulary:
    from errseg.vocabulary import Vocabulary, parse_words, read_words

    if saved is not None:
        if words is not None or words_file is not None:
            raise ErrSegError("--vocabulary stands for --words and --words-file: give one or the other")
        return Vocabulary.load(saved)
    if words is None and words_file is None:
        raise ErrSegError('no words to look for: give --words "cat, sofa" or --words-file FILE')
    entries = [] if words is None else parse_words(words)
    entries += [] if words_file is None else read_words(words_file)
    return Vocabulary(entries, synonyms=synonyms)


def _plain_words(text: str) -> list[str]:
    from errseg.vocabulary import Vocabulary, parse_words

    return Vocabulary(parse_words(text)).words


def _build(model: str, weights: str | None, *, dtype: str, k: int | None, **settings: Any) -> Segmenter:
    from errseg.segmenter import DTYPES, PUBLISHED_WEIGHTS, Segmenter

    if dtype not in DTYPES:
        raise ErrSegError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if weights is None and model in ("errseg-b", "errseg-l"):
        raise ErrSegError(
            f"{model} needs --weights: a checkpoint file, or the published ones at Hugging Face "
            f"({PUBLISHED_WEIGHTS}, MIT licence); only errseg-tiny, a toy world, brings its own"
        )
    return Segmenter(model, weights, dtype=DTYPES[dtype], num_selected=k, **settings)


class _Jobs:
    """Pictures by the batch, each failure one line on stderr."""

    def __init__(
        self, segmenter: Segmenter, out: Path, batch_size: int, overlay: bool, options: dict[str, Any]
    ) -> None:
        from rich.console import Console

        self.segmenter, self.out, self.batch_size = segmenter, out, batch_size
        self.overlay, self.options = overlay, options
        self.console = Console(stderr=True)
        self.done = self.failed = 0
        self.seconds: dict[str, float] = {}

    def run(self, files: list[ImageFile], words: Vocabulary) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            encoding = progress.add_task("words", total=len(words))
            self.segmenter.set_vocabulary(
                words,
                background=self.options["background"],
                progress=lambda done, total: progress.update(encoding, completed=done, total=total),
            )
            progress.update(encoding, completed=1, total=1, visible=False)
            pictures = progress.add_task("pictures", total=len(files))
            for batch in _batches(files, self.batch_size):
                self._segment(batch)
                progress.advance(pictures, len(batch))

    def _segment(self, batch: list[ImageFile]) -> None:
        """Read a batch, segment what could be read, save it."""
        import time

        from errseg.data.images import read_image

        start = time.perf_counter()
        read: list[tuple[ImageFile, Any]] = []
        for file in batch:
            try:
                read.append((file, read_image(file.path)))
            except ErrSegError as error:
                self._fail(str(error))
        self._add("read", time.perf_counter() - start)
        if not read:
            return
        try:
            results = self.segmenter([image for _, image in read], batch_size=len(read), **self.options)
        except ErrSegError as error:
            for file, _ in read:
                self._fail(f"{file.path}: {error}")
            return
        start = time.perf_counter()
        for (file, _), result in zip(read, results, strict=True):
            result.source = str(file.path)
            for stage, seconds in (result.timings or {}).items():
                self._add(stage, seconds)
            try:
                result.save(self.out / f"{file.output}.labels.png", overlay=self.overlay)
                self.done += 1
            except ErrSegError as error:
                self._fail(f"{file.path}: {error}")
        self._add("save", time.perf_counter() - start)

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def _fail(self, line: str) -> None:
        self.failed += 1
        text = f"error: {' '.join(line.split())}"
        self.console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)

    def report(self) -> None:
        """What was done, on stdout."""
        from rich.console import Console
        from rich.table import Table

        if self.options["timings"]:
            table = Table("stage", "seconds", "per picture", title="timings", title_justify="left")
            for stage, seconds in self.seconds.items():
                table.add_row(stage, f"{seconds:.3f}", f"{seconds / max(1, self.done):.3f}")
            Console().print(table)
        failed = f", {self.failed} failed" if self.failed else ""
        typer.echo(f"{self.done} of {self.done + self.failed} pictures segmented into {self.out}{failed}")


def _batches(files: list[ImageFile], size: int) -> Iterator[list[ImageFile]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]
