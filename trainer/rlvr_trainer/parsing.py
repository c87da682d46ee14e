"""Nested dicts to dataclasses, every key and type checked: an error names the key, what came and what is wanted."""

import difflib
import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that cannot be used. The message is meant for the person who wrote it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?` and the known names, to be appended to an error message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f": did you mean {close[0]!r}?" if close else "."
    listed = ", ".join(names) if len(names) <= 20 else f"{len(names)} names"
    return f"{hint} (known: {listed})"


def listed(lines: list[str], shown: int = 10) -> str:
    """The first lines, and how many more there are."""
    return "\n".join(lines[:shown]) + (f"\n  and {len(lines) - shown} more" if len(lines) > shown else "")


def build(kind: type, tree: dict[str, Any], prefix: str = "") -> Any:
    """An instance of the dataclass `kind` from `tree`; keys that are missing keep their defaults.

    Raises:
        ConfigError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    values = {}
    for key, value in tree.items():
        if key not in names:
            raise ConfigError(f"unknown key {prefix}{key}{nearest(str(key), names)}")
        values[key] = convert(value, hints[key], f"{prefix}{key}")
    return kind(**values)


def convert(value: Any, kind: Any, key: str) -> Any:
    """`value` as `kind`. YAML reads `1e-5` as text and `1` as an integer: both are taken where a float is wanted."""
    origin = get_origin(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict | None):
            raise ConfigError(f"{key} must be a section of keys, got {value!r}")
        return build(kind, value or {}, f"{key}.")
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return convert(value, next(a for a in get_args(kind) if a is not type(None)), key)
    if origin is Literal:
        options = get_args(kind)
        if value not in options:
            raise ConfigError(f"unknown {key} {value!r}{nearest(str(value), options)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list, got {value!r}")
        return [convert(item, get_args(kind)[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict | None):
            raise ConfigError(f"{key} must be a section of keys, got {value!r}")
        return dict(value or {})
    return _scalar(value, kind, key)


def _scalar(value: Any, kind: type, key: str) -> Any:
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    elif type(value) is kind:
        return value
    wanted = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]
    raise ConfigError(f"{key} must be {wanted}, got {value!r} ({type(value).__name__})")
