"""Dense CLIP features: golden numbers of the published forward, gradients, what training draws at random."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errseg.errors import ErrSegError
from errseg.model.clip import DenseCLIP
from errseg.model.config import CONFIGS, ClipConfig, TextConfig, VisionConfig

Golden = Callable[[str], dict[str, Tensor]]

TEXT = TextConfig(width=16, heads=2, layers=1, vocab_size=49408)
OUTPUTS = {
    "os4": "os4",
    "os8": "os8",
    "os16": "os16",
    "os32": "os32",
    "os16_dense": "os16_dense",
    "os32_dense": "clip_vis_dense",
}


def small_clip(**vision: Any) -> DenseCLIP:
    sizes: dict[str, Any] = {"depths": (1, 2, 2, 2), "dims": (8, 16, 24, 32), "ls_init_value": 0.5}
    return DenseCLIP(ClipConfig(embed_dim=40, vision=VisionConfig(**(sizes | vision)), text=TEXT))


def on_meta(name: str) -> DenseCLIP:
    with torch.device("meta"):
        return DenseCLIP(CONFIGS[name].clip)


def relative_error(value: Tensor | None, truth: Tensor) -> float:
    assert value is not None and value.shape == truth.shape
    value, truth = value.detach().double(), truth.double()
    return float((value - truth).abs().max() / truth.abs().max())


# The fixtures are rounded to float32; float32 gradients carry the rounding of a whole backward pass.
@pytest.mark.parametrize(
    ("dtype", "bound", "gradient_bound"), [(torch.float64, 1e-7, 1e-7), (torch.float32, 1e-6, 4e-6)]
)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_golden(head: str, dtype: torch.dtype, bound: float, gradient_bound: float, golden: Golden) -> None:
    fixture = golden(f"visual_{head}")
    clip = small_clip(head=head).to(dtype).eval()
    weights = {key[2:]: value.to(dtype) for key, value in fixture.items() if key.startswith("w.")}
    clip.visual.load_state_dict(weights, strict=True)
    image = fixture["in.image"].to(dtype).requires_grad_()

    features = clip(image)
    scalar = image.new_zeros(())
    for field, name in OUTPUTS.items():
        value = getattr(features, field)
        assert relative_error(value, fixture[f"out.{name}"]) < bound, field
        scalar = scalar + (value * fixture[f"cotangent.{name}"].to(dtype)).mean()
    scalar.backward()

    assert relative_error(image.grad, fixture["grad.image"]) < gradient_bound
    checked = 0
    for name, parameter in clip.visual.named_parameters():
        assert relative_error(parameter.grad, fixture[f"grad_w.{name}"]) < gradient_bound, name
        checked += 1
    assert checked == sum(key.startswith("grad_w.") for key in fixture)


def test_only_os4_and_os8_are_detached() -> None:
    features = small_clip()(torch.randn(1, 3, 32, 64))
    assert [field for field in OUTPUTS if not getattr(features, field).requires_grad] == ["os4", "os8"]
    assert features.os16_dense.shape == (1, 40, 2, 4) and features.os32_dense.shape == (1, 40, 1, 2)


@pytest.mark.parametrize("shape", [(1, 3, 48, 64), (1, 3, 64, 40), (3, 64, 64), (1, 4, 64, 64)])
def test_wrong_image_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 32, got"):
        small_clip()(torch.zeros(shape))


def test_second_pass_draws_its_own_masks() -> None:
    clip = small_clip(drop_path=0.5).train()
    masks: list[Tensor] = []

    def keep_mask(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        masks.append(output.flatten(1).abs().amax(1) > 0)

    clip.visual.trunk.stages[3].blocks[-1].drop_path.register_forward_hook(keep_mask)
    clip(torch.randn(64, 3, 32, 32))
    assert len(masks) == 2
    assert all(8 < int(mask.sum()) < 56 for mask in masks)
    assert not torch.equal(*masks)


def test_evaluation_draws_nothing() -> None:
    clip = small_clip(head="mlp", drop_path=0.5, head_drop=0.5).eval()
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(clip(image).os16_dense, clip(image).os16_dense)


def test_training_noise_of_the_published_models() -> None:
    base, large = on_meta("errseg-b"), on_meta("errseg-l")
    for clip, last in ((base, 0.0), (large, 0.1)):
        blocks = [block for stage in clip.visual.trunk.stages for block in stage.blocks]
        rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx(torch.linspace(0, last, 36).tolist())
    assert base.visual.head.drop.p == 0.0
    mlp = large.visual.head.mlp
    assert [type(module).__name__ for module in mlp.children()][:3] == ["Linear", "GELU", "Dropout"]
    assert (mlp.drop1.p, mlp.drop2.p) == (0.1, 0.0)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_sizes_and_epsilons(name: str) -> None:
    config, clip = CONFIGS[name].clip, on_meta(name)
    trunk = clip.visual.trunk
    assert tuple(len(stage.blocks) for stage in trunk.stages) == config.vision.depths
    assert tuple(info["num_chs"] for info in trunk.feature_info) == config.vision.dims
    assert isinstance(trunk.norm_pre, nn.Identity)
    norms = [(path, module) for path, module in clip.named_modules() if isinstance(module, nn.LayerNorm)]
    assert {path for path, norm in norms if norm.eps == 1e-6} == {p for p, _ in norms if "visual" in p}
    assert {norm.eps for path, norm in norms if "visual" not in path} == {1e-5}
    attention = clip.transformer.resblocks[0].attn
    assert (attention.num_heads, attention.embed_dim) == (config.text.heads, config.text.width)
    assert len(clip.transformer.resblocks) == config.text.layers
    assert CONFIGS[name].decoder.guidance_channels == config.vision.dims
    assert CONFIGS[name].decoder.text_dim == config.embed_dim


def test_text_heads() -> None:
    # No weight's shape tells them apart.
    assert (CONFIGS["errseg-b"].clip.text.heads, CONFIGS["errseg-l"].clip.text.heads) == (10, 12)


def test_tiny_parameter_counts() -> None:
    clip = on_meta("errseg-tiny")
    visual = sum(parameter.numel() for parameter in clip.visual.parameters())
    assert (visual, sum(parameter.numel() for parameter in clip.parameters()) - visual) == (
        1_181_448,
        111_617,
    )


def test_modify_downsample_starts_as_copy() -> None:
    clip = small_clip()
    original, modified = clip.visual.trunk.stages[3].downsample, clip.visual.modify_downsample
    assert torch.equal(original[1].weight, modified[2].weight)
    assert original[1].weight.data_ptr() != modified[2].weight.data_ptr()
    assert (modified[2].stride, modified[2].padding) == ((1, 1), (0, 0))


def test_compiles_without_graph_breaks() -> None:
    clip = small_clip().eval()
    image = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(clip, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), clip(image))


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast: bool) -> None:
    clip = small_clip().eval()
    image, truth = torch.randn(1, 3, 64, 64), None
    with torch.no_grad():
        truth = clip(image).os16_dense
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                value = clip(image).os16_dense
        else:
            value = clip.bfloat16()(image.bfloat16()).os16_dense
    assert value.dtype == torch.bfloat16 and relative_error(value, truth) < 0.05


@pytest.fixture
def failing_import(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Exception], None]]:
    """Call it with a module's name and the error that its import shall raise."""
    original = builtins.__import__

    def fail(name: str, error: Exception) -> None:
        def failing(module: str, *args: Any, **kwargs: Any) -> Any:
            if module == name:
                raise error
            return original(module, *args, **kwargs)

        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(builtins, "__import__", failing)

    yield fail


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ModuleNotFoundError("No module named 'open_clip'", name="open_clip"), "pip install open_clip_torch"),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            "the torchvision that belongs to torch",
        ),
        (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), "install the torchvision"),
    ],
)
def test_missing_open_clip(error: Exception, advice: str, failing_import: Callable[[str, Exception], None]) -> None:
    failing_import("open_clip", error)
    with pytest.raises(ErrSegError, match=advice):
        small_clip()
