"""Rewards that look at confidence, and the confidences themselves."""

from rlvr_ops.rewards.crew import crew_reward
from rlvr_ops.rewards.ppo_c import PPOCRewards, ppo_c_reward
from rlvr_ops.rewards.scoring_rules import prompt4trust_reward, rlcr_reward
from rlvr_ops.rewards.stated import stated_confidence, stated_confidences
from rlvr_ops.rewards.token_confidence import mean_self_certainty, mean_token_probability
from rlvr_ops.rewards.trust_grpo import trust_grpo_reward

__all__ = [
    "PPOCRewards",
    "crew_reward",
    "mean_self_certainty",
    "mean_token_probability",
    "ppo_c_reward",
    "prompt4trust_reward",
    "rlcr_reward",
    "stated_confidence",
    "stated_confidences",
    "trust_grpo_reward",
]
