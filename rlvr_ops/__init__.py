"""Losses for reinforcement learning with verifiable rewards, from hidden states and the lm_head, without the logits."""

from rlvr_kernels.backend import cuda_graph_warmup, explain_backend
from rlvr_kernels.objective import KL, Ace, Entropy

from rlvr_ops import surrogates
from rlvr_ops.advantages import (
    ace_advantages,
    arm_advantages,
    easy_but_brittle,
    gdpo_advantages,
    group_advantages,
    informative_groups,
    otb_advantages,
    overlong_penalty,
    squared_gradient_norms,
)
from rlvr_ops.calibration import (
    BordaVote,
    ReliabilityBins,
    auroc,
    borda_vote,
    brier_score,
    expected_calibration_error,
    reliability_bins,
    tokenised_brier_loss,
)
from rlvr_ops.evaluation import bootstrap_interval, paired_bootstrap_interval, pass_at_k
from rlvr_ops.head.from_model import hidden_states_of
from rlvr_ops.head.head import Head
from rlvr_ops.head.plan import Plan
from rlvr_ops.head.token_logps import TokenScores, token_logps
from rlvr_ops.losses.ace import (
    ACELoss,
    ace_loss,
    ace_loss_from_logps,
)
from rlvr_ops.losses.policy_loss import policy_loss
from rlvr_ops.losses.policy_loss_from_logps import policy_loss_from_logps
from rlvr_ops.losses.ppo import (
    bnpo_loss,
    bnpo_loss_from_logps,
    dapo_loss,
    dapo_loss_from_logps,
    dr_grpo_loss,
    dr_grpo_loss_from_logps,
    grpo_loss,
    grpo_loss_from_logps,
)
from rlvr_ops.losses.sequence import (
    gmpo_loss,
    gmpo_loss_from_logps,
    gspo_loss,
    gspo_loss_from_logps,
    luspo_loss,
    luspo_loss_from_logps,
    vespo_loss,
    vespo_loss_from_logps,
)
from rlvr_ops.losses.token import (
    cispo_loss,
    cispo_loss_from_logps,
    dispo_loss,
    dispo_loss_from_logps,
    reinforce_loss,
    reinforce_loss_from_logps,
    sapo_loss,
    sapo_loss_from_logps,
)
from rlvr_ops.objectives.custom import SurrogateRows
from rlvr_ops.objectives.objective import LossOutput, Objective
from rlvr_ops.objectives.sampling import SamplingCorrection
from rlvr_ops.rewards import (
    PPOCRewards,
    crew_reward,
    mean_self_certainty,
    mean_token_probability,
    ppo_c_reward,
    prompt4trust_reward,
    rlcr_reward,
    stated_confidence,
    stated_confidences,
    trust_grpo_reward,
)
from rlvr_ops.rollouts import Rollouts
from rlvr_ops.surrogates import Cispo, CispoTwoSided, Clip, Dispo, Dppo, Gmpo, Reinforce, Sapo, Vespo

__version__ = "0.1.0"

__all__ = [
    "KL",
    "ACELoss",
    "Ace",
    "BordaVote",
    "Cispo",
    "CispoTwoSided",
    "Clip",
    "Dispo",
    "Dppo",
    "Entropy",
    "Gmpo",
    "Head",
    "LossOutput",
    "Objective",
    "PPOCRewards",
    "Plan",
    "Reinforce",
    "ReliabilityBins",
    "Rollouts",
    "SamplingCorrection",
    "Sapo",
    "SurrogateRows",
    "TokenScores",
    "Vespo",
    "ace_advantages",
    "ace_loss",
    "ace_loss_from_logps",
    "arm_advantages",
    "auroc",
    "bnpo_loss",
    "bnpo_loss_from_logps",
    "bootstrap_interval",
    "borda_vote",
    "brier_score",
    "cispo_loss",
    "cispo_loss_from_logps",
    "crew_reward",
    "cuda_graph_warmup",
    "dapo_loss",
    "dapo_loss_from_logps",
    "dispo_loss",
    "dispo_loss_from_logps",
    "dr_grpo_loss",
    "dr_grpo_loss_from_logps",
    "easy_but_brittle",
    "expected_calibration_error",
    "explain_backend",
    "gdpo_advantages",
    "gmpo_loss",
    "gmpo_loss_from_logps",
    "group_advantages",
    "grpo_loss",
    "grpo_loss_from_logps",
    "gspo_loss",
    "gspo_loss_from_logps",
    "hidden_states_of",
    "informative_groups",
    "luspo_loss",
    "luspo_loss_from_logps",
    "mean_self_certainty",
    "mean_token_probability",
    "otb_advantages",
    "overlong_penalty",
    "paired_bootstrap_interval",
    "pass_at_k",
    "policy_loss",
    "policy_loss_from_logps",
    "ppo_c_reward",
    "prompt4trust_reward",
    "reinforce_loss",
    "reinforce_loss_from_logps",
    "reliability_bins",
    "rlcr_reward",
    "sapo_loss",
    "sapo_loss_from_logps",
    "squared_gradient_norms",
    "stated_confidence",
    "stated_confidences",
    "surrogates",
    "token_logps",
    "tokenised_brier_loss",
    "trust_grpo_reward",
    "vespo_loss",
    "vespo_loss_from_logps",
]
