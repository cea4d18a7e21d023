"""`errseg vocab`: text embeddings of many words, made once and kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from errseg.errors import ErrSegError

app = typer.Typer(help="Text embeddings of many words, made once and kept in a file.")


@app.callback()
def options() -> None:
    pass


@app.command()
def build(
    words: Annotated[
        Path,
        typer.Argument(metavar="WORDS", help="One class a line, commas between synonyms, UTF-8.", show_default=False),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file; by default WORDS with the suffix .safetensors.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="errseg-b, errseg-l, or errseg-tiny (a toy world).")] = "errseg-b",
    weights: Annotated[
        str | None, typer.Option(help="Checkpoint or Hugging Face user/repo; errseg-tiny brings its own.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A sentence with {} for the word.")] = None,
    synonyms: Annotated[str, typer.Option(help="first (the published rule) or mean.")] = "first",
    dtype: Annotated[str, typer.Option(help="Of the file: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
) -> None:
    """Encode the words of a file once, for `errseg segment --vocabulary`.

    The file is memory-mapped when it is used, and refused with another model, other weights or another prompt. Until
    it is complete, OUT.partial holds what is done: the same command goes on from there.
    """
    import time

    from rich.console import Console

    from errseg.cli.progress import format_rate, format_seconds, show_progress
    from errseg.cli.segment import build_segmenter
    from errseg.settings import DTYPES
    from errseg.vocabulary import Vocabulary, iterate_words

    if dtype not in DTYPES:
        raise ErrSegError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    target = words.with_suffix(".safetensors") if out is None else out
    if target.suffix != ".safetensors" or target == words:
        raise ErrSegError(f"cannot write {target}: a vocabulary is a .safetensors file")
    vocabulary = Vocabulary(iterate_words(words), synonyms=synonyms)
    segmenter = build_segmenter(model, weights, dtype="float32", device=device, prompt=prompt)
    first: list[int] = []
    start = time.perf_counter()
    with show_progress(Console(stderr=True), "words", lines=True) as report:

        def advance(done: int, total: int) -> None:
            first.append(done) if not first else None
            report(done, total)

        try:
            built = segmenter.build_vocabulary(vocabulary, target, dtype=DTYPES[dtype], progress=advance)
        except KeyboardInterrupt:
            typer.echo(f"whole blocks of words are kept in {target}.partial: the same command goes on", err=True)
            raise
    seconds = time.perf_counter() - start
    before = f", {first[0]:,} of them before" if first[0] else ""
    rate = f", {format_rate((len(built) - first[0]) / seconds)} words/s" if first[0] < len(built) else ""
    size = target.stat().st_size
    typer.echo(f"{len(built):,} words in {target}, {size / 1e6:,.1f} MB{before} ({format_seconds(seconds)}{rate})")
