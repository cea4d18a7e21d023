"""Labelled sets: the benchmarks in the layouts of the published code bases, and one's own folders."""

from errseg.data.datasets.benchmarks import BENCHMARKS, Benchmark, Source, Split, datasets_root, find_benchmark
from errseg.data.datasets.labelled import LabelledSet, Pair, open_benchmark, open_data, open_folder

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "LabelledSet",
    "Pair",
    "Source",
    "Split",
    "datasets_root",
    "find_benchmark",
    "open_benchmark",
    "open_data",
    "open_folder",
]
