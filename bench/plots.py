"""Curves from result rows: time and memory against T, K, B and the size of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errseg.bench.rows import OK, Row
from errseg.errors import ErrSegError

AXES = {
    "words": "words in the vocabulary, T",
    "classes": "selected classes, K",
    "batch": "images per call, B",
    "size": "side of the image, pixels",
}
COLORS = {
    "published": "#444444",
    "reference": "#1f77b4",
    "cpu": "#d62728",
    "cuda": "#2ca02c",
    "triton": "#9467bd",
    "eager": "#ff7f0e",
    "matmul+topk": "#ff7f0e",
    "official": "#8c564b",
    "default": "#e377c2",
}
MARKERS = {"published": "s", "reference": "o", "cpu": "D", "cuda": "D", "triton": "^", "official": "v"}


@dataclass(frozen=True)
class Curve:
    """One figure: the rows of one target, pass and precision in which only `axis` varies."""

    target: str
    passing: str
    precision: str
    device: str
    axis: str
    rows: tuple[Row, ...]

    @property
    def points(self) -> list[int]:
        """Where it was measured."""
        return sorted({getattr(row.size, self.axis) for row in self.rows})


def find_curves(rows: Sequence[Row]) -> list[Curve]:
    """Every family of measured rows with at least two points on an axis; the largest per axis and target."""
    measured = [row for row in rows if row.status == OK]
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in measured:
        for axis in AXES:
            here: dict[str, Any] = {axis: 32 if axis == "size" else 1}
            rest = replace(row.size, process_memory=False, **here)
            key = (row.target, row.passing, row.precision, row.tf32, row.device, axis, rest)
            families.setdefault(key, []).append(row)
    largest: dict[tuple[Any, ...], Curve] = {}
    for (target, passing, precision, tf32, device, axis, _), members in families.items():
        name = f"{precision}{'-tf32' if tf32 else ''}"
        curve = Curve(target, passing, name, device, axis, tuple(members))
        figure = (target, passing, name, device, axis)
        if len(curve.points) >= 2 and len(curve.points) > len(largest[figure].points if figure in largest else []):
            largest[figure] = curve
    return list(largest.values())


def draw_plots(rows: Sequence[Row], folder: Path, machine: str) -> list[Path]:
    """One PNG per curve and quantity in `folder`; raises ErrSegError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ErrSegError("plots need matplotlib: pip install 'errseg[bench]'") from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for curve in find_curves(rows):
        paths.append(_draw(curve, folder, machine, "time"))
        if curve.axis in ("words", "classes", "batch") and any(row.peak_bytes for row in curve.rows):
            paths.append(_draw(curve, folder, machine, "memory"))
    return paths


def _draw(curve: Curve, folder: Path, machine: str, quantity: str) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    for provider in dict.fromkeys(row.provider for row in curve.rows):
        own = sorted((r for r in curve.rows if r.provider == provider), key=lambda r: getattr(r.size, curve.axis))
        _line(axes, provider, own, curve.axis, quantity)
    if quantity == "time":
        _roofline(axes, curve)
    _style(axes, curve, quantity)
    axes.set_title(_title(curve, machine), loc="left", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    name = f"{curve.target}-{curve.passing}-{quantity}-over-{curve.axis}-{curve.precision}-{curve.device}.png"
    figure.savefig(folder / name, dpi=150)
    pyplot.close(figure)
    return folder / name


def _line(axes: Any, provider: str, rows: Sequence[Row], axis: str, quantity: str) -> None:
    """Medians with quartiles, or memory; compiled variants dashed in their eager one's colour."""
    base = provider.removesuffix("+compile").removesuffix("+graph")
    style = {
        "label": provider,
        "color": COLORS.get(base, "#17becf"),
        "marker": MARKERS.get(base, "o"),
        "markersize": 4,
        "linestyle": "-" if base == provider else "--",
        "markerfacecolor": None if base == provider else "white",
    }
    if quantity == "memory":
        rows = [row for row in rows if row.peak_bytes]
        if rows:
            axes.plot([getattr(r.size, axis) for r in rows], [(r.peak_bytes or 0) / 2**20 for r in rows], **style)
        return
    x = [getattr(row.size, axis) for row in rows]
    median = [row.median_ms or 0.0 for row in rows]
    below = [m - (row.q1_ms or m) for m, row in zip(median, rows, strict=True)]
    above = [(row.q3_ms or m) - m for m, row in zip(median, rows, strict=True)]
    axes.errorbar(x, median, yerr=[below, above], capsize=2, linewidth=1.5, **style)


def _roofline(axes: Any, curve: Curve) -> None:
    floors = {getattr(row.size, curve.axis): row.floor_ms for row in curve.rows if row.floor_ms}
    if floors:
        x = sorted(floors)
        axes.plot(x, [floors[at] for at in x], color="black", linestyle=":", linewidth=1, label="roofline")


def _style(axes: Any, curve: Curve, quantity: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_yscale("log")
    if curve.points[-1] >= 4 * curve.points[0]:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_ticks(curve.points)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel(AXES[curve.axis])
    axes.set_ylabel("time, ms (median, bars: quartiles)" if quantity == "time" else "peak extra memory, MiB")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(points: Sequence[int]) -> list[int]:
    """The measured points, without those whose labels would overlap on a logarithmic axis."""
    kept: list[int] = []
    ratio = (points[-1] / points[0]) ** (1 / 12)
    for point in points:
        if not kept or point >= kept[-1] * ratio:
            kept.append(point)
    return kept


def _title(curve: Curve, machine: str) -> str:
    size = max((row.size for row in curve.rows), key=lambda size: size.kept)
    fixed = {"batch": f"B = {size.batch}", "classes": f"K = {size.kept}", "words": f"T = {size.words}"}
    fixed["size"] = f"{size.size} px"
    kept = ", ".join(text for axis, text in fixed.items() if axis != curve.axis)
    return f"{curve.target}, {curve.passing}, {curve.precision}, widths of {size.model}, {kept}\n{machine}"
