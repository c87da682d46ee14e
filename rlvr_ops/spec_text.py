"""Specs as text, which an op's schema can carry."""

from dataclasses import fields
from functools import lru_cache
from typing import Any

from rlvr_kernels.logits import Head
from rlvr_kernels.spec import PolicySpec, Surrogate


def encode(spec: PolicySpec | Head) -> str:
    """The text of a spec, its numbers in hexadecimal: exact, and of the few forms of them that torch.compile can trace."""
    pairs = [(field.name, getattr(spec, field.name)) for field in fields(spec)]
    return ",".join(f"{name}={_text(value)}" for name, value in pairs if value is not None)


def _text(value: float | str | Surrogate) -> str:
    if isinstance(value, Surrogate):
        return "/".join([value.form, *(float(number).hex() for number in (*value.positive, *value.negative))])
    return value if isinstance(value, str) else float(value).hex()


def _decode(text: str) -> dict[str, Any]:
    pairs = (pair.split("=") for pair in text.split(","))
    return {name: _value(value) for name, value in pairs}


def _value(text: str) -> float | str | Surrogate:
    if "/" in text:
        form, *numbers = text.split("/")
        a, b, c, d = map(float.fromhex, numbers)
        return Surrogate(form, (a, b), (c, d))
    return float.fromhex(text) if "0x" in text else text


@lru_cache(maxsize=256)
def decode_policy(text: str) -> PolicySpec:
    """The spec that `encode` wrote."""
    return PolicySpec(**_decode(text))


@lru_cache(maxsize=256)
def decode_head(text: str) -> Head:
    """The head that `encode` wrote."""
    return Head(**_decode(text))
