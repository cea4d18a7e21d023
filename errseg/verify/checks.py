"""Verdicts on one result: errors beside eager's, and labels and votes that may differ only where a tie is proven."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.testing.compare import error_budget, relative_error, rms_error

FACTOR = 2.0  # times eager's error
FLOAT64_TOLERANCE = 1e-11  # two orders of operations, both in float64
CANCELLED = 32  # roundings that may be left of what cancels exactly
MEASURES = {"max": relative_error, "rms": rms_error}


@dataclass(frozen=True)
class Check:
    """One compared quantity: its error and what is allowed, in the unit that `measure` names."""

    quantity: str  # "result", "labels", "grad x", ...
    measure: str  # "max", "rms", "float64", "absolute" (relative errors), "wrong" (a count)
    error: float
    allowed: float
    eager: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is a number within what is allowed."""
        return self.error <= self.allowed

    @property
    def severity(self) -> float:
        """The error as a share of what is allowed; infinite for NaN."""
        if math.isnan(self.error):
            return math.inf
        if self.allowed > 0:
            return self.error / self.allowed
        return 0.0 if self.error <= 0 else math.inf

    def __str__(self) -> str:
        if self.measure == "wrong":
            return f"{self.quantity}: {self.error:g} wrong{f' ({self.note})' if self.note else ''}"
        beside = "" if self.eager is None else f", eager {self.eager:.2g}"
        return f"{self.quantity} {self.measure} {self.error:.2g}{beside}{f' ({self.note})' if self.note else ''}"


def failed(quantity: str, note: str) -> Check:
    """A check that cannot pass."""
    return Check(quantity, "wrong", math.inf, 0.0, note=note)


def compare_form(quantity: str, result: object, expected: Tensor) -> Check | None:
    """What is wrong with the type, shape or dtype of a result, None when nothing is."""
    if not isinstance(result, Tensor):
        return failed(quantity, f"expected a tensor, got {type(result).__name__}")
    if result.shape != expected.shape or result.dtype != expected.dtype:
        wanted, got = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (expected, result))
        return failed(quantity, f"expected {wanted}, got {got}")
    return None


@dataclass(frozen=True)
class Leniency:
    """What another look allows beyond twice the error that eager happened to make on these very inputs.

    Eager's error is the largest of all draws. Where the candidate ran on them too, its typical error counts, but
    never less than half of what it made on the first.
    """

    eager: tuple[tuple[Tensor, Tensor], ...] = ()  # eager results and truths of further draws
    results: tuple[tuple[Tensor, Tensor], ...] = ()  # the candidate's
    kinks: Tensor | None = None  # by how much gates within rounding of their kink move each entry


def compare_errors(
    quantity: str,
    result: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    scale: float = 0.0,
    roundings: int = 1,
    leniency: Leniency | None = None,
) -> list[Check]:
    """Errors against float64, beside eager's in the same precision: at most twice, in the maximum and in the mean.

    Float64 results must agree with both. A truth that is zero throughout (empty or cancelling) is
    compared absolutely: with `scale`, the largest entry of its siblings, times the rounding of the dtype. An error
    of no more than `roundings` half units in the last place passes in any case.
    """
    if bad := compare_form(quantity, result, eager):
        return [bad]
    if truth.numel() == 0:
        return [Check(quantity, "absolute", 0.0, 0.0)]
    unit = torch.finfo(result.dtype).eps / 2
    largest = truth.abs().max().item()
    if largest <= 1e-12 * scale or largest == 0:
        size, other = (t.detach().double().abs().max().item() for t in (result, eager))
        other = other if math.isfinite(other) else 0.0
        return [Check(quantity, "absolute", size, max(FACTOR * other, CANCELLED * unit * scale), other)]
    if result.dtype == torch.float64:
        error = max(relative_error(result, truth), relative_error(result, eager))
        return [Check(quantity, "float64", error, FLOAT64_TOLERANCE)]
    leniency = leniency or Leniency()
    try:
        budget = error_budget(result, eager, truth)
    except AssertionError as error:
        return [failed(quantity, str(error))]
    mine = {"max": budget.candidate, "rms": budget.candidate_rms}
    beside = {"max": budget.eager, "rms": budget.eager_rms}
    if leniency.kinks is not None:
        excess = (result.double() - truth).abs().sub(leniency.kinks).clamp_min(0)
        mine = {name: measure(truth + excess, truth) for name, measure in MEASURES.items()}
    for name, measure in MEASURES.items():
        beside[name] = max([beside[name], *(measure(e, t) for e, t in leniency.eager)])
        others = [measure(r, t) for r, t in leniency.results]
        if others:
            mine[name] = max(median([mine[name], *others]), mine[name] / 2)
    return [Check(quantity, n, mine[n], max(FACTOR * beside[n], roundings * unit), beside[n]) for n in MEASURES]


def compare_exactly(quantity: str, result: Tensor, expected: Tensor) -> Check:
    """Integers that leave no room for rounding."""
    if bad := compare_form(quantity, result, expected):
        return bad
    wrong = (result != expected).sum().item()
    return Check(quantity, "wrong", wrong, 0.0, note=f"of {expected.numel()}")


# ---- votes


def unit_roundoff(dtype: torch.dtype) -> float:
    """Of the arithmetic that an op does for inputs of this dtype: float32 or better."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2


def compare_votes(votes: Tensor, images: Tensor, words: Tensor) -> Check:
    """Votes [B, T] against what rounding leaves open, given [B, D, H, W] and [T, D] in the dtype of the call."""
    lowest, highest, unsure = vote_bounds(images, words)
    if bad := compare_form("votes", votes, lowest):
        return bad
    pixels, total = images[0, 0].numel() if len(images) else 0, sum((100, 10, 1)[: len(words)])
    outside = ((votes < lowest) | (votes > highest)).sum().item()
    uncounted = (votes.sum(1) != total * pixels).sum().item()
    if unsure > 0.5 * pixels * len(images):
        return failed("votes", f"{unsure} of {pixels * len(images)} pixels are too close to prove anything")
    note = f"{unsure} pixels near a tie" + (f", {uncounted} images with votes missing" if uncounted else "")
    return Check("votes", "wrong", outside + uncounted, 0.0, note=note)


def vote_bounds(images: Tensor, words: Tensor) -> tuple[Tensor, Tensor, int]:
    """The fewest and the most votes [B, T] that float32-grade cosines can give, and how many pixels are unsure.

    A word is surely above another when its float64 cosine leads by more than the rounding bound, or when the two
    words are the same vector (or the pixel is zero) and its id is lower: equal arithmetic gives equal cosines.
    """
    unit = unit_roundoff(images.dtype)
    words64 = F.normalize(words.double(), dim=1, eps=1e-12)
    identity = _row_hash(words.double())
    lowest = torch.zeros(len(images), len(words), dtype=torch.int64, device=images.device)
    highest, unsure = lowest.clone(), 0
    chunk = max(1, (8 << 20) // max(1, len(words)))
    for image, low, high in zip(images.double().flatten(2), lowest, highest, strict=True):
        for pixels in image.T.split(chunk):
            unsure += _add_bounds(pixels, words64, identity, unit, low, high)
    return lowest, highest, unsure


def _row_hash(rows: Tensor) -> Tensor:
    """A 64-bit hash per row, the same wherever a row stands; wrapping integer sums are exact in any order."""
    generator = torch.Generator().manual_seed(7)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator).to(rows.device) | 1
    return ((rows + 0.0).contiguous().view(torch.int64) * factors).sum(1)


def _add_bounds(pixels: Tensor, words: Tensor, identity: Tensor, unit: float, low: Tensor, high: Tensor) -> int:
    """Add the votes of some pixels [P, D] to both bounds [T]; returns how many of them are unsure."""
    scores = pixels @ words.T  # [P, T]
    # Sums of D products err like sqrt(D) roundings; the two cosines of a comparison err both.
    bound = 2 * (math.sqrt(pixels.shape[1]) + 8) * unit * pixels.norm(dim=1, keepdim=True)
    ranks = min(3, scores.shape[1])
    reachable = scores >= scores.topk(ranks, dim=1).values[:, -1:] - bound
    count = int(reachable.sum(1).max())
    values, ids = scores.topk(count, dim=1)  # [P, M]
    ids, order = ids.sort(dim=1)
    values, same = values.gather(1, order), identity[ids]
    lead = values[:, :, None] - values[:, None, :]  # row minus column
    equal = (same[:, :, None] == same[:, None, :]) | ((lead == 0) & (bound == 0)[:, :, None])
    earlier = ids[:, :, None] < ids[:, None, :]
    above = torch.where(equal, earlier, lead > bound[:, :, None])  # row surely above column
    best, worst = above.sum(1), count - 1 - above.sum(2)
    weights = torch.tensor([100, 10, 1, *[0] * count], device=low.device)
    most, fewest = weights[best], weights[worst]
    low.scatter_add_(0, ids.flatten(), fewest.flatten())
    high.scatter_add_(0, ids.flatten(), most.flatten())
    return int((most != fewest).any(1).sum())


# ---- labels


def compare_labels(
    labels: Tensor, truth: Tensor, logits: Tensor, class_ids: Tensor, *, slack: float = 0.0, twins: bool = True
) -> Check:
    """Labels [B, H, W] against the float64 ones: a difference must be a tie that the logits [B, K, h, w] prove.

    `slack` is by how much the probabilities differ from those that made `truth`, when those were other logits. Of
    `twins`, classes whose logits are the same here, the lowest id must win; PyTorch's own bilinear does not keep
    that, as it rounds the last channels of a map differently.
    """
    if bad := compare_form("labels", labels, truth):
        return bad
    places = (labels != truth).nonzero()
    wrong = torch.zeros(0, dtype=torch.bool)
    for some in places.split(4096):
        wrong = torch.cat((wrong, ~_is_tie(some, labels, truth, logits, class_ids, slack, twins).cpu()))
    note = f"{len(places)} of {labels.numel()} differ"
    if wrong.any():
        first = places[int(wrong.nonzero()[0, 0])].tolist()
        at = tuple(first)
        note = f"first at {first}: {labels[at].item()} instead of {truth[at].item()}"
    return Check("labels", "wrong", wrong.sum().item(), 0.0, note=note)


def _is_tie(
    places: Tensor, labels: Tensor, truth: Tensor, logits: Tensor, class_ids: Tensor, slack: float, twins: bool
) -> Tensor:
    """Per place [N, 3]: whether the label is within rounding of the best and no equal class comes earlier."""
    image, row, column = places.unbind(1)
    ids = class_ids[image]  # [N, K]
    chosen, best = (ids == t[image, row, column, None] for t in (labels, truth))
    known = chosen.any(1)
    probability, error, corners = _at(places, logits, labels.shape[1:])
    one = chosen.int().argmax(1, keepdim=True)
    other = best.int().argmax(1, keepdim=True)
    margin = (probability.gather(1, other) - probability.gather(1, one))[:, 0]
    bound = (error.gather(1, one) + error.gather(1, other))[:, 0]
    tied = known & (margin <= bound + slack)
    if not twins:
        return tied
    same = (corners == corners.gather(1, one[..., None].expand(-1, -1, 4))).all(2)  # bitwise
    return tied & ~(same & (ids < labels[image, row, column, None])).any(1)


def _at(places: Tensor, logits: Tensor, size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 probabilities of all classes at some places [N, K], rounding bounds, and the four logits [N, K, 4]."""
    image, row, column = places.unbind(1)
    unit = unit_roundoff(logits.dtype)
    axes = [_taps(index, logits.shape[2 + axis], size[axis]) for axis, index in enumerate((row, column))]
    (rows, row_weights), (columns, column_weights) = axes
    grid = logits.double()[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [N, 4, 4, K]
    probabilities = grid.sigmoid()
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    probability = (probabilities * weights[..., None]).sum((1, 2))
    around = probabilities.flatten(1, 2)
    variation = around.amax(1) - around.amin(1)
    # Coordinates are rounded to about 3 units of the map's length, which moves the result by the local variation.
    error = unit * (8 * probability + 3 * (logits.shape[2] + logits.shape[3] + 2) * variation)
    # Beyond this float32's sigmoid is exactly 1 or 0.
    span = (-110.0, 18.0) if unit > 1e-10 else (-800.0, 40.0)
    return probability, error, grid[:, 1:3, 1:3].flatten(1, 2).clamp(*span).transpose(1, 2)


def _taps(index: Tensor, length: int, size: int) -> tuple[Tensor, Tensor]:
    """Four neighbours of an output position on an axis [N, 4], the inner two with the bilinear weights [N, 4]."""
    source = ((index.double() + 0.5) * (length / size) - 0.5).clamp_min(0)
    first = source.floor()
    share = source - first
    neighbours = first.long()[:, None] + torch.arange(-1, 3, device=index.device)
    zero = torch.zeros_like(share)
    return neighbours.clamp(0, length - 1), torch.stack((zero, 1 - share, share, zero), dim=1)
