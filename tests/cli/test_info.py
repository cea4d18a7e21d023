"""`errseg info` reports what is there and gives a reason for what is not."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from typer.testing import CliRunner

from errseg import ops
from errseg.cli import app
from errseg.cli import info as command


def test_json_has_everything() -> None:
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert facts["devices"]["cpu"]["cores"] > 0
    assert set(facts["compilers"]) == {"c++", "nvcc"}
    assert set(facts["backends"]) == set(ops.OPS)
    assert all(row["reference"] is None for row in facts["backends"].values())


def test_tables_name_every_op_and_package() -> None:
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.stderr
    for name in (*ops.OPS, *command.PACKAGES):
        assert name in result.stdout


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PACKAGES", {"no-such-distribution": None})
    result = CliRunner().invoke(app, ["info", "--json"])
    versions = json.loads(result.stdout)["versions"]
    assert versions["no-such-distribution"] == "missing: pip install no-such-distribution"


def test_a_broken_package_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(command.importlib, "import_module", fail)
    assert "same index" in command._version("torch", "torch")


def test_missing_and_broken_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command._compiler("no-such-compiler").startswith("not found")
    monkeypatch.setenv("CXX", "false")
    assert command._compiler("false").startswith("found, but does not run")
