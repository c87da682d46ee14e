"""How a policy loss sees the reference: verl's registry hands a loss no `ref_log_prob`, though the batch has it.

`scored_by` holds the batch's reference while verl's own loss function runs. A registered loss, called inside of it, reads it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from rlvr_kernels.objective import Ace
from torch import Tensor


class Reference(NamedTuple):
    """The reference's log-probabilities (B, T) of a micro-batch, None if it was not scored; and ACE's numbers, if given."""

    per_token_logps: Tensor | None = None
    ace: Ace | None = None


NOTHING = Reference()
_current: ContextVar[Reference] = ContextVar("rlvr_ops_reference", default=NOTHING)
current = _current.get


@contextmanager
def scored_by(data: Any, ace: Ace | None = None) -> Iterator[None]:
    """Let losses called in this context read data's ref_log_prob, and ACE's numbers (else they read the environment)."""
    logps = data.select("ref_log_prob").to_padded_tensor()["ref_log_prob"] if "ref_log_prob" in data else None
    token = _current.set(Reference(logps, ace))
    try:
        yield
    finally:
        _current.reset(token)


def ppo_loss(model_output: Any, data: Any, dp_group: Any = None, *, config: Any, ace: Ace | None = None) -> Any:
    """verl's `ppo_loss` for `set_loss_fn(partial(ppo_loss, config=actor_config))`, whose losses can read the reference."""
    from verl.workers.utils import losses

    with scored_by(data, ace):
        return losses.ppo_loss(config, model_output, data, dp_group)
