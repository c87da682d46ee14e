"""ACE's numbers: from the run's configuration, else from the environment, else our defaults."""

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

from rlvr_kernels.objective import Ace

FIELDS = {"alpha": "alpha", "confidence": "confidence", "confidence_reduction": "reduction", "shape": "shape"}
PREFIX = "RLVR_OPS_ACE_"

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # verl's root logger is at WARNING


def read_ace(section: Mapping[str, Any] | None = None, **defaults: str) -> Ace:
    """The record `Ace` of a configuration's section `ace`, the variables RLVR_OPS_ACE_*, and defaults; the first that speaks.

    Raises:
        ValueError, TypeError: an unknown key, or a value that `Ace` refuses.

    >>> read_ace({"alpha": 0.5}).alpha
    0.5
    """
    section = {} if section is None else section
    unknown = sorted(set(section) - set(FIELDS))
    if unknown:
        raise ValueError(f"the section ace takes {', '.join(FIELDS)}, got {', '.join(unknown)}")
    found: dict[str, Any] = dict(defaults)
    for key in FIELDS:
        value = section.get(key)
        value = os.environ.get(PREFIX + key.upper()) if value is None else value
        if value is not None:
            found[key] = _number(value) if key == "alpha" else value
    return Ace(**{FIELDS[key]: value for key, value in found.items()})


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"ace.alpha (or {PREFIX}ALPHA) must be a number, got {value!r}") from None


@functools.cache
def say_once(text: str) -> None:
    """Log a line the first time that this process says it."""
    logger.info("rlvr_ops: %s", text)
