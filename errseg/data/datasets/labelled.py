"""Labelled pictures ready for evaluation or training: a benchmark's split, or one's own folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from errseg.data.datasets.benchmarks import Benchmark, datasets_root, find_benchmark
from errseg.data.datasets.index_maps import check_range, label_values, read_index_map
from errseg.data.images import SUFFIXES
from errseg.errors import ErrSegError

if TYPE_CHECKING:
    from errseg.configs.schema import DataSettings

OWN_LABEL_SUFFIXES = (".png", ".tif", ".tiff")


class Pair(NamedTuple):
    """A picture and its label map, which share `stem`."""

    stem: str
    image: Path
    label: Path


@dataclass(frozen=True)
class LabelledSet:
    """Pictures with label maps of class indices.

    `words` are offered to the model; word i counts as class `class_of_word[i]`, which indexes `classes`.
    """

    name: str
    pairs: tuple[Pair, ...]
    words: tuple[str, ...]
    classes: tuple[str, ...]
    class_of_word: tuple[int, ...]
    ignore: int | None  # None: the largest value of each file's own type

    def __len__(self) -> int:
        return len(self.pairs)

    def labels(self, pair: Pair) -> NDArray[np.int64]:
        """Classes [H, W] of a pair, -1 where ignored.

        Raises:
            ErrSegError: naming the file, when it cannot be read or holds another value.
        """
        stored = read_index_map(pair.label)
        ignore = self.ignore_of(stored)
        check_range(label_values(stored), len(self.classes), ignore, pair.label)
        labels = stored.astype(np.int64)
        labels[labels == ignore] = -1
        return labels

    def ignore_of(self, stored: NDArray[Any]) -> int:
        """The ignored value of a label map of that type."""
        return int(np.iinfo(stored.dtype).max) if self.ignore is None else self.ignore


def list_files(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """Files of a folder (not below it) with one of those suffixes, by stem, sorted; {} without the folder.

    The stem is the name up to the suffix. Hidden files are passed over.

    Raises:
        ErrSegError: the folder cannot be listed, or two of its files have one stem.
    """
    wanted = tuple(suffixes)
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ErrSegError(f"{folder}: cannot list it ({error.strerror or error})") from error
    files: dict[str, Path] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if name.startswith(".") or suffix.lower() not in wanted:
            continue
        if stem in files:
            raise ErrSegError(
                f"{files[stem]} and {folder / name} have one name but for the suffix: rename or remove one"
            )
        files[stem] = folder / name
    return files


def match(images: dict[str, Path], labels: dict[str, Path]) -> tuple[Pair, ...]:
    """Pairs of equal stems, sorted; what has no partner is left out, as the published loaders do."""
    return tuple(Pair(stem, images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys()))


def open_benchmark(
    name: str | Benchmark, root: str | os.PathLike[str] | None = None, split: str = "val"
) -> LabelledSet:
    """A prepared split of a benchmark below `root` (see `datasets_root`).

    Raises:
        ErrSegError: unknown set or split, or no pair of picture and label.
    """
    benchmark = find_benchmark(name) if isinstance(name, str) else name
    part, base = benchmark.split(split), datasets_root(root)
    images = list_files(base / part.images, [part.image_suffix])
    labels = list_files(base / part.labels, [part.label_suffix])
    pairs = match(images, labels)
    if not pairs:
        lacking = base / (part.images if not images else part.labels)
        raise ErrSegError(
            f"{benchmark.name}: no labelled pictures, nothing fits in {lacking}: "
            f"run `errseg data verify {benchmark.name} {base}`"
        )
    return LabelledSet(
        benchmark.name, pairs, benchmark.words, benchmark.classes, benchmark.class_of_word, benchmark.ignore
    )


def open_folder(folder: str | os.PathLike[str]) -> LabelledSet:
    """One's own data: `images/`, `labels/` (index PNG or TIFF of the same stems), `classes.txt`.

    One class a line in classes.txt, commas between synonyms; the largest value of a label file's type (255,
    65535) is ignored.

    Raises:
        ErrSegError: something is missing, an image has no label or the other way round.
    """
    from errseg.vocabulary import Vocabulary, read_words

    base = Path(folder)
    if not base.is_dir():
        raise ErrSegError(f"{base}: no such folder")
    names = Vocabulary(read_words(base / "classes.txt")).synonyms
    images = list_files(base / "images", SUFFIXES)
    labels = list_files(base / "labels", OWN_LABEL_SUFFIXES)
    for what, files in (("images", images), ("labels", labels)):
        if not files:
            raise ErrSegError(f"{base / what}: no files there; own data is images/, labels/ and classes.txt")
    alone = sorted(images.keys() ^ labels.keys())
    if alone:
        file = images.get(alone[0]) or labels[alone[0]]
        other = "label" if alone[0] in images else "image"
        raise ErrSegError(f"{file}: has no {other} ({len(alone)} such files)")
    words = tuple(", ".join(synonyms) for synonyms in names)
    return LabelledSet(str(base), match(images, labels), words, words, tuple(range(len(words))), None)


def open_data(settings: DataSettings) -> LabelledSet:
    """The set that a configuration names; ErrSegError if it names none or two."""
    if (settings.set is None) == (settings.folder is None):
        raise ErrSegError("data: give either set (a benchmark) or folder (images/, labels/, classes.txt)")
    if settings.folder is not None:
        return open_folder(settings.folder)
    assert settings.set is not None
    return open_benchmark(settings.set, settings.root, settings.split)
