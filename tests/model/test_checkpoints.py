"""Checkpoints: exact key sets, strict loading from every source, one-line errors, saving, no downloads."""

from __future__ import annotations

import ast
import json
import os
import pickle
import socket
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg.errors import ErrSegError
from errseg.model import errseg as module
from errseg.model.clip import DenseCLIP
from errseg.model.config import CONFIGS, ClipConfig, DecoderConfig, ModelConfig, TextConfig, VisionConfig
from errseg.model.errseg import MEAN, STD, ERRSeg, create_model, load_model, save_model
from errseg.model.published import (
    CLIP_PREFIX,
    DECODER_PREFIX,
    choose_file,
    published_state_dict,
    read_checkpoint,
)

GOLDEN_KEYS = Path(__file__).parent.parent / "golden" / "keys"
TENSORS = {"errseg-b": 727, "errseg-l": 777}
PARAMETERS = {"errseg-b": 188_853_370, "errseg-l": 365_745_722}


def small_config(name: str = "errseg-tiny", **clip: Any) -> ModelConfig:
    """The same structure as a real model, in a millisecond."""
    vision = VisionConfig(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), ls_init_value=0.5)
    text = replace(CONFIGS["errseg-tiny"].clip.text, width=16, heads=2, layers=1)
    decoder = DecoderConfig(
        text_dim=12,
        guidance_channels=vision.dims,
        width=16,
        num_layers=1,
        num_heads=2,
        mlp_dim=16,
        embed_dim=8,
        guidance_dim=8,
        decoder_guidance=(8, 8, 8),
        decoder_dims=(8, 8, 8),
    )
    towers = ClipConfig(embed_dim=12, vision=vision, text=text, image_size=64)
    return ModelConfig(name=name, clip=replace(towers, **clip), decoder=decoder, size=64)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ERRSeg:
    """A small model that goes by the name errseg-tiny."""
    monkeypatch.setitem(CONFIGS, "errseg-tiny", small_config())
    return create_model("errseg-tiny", "random")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to download fails, by whatever road."""
    import huggingface_hub
    import open_clip
    import open_clip.factory

    def forbidden(*args: object, **kwargs: object) -> None:
        pytest.fail("a download was tried")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(torch.hub, "download_url_to_file", forbidden)
    for name in ("hf_hub_download", "list_repo_files", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, forbidden)
    monkeypatch.setattr(open_clip, "download_pretrained", forbidden)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", forbidden)


def tensors(model: ERRSeg) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in published_state_dict(model.clip, model.decoder).items()}


def assert_same(a: ERRSeg, b: ERRSeg) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


def error_line(call: Callable[[], object]) -> str:
    with pytest.raises(ErrSegError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- key sets


def published_table(name: str) -> dict[str, list[int]]:
    lines = (GOLDEN_KEYS / f"{name.replace('-', '_')}.tsv").read_text().splitlines()
    return {key: ast.literal_eval(shape) for key, shape in (line.split("\t") for line in lines)}


@pytest.mark.parametrize("name", ["errseg-b", "errseg-l"])
def test_published_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model = ERRSeg(CONFIGS[name])
    state_dict = published_state_dict(model.clip, model.decoder)
    assert {key: list(value.shape) for key, value in state_dict.items()} == published_table(name)
    assert len(state_dict) == TENSORS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert not list(model.buffers())


def test_tiny_parameter_count() -> None:
    with torch.device("meta"):
        model = ERRSeg(CONFIGS["errseg-tiny"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_142_738


def test_b_from_a_training_file(tmp_path: Path) -> None:
    """The real B: every published tensor, told apart by its value, arrives under its name, without a download."""
    table = published_table("errseg-b")
    # One stored number per tensor: a checkpoint of full size in a small file.
    values = {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(table.items())}
    extras = {"optimizer": {"state": {0: torch.zeros(3)}, "lr": 2e-4}, "iteration": 79_999}
    torch.save({"model": values, **extras}, tmp_path / "model_final.pth")
    model = create_model("errseg-b", tmp_path / "model_final.pth")
    loaded = published_state_dict(model.clip, model.decoder)
    for i, key in enumerate(table):
        assert loaded[key].dtype == torch.float32 and loaded[key].is_contiguous(), key
        assert bool((loaded[key] == i).all()), key
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


# ---- sources


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_sources(suffix: str, wrapped: bool, small: ERRSeg, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        from safetensors.torch import save_file

        save_file(tensors(small), path)
    else:
        torch.save({"model": tensors(small), "iteration": 5} if wrapped else tensors(small), path)
    assert_same(create_model("errseg-tiny", path), small)
    assert_same(create_model("errseg-tiny", str(path)), small)
    assert_same(create_model("errseg-tiny", tmp_path), small)


def test_old_pickle_format(small: ERRSeg, tmp_path: Path) -> None:
    torch.save({"model": tensors(small)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(create_model("errseg-tiny", tmp_path / "old.pth"), small)


def test_loaded_model_does_not_depend_on_the_file(small: ERRSeg, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(tensors(small), path)
    model = create_model("errseg-tiny", path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert_same(model, small)


def test_half_precision_becomes_float32(small: ERRSeg, tmp_path: Path) -> None:
    torch.save({key: value.half() for key, value in tensors(small).items()}, tmp_path / "half.pth")
    model = create_model("errseg-tiny", tmp_path / "half.pth")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same(model, small.half().float())


def test_hub_repository(small: ERRSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    torch.save({"model": tensors(small)}, tmp_path / "tiny.pth")
    asked: list[tuple[str, str]] = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(tmp_path / "tiny.pth")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: ["README.md", "b.pth", "tiny/model_final.pth"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same(create_model("errseg-tiny", "someone/ERR-Seg"), small)
    assert_same(create_model("errseg-tiny", "someone/ERR-Seg/other/file.pth"), small)
    assert asked == [("someone/ERR-Seg", "tiny/model_final.pth"), ("someone/ERR-Seg", "other/file.pth")]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    line = error_line(lambda: create_model("errseg-b", "someone/repo"))
    assert "someone/repo is neither a local path nor" in line and "no route" in line


def test_hub_without_network_uses_the_cache(small: ERRSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*args: object) -> None:
        raise ConnectionError("offline")

    torch.save(tensors(small), tmp_path / "weights.pth")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, local_files_only: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(tmp_path / file))
    assert_same(create_model("errseg-tiny", "someone/repo"), small)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model_final.pth"], "model_final.pth"),
        (["errseg_b.pth", "errseg_l.pth"], "errseg_b.pth"),
        (["convnextL_640/model_final.pth", "convnextB_640/model_final.pth"], "convnextB_640/model_final.pth"),
        (["ConvNeXt-Base.pth", "ConvNeXt-Large.pth", "config.json"], "ConvNeXt-Base.pth"),
        (["ERR-Seg_B.pth", "ERR-Seg_B.safetensors", "ERR-Seg_L.pth"], "ERR-Seg_B.safetensors"),
        (["b/model_0004999.pth", "b/model_final.pth"], "b/model_final.pth"),
        (["model_0004999.pth", "model_final.pth"], "model_final.pth"),
        (["model.safetensors", "other.pth"], "model.safetensors"),
        (["model_final.pth", "model_final_large.pth"], "model_final.pth"),
    ],
)
def test_choice_of_the_file(files: list[str], chosen: str) -> None:
    assert choose_file(files, "errseg-b", "user/repo") == chosen


def test_no_choice_lists_the_candidates() -> None:
    line = error_line(lambda: choose_file(["x.pth", "y.pth", "z.txt"], "errseg-b", "user/repo"))
    assert "x.pth, y.pth" in line and "z.txt" not in line
    assert "user/repo holds no checkpoint" in error_line(lambda: choose_file(["z.txt"], "errseg-b", "user/repo"))
    error_line(lambda: choose_file(["errseg_l.pth"], "errseg-b", "user/repo"))


# ---- strictness


def corrupted(kind: str, key: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    if kind == "missing":
        del state_dict[key]
    elif kind == "extra":
        state_dict[key + "_extra"] = torch.zeros(1)
    elif kind == "misshapen":
        state_dict[key] = torch.zeros(*state_dict[key].shape, 1)
    return state_dict


KEYS = [
    CLIP_PREFIX + "logit_scale",
    CLIP_PREFIX + "visual.modify_downsample.2.bias",
    CLIP_PREFIX + "transformer.resblocks.0.attn.in_proj_weight",
    DECODER_PREFIX + "aggregator_layers.0.class_fusion.sa.mlp.fc3.weight",
    DECODER_PREFIX + "head.bias",
]


@pytest.mark.parametrize("kind", ["missing", "extra", "misshapen"])
@pytest.mark.parametrize("key", KEYS)
def test_one_wrong_key_is_named(kind: str, key: str, small: ERRSeg, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": corrupted(kind, key, tensors(small))}, path)
    line = error_line(lambda: create_model("errseg-tiny", path))
    assert key + ("_extra" if kind == "extra" else "") + " " in line
    assert {"missing": "is missing", "extra": "does not belong", "misshapen": "expected"}[kind] in line
    assert "more differences" not in line and str(path) in line


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    large = {key: torch.zeros(()).expand(shape) for key, shape in published_table("errseg-l").items()}
    torch.save(large, tmp_path / "l.pth")
    line = error_line(lambda: create_model("errseg-b", tmp_path / "l.pth"))
    assert "does not fit the model" in line and "it looks like errseg-l" in line


def test_state_dict_of_something_else(small: ERRSeg, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert "not an ERR-Seg checkpoint" in error_line(lambda: create_model("errseg-tiny", tmp_path / "other.pth"))


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_malicious_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": Malicious()}}, "zip.pth")
    Path("pickle.pth").write_bytes(pickle.dumps({"model": {"a": Malicious()}}))
    for name in ("zip.pth", "pickle.pth"):
        assert "could run code" in error_line(lambda name=name: read_checkpoint(name))
    assert not Path("executed").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", ["text", "empty", "half", "header"])
def test_damaged_files(suffix: str, content: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"weights.{suffix}"
    state_dict = {"a": torch.zeros(10_000)}
    torch.save(state_dict, path) if suffix == "pth" else save_file(state_dict, path)
    whole = path.read_bytes()
    cut = {
        "text": b"version https://git-lfs\n",
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "header": whole[:30],
    }
    path.write_bytes(cut[content])
    assert str(path) in error_line(lambda: read_checkpoint(path))
    assert str(path) in error_line(lambda: create_model("errseg-b", path))
    error_line(lambda: load_model(path))


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {}, {"model": {}}, {"a": 3}, {"model": {"a": 3}}, {1: torch.zeros(1)}]
)
def test_pickles_without_a_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    assert "holds no state dict" in error_line(lambda: read_checkpoint(tmp_path / "odd.pth"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: create_model("errseg-x"), "choose one of errseg-b, errseg-l, errseg-tiny"),
        (lambda path: create_model("errseg-b", path / "missing.pth"), "no such checkpoint file"),
        (lambda path: create_model("errseg-b", "missing/file.pth"), "no such checkpoint file"),
        (lambda path: create_model("errseg-b", "missing.safetensors"), "no such checkpoint file"),
        (lambda path: create_model("errseg-b", path / "words.txt"), "expected a checkpoint ending in"),
        (lambda path: create_model("errseg-b", path), "holds no checkpoint"),
        (lambda path: create_model("errseg-tiny", "random", size=100), "multiple of 32"),
        (lambda path: create_model("errseg-tiny", "random", depth=3), "no override 'depth'"),
        (lambda path: create_model("errseg-tiny", "clip"), "no CLIP weights"),
        (lambda path: load_model(path / "missing.safetensors"), "no such checkpoint file"),
        (lambda path: ERRSeg.from_pretrained(path), "no such checkpoint file"),
    ],
)
def test_mistakes_are_one_line(call: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    assert message in error_line(lambda: call(tmp_path))


# ---- saving


def test_save_and_load(small: ERRSeg, tmp_path: Path) -> None:
    save_model(small, tmp_path / "deep" / "model.safetensors")
    model = load_model(tmp_path / "deep" / "model.safetensors")
    assert_same(model, small)
    assert model.config == small.config and not model.training
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    words = small.clip.embed_words(["red star", "grass", "blue ring"], prompt=small.config.prompt)
    with torch.no_grad():
        expected, got = (each(image, words, num_selected=2) for each in (small, model))
    assert torch.equal(expected.logits, got.logits) and torch.equal(expected.class_ids, got.class_ids)
    assert got.logits.shape == (1, 2, 16, 16)


def test_saved_file_is_a_published_checkpoint_with_a_config(small: ERRSeg, tmp_path: Path) -> None:
    from safetensors import safe_open

    save_model(small, tmp_path / "m.safetensors", dtype=torch.float16)
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors(small))
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"torch.float16"}  # noqa: SIM118
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["errseg"])["clip"]["text"]["token_ids"][-1] == 49407
    assert_same(create_model("errseg-tiny", tmp_path / "m.safetensors"), small.half().float())


def test_save_pretrained(small: ERRSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    small.save_pretrained(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ModelConfig.from_dict(config) == small.config
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(tmp_path / "out" / file))
    for source in (tmp_path / "out", str(tmp_path / "out" / "model.safetensors"), "someone/repo"):
        assert_same(ERRSeg.from_pretrained(source), small)


def test_saved_config_wins_over_the_named_one(small: ERRSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(small, tmp_path / "m.safetensors")
    monkeypatch.undo()
    assert create_model("errseg-tiny", tmp_path / "m.safetensors").config == small_config()
    assert create_model("errseg-tiny", tmp_path / "m.safetensors", size=96).config.size == 96
    assert "holds errseg-tiny, not errseg-b" in error_line(lambda: create_model("errseg-b", tmp_path / "m.safetensors"))


def test_nothing_half_written(small: ERRSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def disk_full(state_dict: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    target = tmp_path / "m.safetensors"
    target.write_bytes(b"what was there before")
    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    assert "No space left" in error_line(lambda: save_model(small, target))
    assert target.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_saved_file_is_readable_by_others(small: ERRSeg, tmp_path: Path) -> None:
    save_model(small, tmp_path / "m.safetensors")
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


# ---- open_clip's weights


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small ConvNeXt CLIP that open_clip knows by name."""
    import open_clip

    config = {
        "embed_dim": 12,
        "vision_cfg": {
            "timm_model_name": "test_convnext",
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    path = tmp_path_factory.mktemp("open_clip") / "errseg_test_convnext.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture
def clip_model(registered: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """open_clip's own model, and a configuration by the name errseg-b that is built on it."""
    import open_clip

    reference = open_clip.create_model(registered, pretrained=None, load_weights=False)
    trunk = reference.visual.trunk
    vision = VisionConfig(
        depths=tuple(len(stage.blocks) for stage in trunk.stages),
        dims=tuple(info["num_chs"] for info in trunk.feature_info),
    )
    text = TextConfig(width=16, heads=2, layers=1, context_length=16)
    clip = ClipConfig(12, vision, text, open_clip_name=registered, open_clip_pretrained="a_tag", image_size=64)
    config = small_config("errseg-b")
    decoder = replace(config.decoder, guidance_channels=vision.dims)
    monkeypatch.setitem(CONFIGS, "errseg-b", replace(config, clip=clip, decoder=decoder))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.2)
    return reference.eval()


def assert_clip_weights(clip: DenseCLIP, reference: Any) -> None:
    state_dict = clip.state_dict()
    for key, value in reference.state_dict().items():
        assert torch.equal(state_dict.pop(key), value), key
    assert sorted(state_dict) == sorted(
        f"visual.modify_downsample.{i}.{name}" for i in (0, 2) for name in ("bias", "weight")
    )
    source = reference.visual.trunk.stages[3].downsample
    for i, j in ((0, 0), (2, 1)):
        assert torch.equal(state_dict[f"visual.modify_downsample.{i}.weight"], source[j].weight)
        assert torch.equal(state_dict[f"visual.modify_downsample.{i}.bias"], source[j].bias)
    image = torch.randn(2, 3, 32, 32)  # one pixel at 1/32, so open_clip's pooling changes nothing
    torch.testing.assert_close(clip(image).os32_dense[:, :, 0, 0], reference.visual(image))


@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_clip_weights_from_a_file(file: str, clip_model: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / file
    if file.endswith("bin"):
        torch.save({"state_dict": {f"module.{k}": v for k, v in clip_model.state_dict().items()}}, path)
    else:
        save_file(clip_model.state_dict(), path)
    assert_clip_weights(create_model("errseg-b", "clip", open_clip_pretrained=str(path)).clip, clip_model)


def test_clip_weights_by_tag(clip_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    torch.save(clip_model.state_dict(), tmp_path / "clip.bin")
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"hf_hub": f"{name}/{tag}"})
    asked: list[dict[str, str]] = []

    def download(cfg: dict[str, str]) -> str:
        asked.append(cfg)
        return str(tmp_path / "clip.bin")

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    assert_clip_weights(create_model("errseg-b", "clip").clip, clip_model)
    assert asked == [{"hf_hub": "errseg_test_convnext/a_tag"}]


def test_clip_tags_exist_in_open_clip() -> None:
    import open_clip

    for name in ("errseg-b", "errseg-l"):
        clip = CONFIGS[name].clip
        assert open_clip.get_pretrained_cfg(clip.open_clip_name, clip.open_clip_pretrained)


def test_finished_checkpoint_needs_no_clip(clip_model: Any, tmp_path: Path) -> None:
    model = create_model("errseg-b", "random")
    torch.save({"model": tensors(model)}, tmp_path / "model_final.pth")
    assert_same(create_model("errseg-b", tmp_path / "model_final.pth"), model)


@pytest.mark.parametrize("kind", ["missing", "extra", "misshapen", "text"])
def test_clip_weights_that_do_not_fit(kind: str, clip_model: Any, tmp_path: Path) -> None:
    path, key = tmp_path / "clip.bin", "visual.trunk.stem.0.bias"
    torch.save(corrupted(kind, key, dict(clip_model.state_dict())), path)
    if kind == "text":
        path.write_text("not weights")
    line = error_line(lambda: create_model("errseg-b", "clip", open_clip_pretrained=str(path)))
    assert str(path) in line and (kind == "text" or key in line)


def test_unknown_clip_tag(clip_model: Any) -> None:
    line = error_line(lambda: create_model("errseg-b", "clip", open_clip_pretrained="no_such_tag"))
    assert "neither a file nor weights that open_clip has" in line


# ---- configuration and normalisation


@pytest.mark.parametrize("name", list(CONFIGS))
def test_configuration_through_json(name: str) -> None:
    config = CONFIGS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(ModelConfig.from_dict(config.to_dict())) == hash(config)


def test_wrong_configuration() -> None:
    values = CONFIGS["errseg-b"].to_dict()
    assert "no entry 'colour'" in error_line(lambda: ModelConfig.from_dict({**values, "colour": 1}))
    assert "text_dim" in error_line(
        lambda: ModelConfig.from_dict({**values, "decoder": {"guidance_channels": [1] * 4}})
    )
    assert "expected the entries" in error_line(lambda: ModelConfig.from_dict({**values, "clip": [1]}))
    assert "expected the entries" in error_line(lambda: ModelConfig.from_dict([]))  # type: ignore[arg-type]


def test_overrides() -> None:
    model = create_model(
        "errseg-tiny", "random", size=96, prompt="a {}", num_selected=3, drop_path=0.2, drop_path_rate=0.1
    )
    config = model.config
    assert (config.size, config.prompt, config.num_selected) == (96, "a {}", 3)
    assert config.decoder.drop_path_rate == model.decoder.config.drop_path_rate == 0.1
    assert model.clip.visual.trunk.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [torch.uint8, torch.float32, torch.int32])
def test_normalize(dtype: torch.dtype, of: torch.dtype) -> None:
    model = ERRSeg(small_config()).to(dtype)
    image = torch.randint(0, 256, (2, 3, 8, 8)).to(of)
    shape = (1, 3, 1, 1)
    mean, std = torch.tensor(MEAN).double().view(shape), torch.tensor(STD).double().view(shape)
    expected = (image.double() - mean) / std
    got = model.normalize(image)
    assert got.dtype == dtype
    # One rounding at the end: values near the mean keep their relative precision in bfloat16 too.
    eps = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=eps, atol=1e-6)


def test_wrong_image() -> None:
    with pytest.raises(ValueError, match=r"got \[3, 8, 8\]"):
        ERRSeg(small_config()).normalize(torch.zeros(3, 8, 8))


def test_tiny_weights_come_with_the_package() -> None:
    path = module.ASSETS / "errseg-tiny.safetensors"
    if not path.is_file():
        assert "errseg-tiny.safetensors" in error_line(lambda: create_model("errseg-tiny"))
        pytest.skip("the shipped weights are not built yet")
    assert path.stat().st_size < 6_000_000
    model = create_model("errseg-tiny")
    assert model.config == CONFIGS["errseg-tiny"]
