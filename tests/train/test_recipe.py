"""What trains, in which groups, at which rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from errseg.configs import load_config, shipped
from errseg.errors import ErrSegError
from errseg.model.config import CONFIGS
from errseg.model.errseg import ERRSeg, create_model
from errseg.train import recipe
from errseg.train.settings import TrainConfig, TrainSettings, check
from tests.train.world import SMALL


@pytest.mark.parametrize(("name", "trained", "all_"), [("errseg-b", 126.4, 188.9), ("errseg-l", 268.7, 365.7)])
def test_the_published_share_trains(name: str, trained: float, all_: float) -> None:
    with torch.device("meta"):
        model = ERRSeg(CONFIGS[name])
    recipe.freeze(model.clip)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) / 1e6 for every in (False, True)]
    assert counts == [pytest.approx(trained, abs=0.05), pytest.approx(all_, abs=0.05)]


def test_which_tower_parameters_train() -> None:
    trained = {name for name, _ in create_model("errseg-tiny").clip.named_parameters() if recipe.is_trainable(name)}
    assert {"visual.trunk.stages.0.blocks.0.gamma", "visual.trunk.stages.3.blocks.1.conv_dw.weight"} <= trained
    assert "visual.trunk.stages.1.blocks.0.mlp.fc1.weight" in trained
    assert {name for name in trained if "stages" not in name} == {
        f"transformer.resblocks.{i}.{name}" for i in range(2) for name in ("attn.in_proj_weight", "mlp.c_fc.weight")
    }
    assert not any(name.endswith("bias") or "downsample" in name or "norm" in name for name in trained)


def test_three_groups_hold_each_trained_parameter_once() -> None:
    model = create_model("errseg-tiny")
    recipe.freeze(model.clip)
    optimizer = recipe.make_adamw(recipe.parameter_groups(model, lr=2e-4, clip_lr=0.01, weight_decay=1e-4))
    _, decoder, norms = optimizer.param_groups
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(2e-6), 2e-4, 2e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 1e-4, 0]
    assert all(g["fused"] and g["betas"] == (0.9, 0.999) and g["eps"] == 1e-8 for g in optimizer.param_groups)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    kinds = {id(p): type(m) for m in model.decoder.modules() for p in m.parameters(recurse=False)}
    assert {kinds[id(p)] for p in norms["params"]} == {nn.LayerNorm, nn.GroupNorm}
    assert not {kinds[id(p)] for p in decoder["params"]} & {nn.LayerNorm, nn.GroupNorm}
    assert any(p.ndim == 1 for p in decoder["params"])  # biases decay


def test_the_published_schedule() -> None:
    factor = recipe.warmup_cosine(80_000, 1000)
    at_1000 = 0.5 * (1 + math.cos(math.pi / 80))
    assert factor(0) == 1e-3 and factor(1000) == pytest.approx(at_1000) == pytest.approx(0.9996, abs=5e-5)
    assert factor(500) == pytest.approx((1e-3 + at_1000) / 2)
    assert factor(40_000) == pytest.approx(0.5) and factor(80_000) == pytest.approx(0) == factor(90_000)


def test_shipped_configurations_are_the_recipe() -> None:
    assert sorted(shipped("train")) == ["coco-b", "coco-l"]
    for name, path in shipped("train").items():
        config = load_config(path, TrainConfig)
        check(config, processes=4)
        assert config.model.name == f"errseg-{name[-1]}" and config.model.weights == "clip"
        assert (config.model.size, config.model.num_selected) == (640, 32)
        assert (config.data.set, config.data.split) == ("COCO-Stuff-171", "train")
        assert config.train == TrainSettings(dtype="float16")
    published = TrainSettings()
    assert (published.steps, published.batch_size, published.warmup_steps) == (80_000, 4, 1000)
    assert (published.lr, published.clip_lr, published.weight_decay) == (2e-4, 0.01, 1e-4)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"steps": 0}, "train: steps: expected at least 1, got 0"),
        ({"lr": -1.0}, "train: lr: expected 0 or more, got -1.0"),
        ({"ema": 1.0}, "train: ema: expected 0 or more and less than 1, got 1.0"),
        ({"clip_norm": 0.0}, "train: clip_norm: expected more than 0, got 0.0"),
        ({"batch_size": 6, "accumulate": 2}, "train: batch_size 6 cannot be shared by 2 processes with accumulate 2"),
        ({"fused": False, "exclude_ignored": True}, "train: exclude_ignored is no part of the published loss"),
    ],
)
def test_settings_that_no_run_can_have(settings: dict[str, object], line: str) -> None:
    from errseg.configs import build

    values = {"data": {"folder": "x"}, "model": {"name": "errseg-tiny"}, "train": SMALL | settings}
    with pytest.raises(ErrSegError) as caught:
        check(build(TrainConfig, values, "test"), processes=2)
    assert str(caught.value).startswith(line)


def test_large_models_say_what_they_start_from() -> None:
    from errseg.configs import build

    with pytest.raises(ErrSegError, match="errseg-b needs weights to start from: clip"):
        check(build(TrainConfig, {"data": {"folder": "x"}}, "test"), processes=1)
