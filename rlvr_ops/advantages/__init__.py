"""Advantages from the rewards of groups of rollouts, and what shapes or selects them."""

from rlvr_ops.advantages.ace import ace_advantages
from rlvr_ops.advantages.advantages import ESTIMATORS, group_advantages
from rlvr_ops.advantages.arm import arm_advantages
from rlvr_ops.advantages.gdpo import gdpo_advantages
from rlvr_ops.advantages.gradient_norms import squared_gradient_norms
from rlvr_ops.advantages.otb import otb_advantages
from rlvr_ops.advantages.overlong import overlong_penalty
from rlvr_ops.advantages.selection import easy_but_brittle, informative_groups

__all__ = [
    "ESTIMATORS",
    "ace_advantages",
    "arm_advantages",
    "easy_but_brittle",
    "gdpo_advantages",
    "group_advantages",
    "informative_groups",
    "otb_advantages",
    "overlong_penalty",
    "squared_gradient_norms",
]
