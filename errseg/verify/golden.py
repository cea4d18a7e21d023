"""The model against golden numbers: what the published code answered in float64 on small inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import errseg
from errseg import ops
from errseg.errors import ErrSegError
from errseg.ops.contract import INTERPRETED
from errseg.testing.compare import relative_error
from errseg.testing.published_decoder import PublishedDecoder, published_loss
from errseg.verify.checks import FACTOR, Check, compare_errors, compare_exactly, failed
from errseg.verify.room import elsewhere
from errseg.verify.rows import Row, dtype_name

INPUTS = ("os4", "os8", "os16", "os32", "feat_os16", "feat_os32")
EVALUATIONS = ("eval_small_io", "eval_nonsquare", "eval_odd")
SELECTIONS = ("a", "few", "tiny", "two")
VANISHING = ("attention.k.bias", "norm_k.bias")  # zero gradients in exact arithmetic
STORED = 1.2e-7  # the fixtures are rounded to float32, except logits, loss and gradients of the training step
VISUAL = {"os16_dense": "os16_dense", "os32_dense": "clip_vis_dense"} | {f"os{n}": f"os{n}" for n in (4, 8, 16, 32)}
VISUAL_TOLERANCE = {torch.float64: (STORED, STORED), torch.float32: (1e-6, 4e-6)}  # outputs, gradients


def golden_folder() -> Path:
    """Where the golden numbers are: inside the installed package, or under tests/ in a checkout."""
    package = Path(errseg.__file__).parent
    folders = (package / "golden", package.parent / "tests" / "golden")
    for folder in folders:
        if (folder / "weights.safetensors").is_file():
            return folder
    raise ErrSegError(f"the golden numbers are missing: expected them in {' or '.join(map(str, folders))}")


@cache
def _load(name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(golden_folder() / f"{name}.safetensors")


def golden_tasks(backends: list[str], device: torch.device, quick: bool) -> list[tuple[str, Callable[[], list[Row]]]]:
    """One task per comparison; backends that some op of the decoder has and that run on this device."""
    tasks: list[tuple[str, Callable[[], list[Row]]]] = []
    for backend in backends:
        reasons = [op.why_not(backend) for op in ops.OPS.values() if backend in op.backends]
        interpreted = INTERPRETED in reasons
        away = not interpreted and elsewhere(backend, device) is not None
        if away or not any(reason in (None, INTERPRETED) for reason in reasons):
            continue
        # Quick and interpreted: one evaluation is enough to see every kernel inside the model.
        evaluations = EVALUATIONS[-1:] if quick and interpreted else EVALUATIONS
        calls: list[tuple[str, str, Callable[[], list[Check]]]] = []
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            if dtype == torch.float64 and backend != "reference":
                continue
            name = dtype_name(dtype)
            calls += [(name, case, partial(_evaluation, case, dtype, device)) for case in evaluations]
            if dtype != torch.bfloat16:
                calls.append((name, "loss and label map", partial(_loss_and_post, dtype, device)))
                if not (quick and interpreted):
                    calls.append((name, "training step", partial(_training, dtype, device)))
            if dtype != torch.bfloat16 and backend == "reference":
                calls += [(name, f"visual_{h}", partial(_visual, h, dtype, device)) for h in ("linear", "mlp")]
        if backend == "reference" or not interpreted:
            calls.append(("int64", "selections", partial(_selections, device)))
        for dtype_text, case, call in calls:
            row = Row("golden", backend, dtype_text, case, interpreted=interpreted, device=device.type)
            tasks.append((f"golden: {case}", partial(_run, row, call)))
    return tasks


def _run(row: Row, call: Callable[[], list[Check]]) -> list[Row]:
    started = time.perf_counter()
    try:
        order = (row.backend,) if row.backend == "reference" else (row.backend, "reference")
        with ops.use_backend(*order):
            row = replace(row, checks=tuple(call()))
    except ErrSegError as error:  # open_clip or a fixture is missing
        row = replace(row, reason=str(error))
    except Exception as error:  # whatever a broken kernel raises is the verdict on it
        row = replace(row, reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], crashed=True)
    return [replace(row, seconds=time.perf_counter() - started)]


def _read(name: str, device: torch.device) -> dict[str, Tensor]:
    return {key: tensor.to(device) for key, tensor in _load(name).items()}


def _weights(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {key: tensor.to(device, dtype) for key, tensor in _load("weights").items()}


def _inputs(values: dict[str, Tensor], dtype: torch.dtype) -> tuple[errseg.DenseFeatures, Tensor]:
    features = errseg.DenseFeatures(*(values[f"in.{name}"].to(dtype, copy=True) for name in INPUTS))
    return features, values["in.text"][:, 0].to(dtype, copy=True)


def _ascending(values: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Ids in ascending order, and a tensor [B, K, ...] in the same order."""
    ids, order = values["indices"].sort(1)
    return ids, torch.stack([image[o] for image, o in zip(values[name], order, strict=True)])


def _evaluation(case: str, dtype: torch.dtype, device: torch.device) -> list[Check]:
    """Votes, selection, logits and label map of two images or one; bfloat16 gets the classes given."""
    values = _read(case, device)
    ids, logits = _ascending(values, "logits")
    features, text = _inputs(values, dtype)
    weights = _weights(dtype, device)
    given = ids if dtype == torch.bfloat16 else None
    with torch.no_grad():
        decoder, published = (made.from_published(weights).eval() for made in (errseg.Decoder, PublishedDecoder))
        output = decoder(features, text, num_selected=ids.shape[1], class_ids=given)
        eager = published(features, text, num_selected=ids.shape[1], class_ids=ids)
    found = [compare_exactly("class ids", output.class_ids, ids)]
    found += compare_errors("logits", output.logits, eager.logits, logits)
    if dtype != torch.bfloat16:
        found.append(compare_exactly("votes", ops.class_votes(features.os16_dense, text), values["votes"]))
        size = (values["pred"].shape[0], values["pred"].shape[1])
        labels = ops.upsample_argmax(output.logits[:1], output.class_ids[:1], size)
        assert isinstance(labels, Tensor)
        found.append(_sure_labels(labels[0], values["pred"], values["pred_margin"]))
    return found


def _sure_labels(labels: Tensor, expected: Tensor, margin: Tensor) -> Check:
    """Label maps [H, W], equal wherever the published lead in probability exceeds float32 rounding."""
    sure = ~(margin <= 1e-6)
    wrong = ((labels != expected) & sure).sum().item()
    if sure.double().mean() < 0.95:
        return failed("label map", f"only {sure.sum().item()} of {sure.numel()} labels are sure")
    return Check("label map", "wrong", wrong, 0.0, note=f"{sure.sum().item()} of {sure.numel()} sure")


def _training(dtype: torch.dtype, device: torch.device) -> list[Check]:
    """Loss and gradients of all inputs and parameters, beside the published order in the same dtype."""
    values = _read("train_small_io", device)
    exact = _read("train_small_grads0", device) | _read("train_small_grads1", device)
    required = torch.zeros(2, 21, dtype=torch.bool, device=device)
    for image in range(2):
        required[image, values[f"gt{image}"]] = True
    weights = _weights(dtype, device)
    mine, eager = (
        _gradients(made.from_published(weights).eval(), values, required, dtype)
        for made in (errseg.Decoder, PublishedDecoder)
    )
    found = [compare_exactly("class ids", mine.pop("class ids"), values["indices"].sort(1).values)]
    truth = {"loss": values["loss"]} | {f"grad {k.removeprefix('grad.')}": v for k, v in values.items() if "grad." in k}
    truth |= {f"grad {key}": value for key, value in exact.items()}
    truth["grad text"] = truth["grad text"][:, 0]
    # Long sums in another order: how much eager errs in one tensor is a matter of luck, over all of them it is not.
    worst = max(relative_error(eager[name], truth[name]) for name in mine if not name.endswith(VANISHING))
    roundings = max(32, math.ceil(2 * FACTOR * worst / torch.finfo(dtype).eps))
    for name in mine:
        if name.endswith(VANISHING):
            largest = mine[name].abs().max().item()
            found.append(Check(name, "absolute", largest, torch.finfo(dtype).eps))
        else:
            found += compare_errors(name, mine[name], eager[name], truth[name].double(), roundings=roundings)
    return found


def _gradients(
    decoder: nn.Module, values: dict[str, Tensor], required: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Ids, loss and gradients under the names of the fixtures."""
    from errseg.model.decoder import published_name

    features, text = _inputs(values, dtype)
    leaves = [tensor.requires_grad_() for tensor in (*features, text)]
    output = decoder(features, text, num_selected=7, required=required)
    if isinstance(decoder, errseg.Decoder):
        loss = ops.upsample_bce(output.logits, output.class_ids, values["targets"], vocabulary_size=21)
    else:
        loss = published_loss(output.dense(21), values["targets"])
    named = {
        published_name(name) if isinstance(decoder, errseg.Decoder) else name: parameter
        for name, parameter in decoder.named_parameters()
    }
    grads = torch.autograd.grad(loss, [*leaves, *named.values()])
    names = (f"grad {name}" for name in (*INPUTS, "text", *named))
    return {"class ids": output.class_ids, "loss": loss.detach()} | dict(zip(names, grads, strict=True))


def _loss_and_post(dtype: torch.dtype, device: torch.device) -> list[Check]:
    """Loss, its gradient and the label map from given logits; saturated ties go to the lowest id."""
    values = _read("loss_post", device)
    logits = values["loss.logits"].to(dtype, copy=True).requires_grad_()
    ids, target = values["loss.indices"], values["loss.targets"]
    loss = ops.upsample_bce(logits, ids, target, vocabulary_size=12)
    (grad,) = torch.autograd.grad(loss, [logits])
    from errseg.model.decoder import DecoderOutput

    eager = published_loss(DecoderOutput(logits, ids).dense(12), target)
    (eager_grad,) = torch.autograd.grad(eager, [logits])
    found = compare_errors("loss", loss.detach(), eager.detach(), values["loss.value"].double())
    found += compare_errors("grad logits", grad, eager_grad, values["loss.grad_logits"].double())
    labels = ops.upsample_argmax(values["post.logits"].to(dtype), values["post.indices"], (23, 31))
    assert isinstance(labels, Tensor)
    margin, expected = values["post.prob_margin"], values["post.pred"]
    if dtype == torch.float32:
        tied = margin == 0
        found.append(compare_exactly("saturated ties", labels[0][tied], expected[tied].to(labels.dtype)))
    found.append(_sure_labels(labels[0][margin > 0], expected[margin > 0], margin[margin > 0]))
    return found


def _selections(device: torch.device) -> list[Check]:
    """Votes and selections with ties and with fewer voted classes than K."""
    values = _read("selection", device)
    found = []
    for case in SELECTIONS:
        cost, votes, selection = (values[f"{case}.{name}"] for name in ("cost", "votes", "selection"))
        # Costs as pixel embeddings and unit vectors as words: the cosines keep the ranks of the costs.
        counted = ops.class_votes(cost, torch.eye(cost.shape[1], dtype=cost.dtype, device=device))
        found.append(compare_exactly(f"votes {case}", counted, votes))
        found.append(compare_exactly(f"selection {case}", ops.select_classes(votes, selection.shape[1]), selection))
    return found


def _visual(head: str, dtype: torch.dtype, device: torch.device) -> list[Check]:
    """The dense image tower with its gradients; only rounding is allowed, there is no other order to compare with."""
    from errseg.model.config import ClipConfig, TextConfig, VisionConfig

    fixture = _read(f"visual_{head}", device)
    vision = VisionConfig(depths=(1, 2, 2, 2), dims=(8, 16, 24, 32), head=head, ls_init_value=0.5)
    config = ClipConfig(embed_dim=40, vision=vision, text=TextConfig(width=16, heads=2, layers=1))
    clip = errseg.DenseCLIP(config).to(device, dtype).eval()
    clip.visual.load_state_dict({key[2:]: value for key, value in fixture.items() if key.startswith("w.")})
    image = fixture["in.image"].to(dtype).requires_grad_()
    features = clip(image)
    outputs, gradients = VISUAL_TOLERANCE[dtype]
    parameters = dict(clip.visual.named_parameters())
    scalar = sum((getattr(features, f) * fixture[f"cotangent.{n}"].to(dtype)).mean() for f, n in VISUAL.items())
    grads = torch.autograd.grad(scalar, [image, *parameters.values()])
    named = dict(zip(("grad.image", *(f"grad_w.{name}" for name in parameters)), grads, strict=True))
    pairs: Iterator[tuple[str, Any, float]] = iter(
        [(f"out.{name}", getattr(features, field), outputs) for field, name in VISUAL.items()]
        + [(name, grad, gradients) for name, grad in named.items()]
    )
    return [_within(name, got, fixture[name], allowed) for name, got, allowed in pairs]


def _within(name: str, got: Tensor, expected: Tensor, allowed: float) -> Check:
    error = (got.detach().double() - expected.double()).abs().max() / expected.double().abs().max()
    return Check(name, "max", error.item(), allowed)
