"""The loss: fused and published alike, gradients too; towers computed again in the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from errseg.data.toy import WORDS, ToyWorld
from errseg.errors import ErrSegError
from errseg.model.errseg import ERRSeg, create_model
from errseg.train import recipe
from errseg.train.objective import Objective, check_words, checkpoint_towers, present_classes

WORDS_USED = list(WORDS[:20])


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Two scenes of 64 x 64: ground, objects beyond the vocabulary ignored, and one that shows nothing at all."""
    scenes = [ToyWorld(8, size=64)[i] for i in range(2)]
    images = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes])
    targets = torch.stack([torch.from_numpy(scene.labels.astype("int32")) for scene in scenes])
    targets[targets >= len(WORDS_USED)] = -1
    targets[1, :32] = -1
    return images, targets


def tiny() -> ERRSeg:
    """The shipped model as training has it."""
    model = create_model("errseg-tiny", drop_path=0.3, drop_path_rate=0.3, size=64).train()
    recipe.freeze(model.clip)
    return model


def gradients(
    batch: tuple[Tensor, Tensor], *, fused: bool = True, again: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Of the loss, and the loss itself, with paths dropped from the same seed."""
    model = tiny().to(dtype)
    if again:
        checkpoint_towers(model.clip)
    objective = Objective(model, WORDS_USED, num_selected=8, fused=fused)
    torch.manual_seed(4)
    loss = objective(*batch)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 2e-6), (torch.float32, 2e-3)])
def test_fused_and_published_order_give_the_same_gradients(
    batch: tuple[Tensor, Tensor], dtype: torch.dtype, share: float
) -> None:
    fused, published = gradients(batch, dtype=dtype), gradients(batch, fused=False, dtype=dtype)
    assert set(fused) == set(published) == {"loss"} | {n for n, p in tiny().named_parameters() if p.requires_grad}
    for name, value in fused.items():
        # Keys' biases have no gradient but rounding errors.
        bound = max(share * float(published[name].norm()), 1e-7)
        assert float((value - published[name]).norm()) < bound, name


def test_computing_the_towers_again_changes_nothing(batch: tuple[Tensor, Tensor]) -> None:
    kept, again = gradients(batch), gradients(batch, again=True)
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_labelled_is_a_finite_loss(batch: tuple[Tensor, Tensor], fused: bool) -> None:
    values = gradients((batch[0], torch.full_like(batch[1], -1)), fused=fused)
    assert all(torch.isfinite(value).all() for value in values.values())


def test_bfloat16_is_close(batch: tuple[Tensor, Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(batch)["loss"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, gradients(batch)["loss"], rtol=0.03, atol=0)


def test_present_classes() -> None:
    targets = torch.tensor([[[0, 3], [-1, 3]], [[-1, -1], [-1, -1]]], dtype=torch.int32)
    assert present_classes(targets, 4).tolist() == [[True, False, False, True], [False] * 4]


def test_the_ground_truth_is_always_selected(batch: tuple[Tensor, Tensor]) -> None:
    model = tiny().eval()
    kept = []
    model.decoder.register_forward_hook(lambda module, inputs, output: kept.append(output.class_ids))
    with torch.no_grad():
        Objective(model, WORDS_USED, num_selected=8)(*batch)
    present = present_classes(batch[1], len(WORDS_USED))
    assert present.any(1).all()
    for ids, shown in zip(kept[0], present, strict=True):
        assert set(shown.nonzero().flatten().tolist()) <= set(ids.tolist())


def test_several_words_for_one_class_cannot_train() -> None:
    check_words(["a", "b"], (0, 1))
    with pytest.raises(ErrSegError, match="for evaluation only"):
        check_words(["a", "b", "c"], (0, 1, 1))
