"""`errseg segment`: label maps, overlays and areas of pictures, by words."""

from __future__ import annotations

import json
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errseg.errors import ErrSegError

if TYPE_CHECKING:
    from errseg.data.images import ImageFile
    from errseg.segmentation import Segmentation
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
    vocabulary: Annotated[Path | None, typer.Option(help="A file of `errseg vocab build`, instead of words.")] = None,
    model: Annotated[str, typer.Option(help="errseg-b, errseg-l, or errseg-tiny (a toy world).")] = "errseg-b",
    weights: Annotated[
        str | None, typer.Option(help="Checkpoint or Hugging Face user/repo; errseg-tiny brings its own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("errseg-out"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default bfloat16 on GPUs that have it.")
    ] = None,
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
    workers: Annotated[
        int | None, typer.Option(help="Threads that read and that save pictures; one per core, at most 16.")
    ] = None,
    overlay: Annotated[bool, typer.Option(help="Write overlays with names too.")] = True,
    timings: Annotated[bool, typer.Option("--timings", help="Print the seconds of each stage.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object a line: each picture, as it is done, then the sums.")
    ] = False,
) -> None:
    """Segment pictures into words: for each a label map, an overlay and a JSON of areas.

    PICTURE.labels.png is a palette PNG up to 255 words, 16 bit up to 65,535, a 32-bit TIFF beyond; unknown is the
    largest value of the type. A picture that cannot be read is reported and the rest goes on; the exit code is
    then 2.
    """
    import logging

    from errseg.data.images import find_images
    from errseg.data.loader import default_workers
    from errseg.settings import check_options

    # Pillow logs oddities of damaged files; here each failure is one line.
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    files = find_images(images)
    check_options(threshold, protocol, batch_size, workers)
    wanted = _collect_words(words, words_file, vocabulary, synonyms)
    ignored = [] if background is None else _plain_words(background)
    segmenter = build_segmenter(
        model, weights, device=device, dtype=dtype, size=size, prompt=prompt, num_selected=num_selected
    ).optimize()
    options = {
        "background": ignored,
        "threshold": threshold,
        "protocol": protocol,
        "timings": timings,
        "batch_size": batch_size,
    }
    jobs = _Jobs(segmenter, out, overlay, as_json, default_workers() if workers is None else workers, options)
    try:
        jobs.run(files, wanted)
    finally:  # of an interrupted run too
        jobs.report()
    if jobs.failed:
        raise typer.Exit(2)


def _collect_words(words: str | None, words_file: Path | None, saved: Path | None, synonyms: str) -> Vocabulary:
    from errseg.vocabulary import Vocabulary, iterate_words, parse_words

    if saved is not None:
        if words is not None or words_file is not None:
            raise ErrSegError("--vocabulary stands for --words and --words-file: give one or the other")
        return Vocabulary.load(saved)
    if words is None and words_file is None:
        raise ErrSegError('no words to look for: give --words "cat, sofa" or --words-file FILE')
    typed = [] if words is None else parse_words(words)
    return Vocabulary(chain(typed, [] if words_file is None else iterate_words(words_file)), synonyms=synonyms)


def _plain_words(text: str) -> list[str]:
    from errseg.vocabulary import Vocabulary, parse_words

    return Vocabulary(parse_words(text)).words


def build_segmenter(model: str, weights: str | None, *, dtype: str | None = None, **settings: Any) -> Segmenter:
    """A Segmenter by the options of a command line; a model without its weights is an error."""
    from errseg.segmenter import Segmenter
    from errseg.settings import DTYPES, PUBLISHED_WEIGHTS

    if dtype is not None and dtype not in DTYPES:
        raise ErrSegError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if weights is None and model in ("errseg-b", "errseg-l"):
        raise ErrSegError(
            f"{model} needs --weights: a checkpoint file, or the published ones at Hugging Face "
            f"({PUBLISHED_WEIGHTS}, MIT licence); only errseg-tiny, a toy world, brings its own"
        )
    return Segmenter(model, weights, dtype=None if dtype is None else DTYPES[dtype], **settings)


class _Jobs:
    """Pictures read, segmented and saved side by side; each failure is one line on stderr."""

    def __init__(
        self,
        segmenter: Segmenter,
        out: Path,
        overlay: bool,
        as_json: bool,
        workers: int,
        options: dict[str, Any],
    ) -> None:
        from rich.console import Console

        self.segmenter, self.out, self.overlay, self.as_json = segmenter, out, overlay, as_json
        self.workers, self.options = workers, options
        self.console = Console(stderr=True)
        self.done = self.failed = 0
        self.started: float | None = None
        self.seconds: dict[str, float] = {}

    def run(self, files: list[ImageFile], words: Vocabulary) -> None:
        from contextlib import closing

        from errseg.cli.progress import show_progress
        from errseg.data.loader import in_order

        with show_progress(self.console, "words") as report:
            self.segmenter.set_vocabulary(words, background=self.options["background"], progress=report)
        self.started = time.perf_counter()
        self.outputs = {str(file.path): file.output for file in files}
        paths = (str(file.path) for file in files)
        results = self.segmenter.stream(paths, workers=self.workers, on_error=self._fail, **self.options)
        # Saving costs as much as reading: overlays are drawn and compressed while the next pictures are segmented.
        saving = in_order(self._save, results, workers=self.workers, ahead=self.workers + 1)
        with show_progress(self.console, "pictures") as report, closing(saving), closing(results):
            for result, saved in saving:
                try:
                    self._add(result, *saved.result())
                except ErrSegError as error:
                    self._fail(result.source, error)
                report(self.done + self.failed, len(files))

    def _save(self, result: Segmentation) -> tuple[list[Path], float]:
        start = time.perf_counter()
        target = self.out / f"{self.outputs[str(result.source)]}.labels.png"
        return result.save(target, overlay=self.overlay), time.perf_counter() - start

    def _add(self, result: Segmentation, paths: list[Path], seconds: float) -> None:
        self.done += 1
        for stage, spent in ((result.timings or {}) | {"save": seconds}).items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        if self.as_json:
            _print_json({"image": result.source, "files": [str(path) for path in paths], "areas": result.areas()})

    def _fail(self, source: Any, error: ErrSegError) -> None:
        self.failed += 1
        line = " ".join(str(error).split())
        text = f"error: {line}" if str(source) in line else f"error: {source}: {line}"
        self.console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        if self.as_json:
            _print_json({"image": str(source), "error": line})

    def report(self) -> None:
        """What was done, on stdout."""
        if self.started is None:
            return
        elapsed = time.perf_counter() - self.started
        rate = self.done / elapsed
        if self.as_json:
            sums: dict[str, Any] = {"pictures": self.done, "failed": self.failed, "out": str(self.out)}
            sums |= {"seconds": round(elapsed, 3), "images_per_second": round(rate, 3)}
            _print_json(sums | ({"timings": self.seconds} if self.options["timings"] else {}))
            return
        if self.options["timings"]:
            self._print_timings()
        failed = f", {self.failed} failed" if self.failed else ""
        speed = f"{elapsed:.3g} s, {rate:.3g} images/s"
        typer.echo(f"{self.done} of {self.done + self.failed} pictures segmented into {self.out}{failed} ({speed})")

    def _print_timings(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("stage", "seconds", "per picture", title="timings", title_justify="left")
        for stage, seconds in self.seconds.items():
            table.add_row(stage, f"{seconds:.3f}", f"{seconds / max(1, self.done):.3f}")
        Console().print(table)


def _print_json(facts: dict[str, Any]) -> None:
    # File names need not be valid text: what is not becomes a JSON escape.
    typer.echo(json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace"))
