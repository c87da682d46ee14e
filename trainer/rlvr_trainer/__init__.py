"""A thin loop for reinforcement learning with verifiable rewards: it owns no maths, `rlvr_ops` does."""
