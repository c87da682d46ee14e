"""Nested dicts to dataclasses, every key and type checked: an error names the key, what came and what is wanted."""

import difflib
import math
import re
import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)


class ConfigError(ValueError):
    """A setting that cannot be used. The message is meant for the person who wrote it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?` and the known names, to be appended to an error message."""
    names = sorted(known)
    by_letters = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), by_letters, n=1, cutoff=0.5)
    hint = f": did you mean {by_letters[close[0]]!r}?" if close else "."
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
    """`value` as `kind`. An integer is taken where a float is wanted, and so is the text `1e-5`, which it is to YAML 1.1.

    Raises:
        ConfigError: another type, an unknown choice, or a number that is not finite.
    """
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
        if not any(value == option and type(value) is type(option) for option in options):
            raise ConfigError(f"unknown {key} {value!r}{nearest(str(value), options)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list, got {value!r}")
        return [convert(item, get_args(kind)[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict | None):
            raise ConfigError(f"{key} must be a section of keys, got {value!r}")
        return _plain(dict(value or {}), key)
    return _scalar(value, kind, key)


def _plain(value: Any, key: str) -> Any:
    """A value of no certain type, if its keys are text and its numbers finite."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{key} must have names as keys, got {name!r}")
            _plain(item, f"{key}.{name}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _plain(item, f"{key}[{i}]")
    elif isinstance(value, str):
        _text(value, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        check_number(value, key)
    return value


def _scalar(value: Any, kind: type, key: str) -> Any:
    if kind is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if type(value) is int and kind in (int, float):
        return kind(check_number(value, key))
    if type(value) is kind:
        return check_number(value, key) if kind is float else _text(value, key) if kind is str else value
    if kind is str and type(value) is int:
        return str(value)
    wanted = {int: "an integer", float: "a number", bool: "true or false", str: "text (a number in quotes)"}[kind]
    raise ConfigError(
        f"{key} must be {wanted}, got {'nothing' if value is None else f'{value!r} ({type(value).__name__})'}"
    )


def check_number(value: Any, key: str) -> Any:
    """A number that the machine can count with: an integer of 64 bits, or a float that is neither infinite nor 0 in 32.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ConfigError(f"{key} must be below 2**63, got {value}")
    elif not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {value}")
    elif value and not 1e-45 < abs(value) < 3.4e38:
        raise ConfigError(f"{key} must be a number of 32 bits, between 1e-45 and 3.4e38, got {value}")
    return value


def _text(value: Any, key: str) -> Any:
    if "\0" in value or any(0xD800 <= ord(character) < 0xE000 for character in value):
        raise ConfigError(f"{key} must be text in UTF-8 without zero bytes, got {value!r}")
    return value
