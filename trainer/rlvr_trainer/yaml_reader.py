"""Settings as text: YAML by the rules of version 1.2, and what stands behind `section.key=` on a command line.

YAML 1.1 reads 010 as 8, 1:30 as 90 and `on` as true. What the two versions read differently is refused, so is a key that
stands twice. `1e-5` is a number.
"""

import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from rlvr_trainer.parsing import ConfigError

PROSE = (
    "task.instruction",
    "policy.system_prompt",
    "policy.assistant_prefix",
)  # texts in which `\n` is meant as a new line
_RULES = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    "merge": (r"<<", "<"),
}  # fmt: skip
_BACKSLASH = r"""\n is two characters here, a backslash and an n: "...\n..." in double quotes is a new line, '...\n...' is both"""
_TAG = "tag:yaml.org,2002:"
_BEFORE = {"bool": "true or false", "int": "a number", "float": "a number", "timestamp": "a date"}  # in YAML 1.1


class _Loader(yaml.SafeLoader):
    """Plain data only. Refuses a key that stands twice and a scalar that the versions of YAML read differently."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own name; filled below

    def compose_scalar_node(self, anchor: Any) -> Any:
        """A scalar, if it is the same to YAML 1.1 and 1.2."""
        node = super().compose_scalar_node(anchor)
        before = None if node.style else _other_reading(node.value, node.tag)
        if before:
            raise _error(f"{node.value} is {before} to YAML 1.1: write what is meant, a text in quotes", node)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping, if its keys are different."""
        seen = set()
        for key, value in node.value:
            if (name := f"{key.tag} {key.value}") in seen:
                raise _error(f"{key.value} stands twice", key)
            seen.add(name)
            plain = isinstance(value, yaml.ScalarNode) and not value.style
            if plain and r"\n" in value.value and any(known.endswith(f".{key.value}") for known in PROSE):
                raise _error(_BACKSLASH, value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what either version of YAML would not read as text, and backslashes."""

    def represent_str(self, data: str) -> Any:
        """A text, with its backslashes doubled."""
        return self.represent_scalar(f"{_TAG}str", data, style='"' if "\\" in data else None)


for _name, (_pattern, _first) in _RULES.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})$"), [*_first, ""])
_Dumper.add_representer(str, _Dumper.represent_str)


def to_text(tree: dict[str, Any]) -> str:
    """A tree as YAML that `read_file` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read_file(path: Path) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8 or not YAML, or holds something else than sections.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} in line {line}") from error
    tree = _read(text, f"{path} is not valid YAML")
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold sections of keys, got {type(tree).__name__}")
    return tree or {}


def read_value(text: str, kind: Any, key: str) -> Any:
    """What `key=text` says on a command line. Where text is wanted it is taken to the letter, unless it is in quotes.

    Raises:
        ConfigError: no YAML value, or a text that says something else than it looks like.
    """
    if not _is_text(kind):
        return _read(text, f"{key}={text} is not a YAML value")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return _read(text, f"{key}={text} is not one text in quotes")
    if type(None) in get_args(kind) and text.lower() in ("null", "none", "~"):
        if text == "None":
            raise ConfigError(f"{key}=None: write null for none, or quotes for the word")
        return None
    if key in PROSE and r"\n" in text:
        raise ConfigError(f"{key}: {_BACKSLASH}")
    return text


def _read(text: str, complaint: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark and "\n" in text else ""
        raise ConfigError(f"{complaint}: {line}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{complaint}: {' '.join(str(error).split())}") from error


def _other_reading(text: str, tag: str) -> str | None:
    """What YAML 1.1 takes a plain scalar for if that is something else than what it is here."""
    if re.fullmatch(r"[-+]?0[0-9_]+", text):
        return "an octal number"
    for before, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], ()):
        if pattern.match(text) and before != tag:
            return _BEFORE.get(before.removeprefix(_TAG))
    return None


def _error(problem: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _is_text(kind: Any) -> bool:
    """Whether a setting of this type is text, a choice among names or none included."""
    if get_origin(kind) in (Union, types.UnionType):
        return all(_is_text(part) for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return all(isinstance(name, str) for name in get_args(kind))
    return kind is str
