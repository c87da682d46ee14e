"""Every setting with a wrong value of every kind: it is taken and usable, or refused by name; never anything else."""

import math
import types
from typing import Literal, Union, get_args, get_origin

import pytest
from rlvr_trainer.config import Config, from_tree, load
from rlvr_trainer.names import settings_of
from rlvr_trainer.parsing import ConfigError

SETTINGS = settings_of(Config)
NUMBERS = [
    "0",
    "-1",
    "1",
    "0.5",
    "-0.5",
    "1e-300",
    "1e300",
    "-1e300",
    ".inf",
    "-.inf",
    ".nan",
    "inf",
    "nan",
    str(2**31),
]
HUGE = [str(2**63), str(10**30), "9" * 5000, "010", "0x10", "0b1", "1_000", "1:30", "1e-5", "1.", "+3", "--3"]
WORDS = [
    "",
    " ",
    "null",
    "None",
    "~",
    "true",
    "True",
    "yes",
    "off",
    "ten",
    "2026-01-02",
    "TINY",
    "[",
    "{",
    "'",
    '"',
    "é",
    "\t",
]
SHAPES = [
    "[]",
    "[1]",
    "[1, 2]",
    "[.nan, 0.5]",
    "[null]",
    "{}",
    "{a: 1}",
    "{1: 2}",
    "{a: .nan}",
    "{a: [b]}",
    "!!python/object:os",
    "&a",
]
FROM_PYTHON = [
    None,
    True,
    3,
    -3,
    2.5,
    math.inf,
    math.nan,
    10**400,
    "",
    "x\0",
    "\udce9",
    b"x",
    [],
    [None],
    {},
    {"a": None},
    (),
    object(),
]


def usable(value, kind):
    """Whether a setting of this type may hold this."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(usable(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind) and isinstance(value, str)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(usable(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and plain(value)
    if kind is float:
        return type(value) is float and math.isfinite(value) and (value == 0 or 1e-45 < abs(value) < 3.4e38)
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    return type(value) is (get_origin(kind) or kind)


def plain(value):
    """Whether a value of no certain type has names as keys and finite numbers."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return not isinstance(value, float) or math.isfinite(value)


def taken_or_refused(key, read):
    section, name = key.split(".")
    refused = ""
    try:
        config = read()
    except ConfigError as error:
        refused = str(error)
    if refused:
        assert name in refused
        assert "\n" not in refused
    else:
        assert usable(getattr(getattr(config, section), name), SETTINGS[key])


@pytest.mark.parametrize("key", SETTINGS)
def test_a_wrong_value_on_the_command_line_is_refused_by_name(key):
    for text in [*NUMBERS, *HUGE, *WORDS, *SHAPES]:
        taken_or_refused(key, lambda text=text: load(None, [f"{key}={text}"]))


@pytest.mark.parametrize("key", SETTINGS)
def test_a_wrong_value_in_a_file_is_refused_by_name(key, tmp_path):
    section, name = key.split(".")
    for text in [*NUMBERS, *HUGE, *WORDS, *SHAPES]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"{section}:\n  {name}: {text}\n", encoding="utf-8")
        taken_or_refused(key, lambda path=path: load(path))


@pytest.mark.parametrize("key", SETTINGS)
def test_a_wrong_value_from_python_is_refused_by_name(key):
    section, name = key.split(".")
    for value in FROM_PYTHON:
        taken_or_refused(key, lambda value=value: from_tree({section: {name: value}}))


@pytest.mark.parametrize("key", [key for key, kind in SETTINGS.items() if kind in (int, float)])
def test_no_number_is_infinite_or_no_number(key):
    for text in ("inf", "-inf", "nan", ".inf", "-.inf", ".nan", "Infinity"):
        with pytest.raises(ConfigError, match=rf"{key.split('.')[1]} must be"):
            load(None, [f"{key}={text}"])


@pytest.mark.parametrize("key", [key for key, kind in SETTINGS.items() if kind is int])
def test_no_count_is_a_word_a_fraction_a_list_or_negative(key):
    for text in ("ten", "0.5", "[1]", "{a: 1}", "true", "", "null", "1_000", "-1"):
        with pytest.raises(ConfigError, match=key.split(".")[1]):
            load(None, [f"{key}={text}"])
