"""Encode records as arguments of a custom op, so that torch.compile sees a whole loss as one op.

A record travels as a list of its tensors, a float64 tensor of its numbers, and a string for the rest. Numbers are data to the
compiler, so a scheduled hyper-parameter does not recompile.
"""

import ast
import pkgutil
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def encode(record: Any) -> tuple[list[Tensor], Tensor, str]:
    """Take a tree of frozen dataclasses apart into (tensors, numbers, text)."""
    tensors: list[Tensor] = []
    numbers: list[Any] = []
    text = _encode(record, tensors, numbers)
    # The compiler traces a symbolic float that is added to a tensor, and burns its value in otherwise.
    values = [torch.zeros(1, dtype=torch.float64) + number for number in numbers]
    return tensors, torch.cat(values), text


def _encode(value: Any, tensors: list[Tensor], numbers: list[Any]) -> str:
    if value is None or isinstance(value, str):
        return repr(value)
    if isinstance(value, bool):
        return "True" if value else "False"  # a comparison of symbols becomes a guard
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"('tensor', {len(tensors) - 1})"
    if isinstance(value, int | float):
        numbers.append(value)
        return f"('{'int' if isinstance(value, int) else 'float'}', {len(numbers) - 1})"
    if isinstance(value, torch.dtype):
        return f"('dtype', '{str(value)[6:]}')"
    if isinstance(value, tuple):
        return f"('tuple', {''.join([_encode(x, tensors, numbers) + ', ' for x in value])})"
    parts = [_encode(getattr(value, field.name), tensors, numbers) for field in fields(value)]
    return f"('{type(value).__module__}:{type(value).__qualname__}', {', '.join(parts)})"


def decode(tensors: list[Tensor], numbers: Tensor | None, text: str) -> Any:
    """Rebuild what `encode` took apart, without checking it again. numbers=None, while tracing, gives NaN."""
    return _decode(_parsed(text), tensors, None if numbers is None else numbers.tolist())


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    return ast.literal_eval(text)


def _decode(tree: Any, tensors: list[Tensor], numbers: list[float] | None) -> Any:
    if not isinstance(tree, tuple):
        return tree
    kind, *parts = tree
    if kind == "tensor":
        return tensors[parts[0]]
    if kind in ("int", "float"):
        return float("nan") if numbers is None else (int if kind == "int" else float)(numbers[parts[0]])
    if kind == "dtype":
        return getattr(torch, parts[0])
    values = [_decode(part, tensors, numbers) for part in parts]
    if kind == "tuple":
        return tuple(values)
    cls = pkgutil.resolve_name(kind)
    record = cls.__new__(cls)
    for field, value in zip(fields(cls), values, strict=True):
        object.__setattr__(record, field.name, value)
    return record
