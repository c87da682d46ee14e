"""Pass@k without bias, and bootstrap intervals for means over problems."""

from rlvr_ops.evaluation.bootstrap import bootstrap_interval, paired_bootstrap_interval
from rlvr_ops.evaluation.pass_rates import pass_at_k

__all__ = ["bootstrap_interval", "paired_bootstrap_interval", "pass_at_k"]
