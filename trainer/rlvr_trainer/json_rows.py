"""JSON as data for training: numbers as they were written, and nothing in it that another reader would read otherwise."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

BOM = b"\xef\xbb\xbf"
SPACE = " \t\r\n"  # JSON's own; Python's includes U+2028 and others that are text here


@dataclass(frozen=True)
class Row:
    """One row of a source: what stands there, or why it cannot be read."""

    where: str  # "line 7", "row 7": counted from 1, as editors do
    value: Any
    fault: str = ""


def json_lines(data: bytes) -> list[Row]:
    r"""A row per line that is not blank. Lines end at `\n` alone, so U+2028 in a text ends none."""
    lines = enumerate(data.removeprefix(BOM).split(b"\n"), start=1)
    return [_row(f"line {number}", line) for number, line in lines if line.strip(SPACE.encode())]


def json_array(data: bytes) -> list[Row]:
    """A row per element of one array. What cannot be parsed hides everything behind it, and so is the last row."""
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        return [Row(f"line {data.count(10, 0, error.start) + 1}", None, f"not UTF-8: {error.reason}")]
    return list(_elements(text))


def is_array(data: bytes) -> bool:
    """Whether the first character is a bracket."""
    return data.removeprefix(BOM).lstrip(SPACE.encode()).startswith(b"[")


def _row(where: str, line: bytes) -> Row:
    try:
        return Row(where, _DECODER.decode(line.decode()))
    except UnicodeDecodeError as error:
        return Row(where, None, f"not UTF-8: {error.reason}")
    except (ValueError, RecursionError) as error:
        return Row(where, None, _reason(error))


def _elements(text: str) -> Iterator[Row]:
    start = text.index("[") + 1
    position, line, number = _skip(text, start), 1 + text.count("\n", 0, start), 0
    more = not text.startswith("]", position)
    while more:
        line, number, start = line + text.count("\n", start, position), number + 1, position
        where = f"row {number} on line {line}"
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield Row(where, None, _reason(error))
            return
        yield Row(where, value)
        position = _skip(text, position)
        more = text.startswith(",", position)
        if more:
            position = _skip(text, position + 1)
        elif not text.startswith("]", position):
            yield Row(f"behind {where}", None, "a comma or the array's end is wanted")
            return
    if _skip(text, position + 1) < len(text):
        yield Row(f"behind row {number}", None, "the array has ended and something follows")


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] and text[position] in SPACE:
        position += 1
    return position


def _reason(error: Exception) -> str:
    """What is wrong without the parser's own line number, which counts from the start of the row."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return (
        f"{error.msg.removesuffix(' at')} at column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else str(error)
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return found


# Numbers stay text: as floats 0.00001 would become 1e-05 and 1e400 infinite.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse_constant, object_pairs_hook=_object)
