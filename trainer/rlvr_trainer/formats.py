r"""The shapes that public data sets have, by name, and what is prompt and answer in a row of each.

| name | prompt | answer |
|---|---|---|
| `prompt_answer` | `prompt` | `answer` |
| `gsm8k` | `question` | what follows the last `####` of `answer` |
| `math` | `problem` | the last `\boxed{}` of `solution` |
| `open_r1` | `problem` | `answer` |
| `dapo`, also verl's | `prompt` | `reward_model.ground_truth` |
| `messages` | `messages` | `answer`, or else the assistant's last message |

A prompt is text or a list of messages, an answer one value or a list of right ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from rlvr_trainer.json_rows import Row
from rlvr_trainer.parsing import ConfigError, nearest
from rlvr_trainer.solutions import after_hashes, last_box
from rlvr_trainer.tasks import Problem, Prompt

ROLES = ("system", "user", "assistant", "tool")
SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Format:
    """Which columns are prompt and answer (a dot goes into a column), and how the answer is read out of its text."""

    prompt: str
    answer: str
    read: Callable[[str], str] = str
    unless: tuple[str, ...] = ()  # columns that make a row another format's
    in_reply: bool = False  # without the answer's column, the assistant's last message is the answer

    def fits(self, row: dict[str, Any]) -> bool:
        """Whether a row has the columns."""
        wanted = [self.prompt] if self.in_reply else [self.prompt, self.answer]
        return all(_has(row, path) for path in wanted) and not any(_has(row, path) for path in self.unless)

    def problem(self, row: Any, instruction: str = "") -> Problem:
        """The problem of a row, `instruction` behind its last user message.

        Raises:
            ValueError: a row that is no problem, and why.
        """
        if not isinstance(row, dict):
            raise ValueError(f"an object is wanted, got {type(row).__name__}")
        prompt, reply = _prompt(_get(row, self.prompt), self.prompt, instruction)
        given = reply if self.in_reply and reply and not _has(row, self.answer) else _get(row, self.answer)
        return Problem(prompt, self._answers(given), entry=row)

    def _answers(self, value: Any) -> tuple[str, ...]:
        texts = [_text(item, self.answer) for item in (value if isinstance(value, list) else [value])]
        if not texts:
            raise ValueError(f"{self.answer!r} is an empty list: one right answer at least is wanted")
        return tuple(dict.fromkeys(_text(self.read(text), self.answer) for text in texts))


FORMATS = {
    "prompt_answer": Format("prompt", "answer"),
    "gsm8k": Format("question", "answer", after_hashes),
    "math": Format("problem", "solution", last_box, unless=("answer",)),
    "open_r1": Format("problem", "answer"),
    "dapo": Format("prompt", "reward_model.ground_truth"),
    "messages": Format("messages", "answer", unless=("prompt", "question", "problem"), in_reply=True),
}


def choose_format(name: str, columns: dict[str, Any], rows: list[Row]) -> Format:
    """The format called `name`, its columns renamed; `auto` is that of the first row that has a known one.

    Columns alone, without a name, are prompt and answer as they stand.

    Raises:
        ConfigError: no row fits a format, or one fits several.
    """
    for key, column in columns.items():
        if key not in ("prompt", "answer"):
            raise ConfigError(f"unknown key task.columns.{key}{nearest(str(key), ('prompt', 'answer'))}")
        if not isinstance(column, str):
            raise ConfigError(f"task.columns.{key} must be the name of a column, got {column!r}")
    objects = [row for row in rows if isinstance(row.value, dict)]
    if name != "auto" or columns or not objects:
        form = FORMATS["prompt_answer" if name == "auto" else name]
        return replace(form, prompt=columns.get("prompt", form.prompt), answer=columns.get("answer", form.answer))
    row = next((row for row in objects if _fitting(row)), objects[0])
    fitting = _fitting(row)
    if len(fitting) != 1:
        raise ConfigError(_unclear(row, fitting))
    return FORMATS[fitting[0]]


def _fitting(row: Row) -> list[str]:
    return [name for name, form in FORMATS.items() if form.fits(row.value)]


def _unclear(row: Row, fitting: list[str]) -> str:
    found = ", ".join(f"{key!r}{' (null)' if value is None else ''}" for key, value in row.value.items())
    said = f"are those of {' and '.join(fitting)} at once" if fitting else "are no known format's"
    known = "; ".join(f"{name} ({form.prompt}, {form.answer})" for name, form in FORMATS.items())
    return (
        f"{row.where}: the columns {found or '(none)'} {said}."
        f" Set task.format to one of {known}, or task.columns={{prompt: ..., answer: ...}}."
    )


def _prompt(value: Any, column: str, instruction: str) -> tuple[Prompt, str | None]:
    """The prompt, and the assistant's reply that stood behind it, if any. One user message alone is its text."""
    if not isinstance(value, list):
        return _text(value, column) + instruction, None
    messages = [_message(item, column) for item in value]
    reply = messages.pop()[1] if messages and messages[-1][0] == "assistant" else None
    if not messages or messages[-1][0] != "user":
        raise ValueError(f"{column!r} must end with a user's message, or with one and the assistant's reply")
    messages[-1] = ("user", messages[-1][1] + instruction)
    return messages[0][1] if len(messages) == 1 else tuple(messages), reply


def _message(item: Any, column: str) -> tuple[str, str]:
    if not isinstance(item, dict) or item.get("role") not in ROLES:
        raise ValueError(
            f"a message of {column!r} must be {{role, content}} with a role of {', '.join(ROLES)}, got {_shown(item)}"
        )
    role, content = item["role"], item.get("content")
    if role == "system" and content == "":
        return role, ""
    return role, _text(content, f"{column} of the {role}")


def _text(value: Any, column: str) -> str:
    """A value as text: numbers as they are, truth values in lower case as JSON writes them."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str | int | float | Decimal) or not text.strip():
        raise ValueError(f"{column!r} must be text that is not empty, got {_shown(value)}")
    if not isinstance(value, str) and not math.isfinite(value):
        raise ValueError(f"{column!r} must be a finite number, got {value}")
    if "\0" in text:
        raise ValueError(f"{column!r} holds NUL at character {text.index(chr(0)) + 1}")
    lone = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if lone is not None:
        raise ValueError(f"{column!r} holds a lone surrogate, \\u{ord(text[lone]):04x}, at character {lone + 1}")
    return text


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _has(row: dict[str, Any], path: str) -> bool:
    try:
        return _get(row, path) is not None
    except ValueError:
        return False


def _get(row: dict[str, Any], path: str) -> Any:
    """A column by name, or by a path of names with dots between."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"no {path!r}, only {', '.join(map(repr, row)) or 'nothing'}")
        value = value[name]
    return value
