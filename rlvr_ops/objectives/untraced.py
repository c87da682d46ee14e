"""A call that torch.compile must not trace.

It has a file of its own because the decorator imports torch._dynamo, which takes a second.
"""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="a surrogate function of your own fits no op's schema")
def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function outside of any graph."""
    return function(*arguments)
