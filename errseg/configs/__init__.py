"""Configurations: YAML files into dataclasses, the shipped ones by name."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from errseg.errors import ErrSegError

T = TypeVar("T")
FOLDER = Path(__file__).parent


def shipped(kind: str) -> dict[str, Path]:
    """The configurations of a kind ("eval") that come with the package, by name."""
    return {path.stem: path for path in sorted((FOLDER / kind).glob("*.yaml"))}


def find_config(source: str, kind: str) -> Path:
    """A file, or the shipped configuration of that name; ErrSegError naming those there are."""
    if Path(source).is_file():
        return Path(source)
    known = shipped(kind)
    if source not in known:
        raise ErrSegError(f"{source}: no such file, and no configuration of that name: {', '.join(known)}")
    return known[source]


def overrides_of(options: Mapping[str, object]) -> list[str]:
    """Options of a command line by the setting they stand for, as `load_config` takes them; None: not given."""
    given = {
        key: value if isinstance(value, bool) else str(value) for key, value in options.items() if value is not None
    }
    # JSON is YAML, and a text stays one, whatever it looks like.
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]


def load_config(path: Path, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """A YAML file as the dataclass `schema`; `overrides` are "part.key=value", the value in YAML.

    Raises:
        ErrSegError: naming file and key: no YAML, an unknown key, a value of another type.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ErrSegError(f"{path}: cannot read it ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ErrSegError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    for override in overrides:
        _override(values, override)
    return build(schema, values, str(path))


def _override(values: Any, text: str) -> None:
    import yaml

    key, equals, value = text.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not last:
        raise ErrSegError(f"expected KEY=VALUE like model.size=640, got {text!r}")
    for parent in parents:
        if not isinstance(values, dict):
            break
        values = values.setdefault(parent, {})
    if not isinstance(values, dict):
        raise ErrSegError(f"{text!r}: {key} is not below a group of settings")
    try:
        values[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ErrSegError(f"{text!r}: the value is not YAML") from error


def build(schema: type[T], values: Any, where: str) -> T:
    """`schema` from a mapping; `where` leads the error messages."""
    if not isinstance(values, dict):
        raise ErrSegError(f"{where}: expected settings ({_names(schema)}), got {values!r:.60}")
    kinds = typing.get_type_hints(schema)
    for key in values:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, 1)
            advice = f"did you mean {near[0]}?" if near else f"there are {_names(schema)}"
            raise ErrSegError(f"{where}: unknown setting {key!r}: {advice}")
    found = {key: _value(kinds[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return schema(**found)
    except TypeError as error:  # a setting without a default is not there
        raise ErrSegError(f"{where}: lacks settings: {error}") from error


def _names(schema: Any) -> str:
    return ", ".join(entry.name for entry in fields(schema))


def _value(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return build(typing.cast(type, kind), value, where)
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ErrSegError(f"{where}: expected {' or '.join(map(str, choices))}, got {value!r:.60}")
        return value
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds and type(value) is int:
        return float(value)
    # By exact type: a bool is no number here.
    if type(value) not in kinds:
        expected = " or ".join("nothing" if each is type(None) else each.__name__ for each in kinds)
        raise ErrSegError(f"{where}: expected {expected}, got {value!r:.60}")
    return value
