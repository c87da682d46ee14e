"""A thin loop for reinforcement learning with verifiable rewards: it owns no maths, `rlvr_ops` does."""

from rlvr_trainer.judging import BadReferenceError, Verdict, judge

__all__ = ["BadReferenceError", "Verdict", "judge"]
