"""The training code: losses, optimizer, schedule, scenes, and three real steps."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from errseg.data import toy
from errseg.data.toy.render import render_scenes
from errseg.errors import ErrSegError
from errseg.model.errseg import create_model
from errseg.train.batches import scene_batches, training_tensors
from errseg.train.losses import class_fractions, soft_cross_entropy
from errseg.train.optim import Group, MuonWithAdamW, trapezoid
from errseg.train.toy import Recipe, make_optimizer, train_tiny


def test_class_fractions_count_pixels() -> None:
    labels = torch.randint(0, 5, (2, 24, 16))
    fractions = class_fractions(labels, 7, 8)
    expected = F.avg_pool2d(F.one_hot(labels, 7).permute(0, 3, 1, 2).float(), 8)
    torch.testing.assert_close(fractions, expected)
    with pytest.raises(ValueError, match="24 x 16"):
        class_fractions(labels, 7, 5)


def test_soft_cross_entropy_of_pure_cells_is_cross_entropy() -> None:
    logits, labels = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    target = F.one_hot(labels, 5).permute(0, 3, 1, 2).float()
    got = soft_cross_entropy(logits, target, torch.ones(2, 3, 4))
    torch.testing.assert_close(got, F.cross_entropy(logits, labels))


def test_soft_cross_entropy_ignores_cells_of_no_weight() -> None:
    logits, target = torch.randn(1, 4, 1, 2), torch.rand(1, 4, 1, 2)
    weight = torch.tensor([[[3.0, 0.0]]])
    alone = soft_cross_entropy(logits[..., :1], target[..., :1], torch.ones(1, 1, 1))
    torch.testing.assert_close(soft_cross_entropy(logits, target, weight), alone)


def test_trapezoid() -> None:
    factor = trapezoid(10, 100, warmup=5, decay=20)
    assert [factor(s) for s in (0, 9)] == [0, 0]
    assert factor(10) == pytest.approx(0.2) and factor(14) == 1 and factor(80) == 1
    assert factor(90) == pytest.approx(0.5) and 0 < factor(99) < 0.1


def test_optimizer_sends_matrices_to_muon_and_the_rest_to_adamw() -> None:
    model = create_model("errseg-tiny", "random")
    muon, adamw = make_optimizer(model, Recipe()).optimizers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    by_adamw = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert sorted(by_muon + by_adamw) == sorted(names.values())
    assert all(model.get_parameter(name).ndim == 2 for name in by_muon)
    assert {"clip.token_embedding.weight", "clip.positional_embedding", "clip.text_projection"} <= set(by_adamw)
    for group in adamw.param_groups:
        assert (group["weight_decay"] == 0) == all(p.ndim < 2 for p in group["params"])


def test_optimizer_follows_the_schedule() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    group = Group([("weight", weight)], lambda step: float(step), 0.5, 0.1)
    optimizer = MuonWithAdamW([group], weight_decay=0.0, betas=(0.9, 0.98))
    weight.grad = torch.ones(3, 3)
    optimizer.step(0)
    assert torch.equal(weight, torch.ones(3, 3)) and weight.grad is None
    weight.grad = torch.ones(3, 3)
    optimizer.step(1)
    assert not torch.equal(weight, torch.ones(3, 3))


def test_rendering_does_not_depend_on_processes() -> None:
    done = []
    images, labels = render_scenes(5, 3, 32, processes=2, progress=lambda *at: done.append(at))
    alone_images, alone_labels = render_scenes(5, 3, 32, processes=1)
    assert np.array_equal(images, alone_images) and np.array_equal(labels, alone_labels)
    assert images.shape == (3, 32, 32, 3) and labels.shape == (3, 32, 32) and done == [(3, 3)]


def test_training_labels_index_the_training_words() -> None:
    images, labels = training_tensors(*render_scenes(5, 2, 64, processes=1))
    assert images.shape == (2, 3, 64, 64)
    scene = toy.ToyWorld(5, size=64)[1]
    words = np.array(toy.training_vocabularies()[0][0])[labels[1].numpy()]
    assert np.array_equal(words, np.array(toy.WORDS)[scene.labels])


def test_batches_move_pictures_and_labels_together() -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(4, 8, 8, dtype=torch.uint8)
    images[..., :3], labels[..., :3] = 200, 1
    image, target = next(scene_batches(images, labels, 4, torch.Generator().manual_seed(0)))
    assert image.dtype == torch.float32 and target.dtype == torch.int64
    assert ((image.mean(1) > 100) == (target == 1)).all()
    assert target[:, 0, 0].unique().numel() == 2  # some mirrored, some not


def test_three_steps_train_every_parameter() -> None:
    torch.manual_seed(0)
    recipe = Recipe(
        scenes=4, batch_size=2, tower_steps=1, joint_steps=2, decoder_images=1, num_selected=10, processes=1
    )
    seen = []
    model = train_tiny(recipe, device="cpu", on_step=lambda step, losses: seen.append((step, losses)))
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [set(losses) for _, losses in seen] == [{"ce16", "ce32"}] + 2 * [{"ce16", "ce32", "bce", "ce4"}]
    assert all(torch.isfinite(loss) for _, losses in seen for loss in losses.values())
    torch.manual_seed(recipe.seed)
    start = create_model("errseg-tiny", "random").decoder.state_dict()
    unmoved = [name for name, value in model.decoder.state_dict().items() if torch.equal(value, start[name])]
    # A bias on every key alike cannot change a softmax.
    assert all(name.endswith(("attention.k.bias", "attention.norm_k.bias")) for name in unmoved)


def test_without_accelerate_training_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ErrSegError, match="pip install accelerate"):
        train_tiny(Recipe(scenes=1))
