"""Configurations: those that come along, and what is wrong with others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from errseg.configs import build, find_config, load_config, shipped
from errseg.configs.schema import EvalConfig
from errseg.data.datasets import BENCHMARKS
from errseg.errors import ErrSegError

# K and the published mIoU of B and L (none was published for PAS-20b).
PUBLISHED = {
    "ADE-847": (48, 13.9, 16.9),
    "PC-459": (48, 20.5, 23.9),
    "ADE-150": (32, 35.8, 38.3),
    "PC-59": (24, 56.9, 60.7),
    "PAS-20": (16, 95.4, 96.6),
    "PAS-20b": (24, None, None),
}


def test_shipped_configurations_are_the_published_settings() -> None:
    seen = {}
    for name, path in shipped("eval").items():
        config = load_config(path, EvalConfig)
        assert config.data.set in BENCHMARKS and config.eval.protocol == "published"
        assert name == f"{config.data.set.replace('-', '').lower()}-{config.model.name[-1]}"
        assert (config.model.weights, config.model.prompt) == ("lchen1019/ERR-Seg", None)
        assert config.model.size == {"errseg-b": 640, "errseg-l": 768}[config.model.name]
        seen[config.data.set, config.model.name] = (config.model.num_selected, config.eval.published_miou)
    assert seen == {
        (name, model): (k, published)
        for name, (k, *scores) in PUBLISHED.items()
        for model, published in zip(("errseg-b", "errseg-l"), scores, strict=True)
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data: {set: ADE-150}\nmodle: {}", "unknown setting 'modle': did you mean model?"),
        ("data: {set: ADE-150, zebra: 1}", "data: unknown setting 'zebra': there are set, split, root, folder"),
        ("data: {set: 150}", "data: set: expected str or nothing, got 150"),
        ("data: {}\nmodel: {size: large}", "model: size: expected int or nothing, got 'large'"),
        ("data: {}\nmodel: {size: true}", "model: size: expected int or nothing, got True"),
        ("data: {}\neval: {predictions: 1}", "eval: predictions: expected bool, got 1"),
        ("data: {}\neval: {protocol: fast}", "eval: protocol: expected published or direct, got 'fast'"),
        ("data: ADE-150", "data: expected settings (set, split, root, folder), got 'ADE-150'"),
        ("model: {}", "lacks settings: "),
        ("", "lacks settings: "),
        ("- a", "expected settings (data, model, eval), got ['a']"),
        ("data: {", "not YAML: "),
        ("data: !!python/object/apply:os.mkdir [x]", "not YAML: "),
    ],
)
def test_a_mistake_is_one_line(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ErrSegError) as caught:
        load_config(path, EvalConfig)
    assert str(caught.value).startswith(f"{path}: {reason}") and "\n" not in str(caught.value)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: {set: ADE-150}")
    config = load_config(path, EvalConfig, ["model.size=320", "eval.save_seconds=0", "data.root=null", "model.name=x"])
    assert (config.model.size, config.eval.save_seconds, config.data.root, config.model.name) == (320, 0.0, None, "x")
    for override, reason in (
        ("model.size", "expected KEY=VALUE like model.size=640, got 'model.size'"),
        ("data.set.name=x", "data.set.name is not below a group of settings"),
        ("model.size=[", "the value is not YAML"),
        ("model.sise=3", "model: unknown setting 'sise': did you mean size?"),
    ):
        with pytest.raises(ErrSegError) as caught:
            load_config(path, EvalConfig, [override])
        assert reason in str(caught.value)


def test_no_such_configuration() -> None:
    with pytest.raises(ErrSegError, match=r"no-such: no such file, and no configuration of that name: ade150-b, "):
        find_config("no-such", "eval")
    assert find_config("pc59-l", "eval").name == "pc59-l.yaml"


def test_any_dataclass_will_do() -> None:
    @dataclass(frozen=True)
    class Step:
        rate: float
        name: str = "x"

    assert build(Step, {"rate": 1}, "here") == Step(1.0)
    with pytest.raises(ErrSegError, match="here: rate: expected float, got '1'"):
        build(Step, {"rate": "1"}, "here")
