"""`algorithm.surrogate`: a published surrogate by name, or a function of the user's by import path."""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache, partial, update_wrapper
from pathlib import Path
from types import ModuleType
from typing import Any

from rlvr_ops.surrogates import SURROGATES, Surrogate


def load_surrogate(name: str, parameters: dict[str, Any]) -> str | Surrogate | Callable[..., Any]:
    """A published surrogate by name, or a function by import path, with its parameters.

    Raises:
        ValueError: no such module, file or function, or parameters that it does not take.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon:
        return _published(name, parameters) if parameters and name in SURROGATES else name
    try:
        function = getattr(_import(where), attribute)
    except (ImportError, OSError, AttributeError, SyntaxError) as error:
        raise ValueError(f"surrogate={name} cannot be loaded: {error}") from error
    if not callable(function):
        raise ValueError(f"surrogate={name} must be a function, got {function!r}")
    try:
        inspect.signature(function).bind(None, None, **parameters)
    except TypeError as error:
        raise ValueError(
            f"surrogate={name} must take (per_token_logps, rows, **surrogate_parameters): {error}"
        ) from error
    return update_wrapper(partial(function, **parameters), function) if parameters else function  # keeps `whole_batch`


def _published(name: str, parameters: dict[str, Any]) -> Surrogate | Callable[..., Any]:
    record = SURROGATES[name]
    try:
        return record(**parameters)
    except TypeError as error:
        reason = str(error).replace(f"{record.__name__}.__init__", name)  # settings know it by that name
        raise ValueError(f"surrogate_parameters do not fit: {reason}") from error


@cache
def _import(where: str) -> ModuleType:
    """A module by its dotted name, the working directory included, or by the path of its file; loaded once."""
    if not where.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(f"surrogate_of_{Path(where).stem}", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
