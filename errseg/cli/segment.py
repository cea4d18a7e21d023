"""`errseg segment`: label maps, overlays and areas of pictures, by words."""

from __future__ import annotations

from itertools import chain
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
    vocabulary: Annotated[Path | None, typer.Option(help="A file of `errseg vocab build`, instead of words.")] = None,
    model: Annotated[str, typer.Option(help="errseg-b, errseg-l, or errseg-tiny (a toy world).")] = "errseg-b",
    weights: Annotated[
        str | None, typer.Option(help="Checkpoint or Hugging Face user/repo; errseg-tiny brings its own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("errseg-out"),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one, under torchrun each its own.")
    ] = None,
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
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Leave pictures whose results for these words OUT has; other settings are not compared."
        ),
    ] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Print the seconds of each stage.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object a line: each picture, as it is done, then the sums.")
    ] = False,
) -> None:
    """Segment pictures into words: for each a label map, an overlay and a JSON of areas.

    PICTURE.labels.png is a palette PNG up to 255 words, 16 bit up to 65,535, a 32-bit TIFF beyond; unknown is the
    largest value of the type. A picture that cannot be read is reported and the rest goes on; the exit code is
    then 2. Under `torchrun --nproc-per-node N -m errseg segment IMAGES...` N processes share the pictures.
    """
    import logging

    from errseg.cli.segment_jobs import Jobs
    from errseg.data.images import find_images
    from errseg.scale.processes import joined
    from errseg.settings import check_options

    # Pillow logs oddities of damaged files; here each failure is one line.
    logging.getLogger("PIL").addHandler(logging.NullHandler())

    def prepare() -> tuple[list[ImageFile], Jobs]:
        files = find_images(images) if processes.rank == 0 else []  # the first's list counts
        check_options(threshold, protocol, batch_size, workers)
        wanted = _collect_words(words, words_file, vocabulary, synonyms)
        options: dict[str, Any] = {
            "background": [] if background is None else _plain_words(background),
            "threshold": threshold,
            "protocol": protocol,
            "timings": timings,
            "batch_size": batch_size,
        }
        place = processes.device(device)
        segmenter = build_segmenter(
            model, weights, device=place, dtype=dtype, size=size, prompt=prompt, num_selected=num_selected
        ).optimize()
        jobs = Jobs(segmenter, out, overlay, as_json, workers, options, processes)
        jobs.offer(wanted)
        return jobs.unfinished(files, wanted) if resume else files, jobs

    with joined() as processes:
        files, jobs = processes.all_or_none(prepare)
        try:
            jobs.run(processes.share(processes.agree(files)))
        except BaseException:  # an interrupted run tells what it did, too
            jobs.report()
            raise
        jobs.add_up()
        if processes.rank == 0:
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
