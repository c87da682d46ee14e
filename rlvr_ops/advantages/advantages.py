"""group_advantages: rewards (B,) of grouped rollouts to advantages (B,), by the estimator of your choice. O(B)."""

from __future__ import annotations

import torch
from rlvr_kernels.logits import sum_dtype
from torch import Tensor

from rlvr_ops.advantages import inputs
from rlvr_ops.advantages.estimators import ESTIMATORS as FORMULAS
from rlvr_ops.advantages.groups import make_groups

ESTIMATORS = tuple(FORMULAS)


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    estimator: str = "grpo",
    *,
    group_ids: Tensor | None = None,
    eps: float = 1e-4,
    lengths: Tensor | None = None,
    reward_baselines: Tensor | None = None,
    squared_gradient_norms: Tensor | None = None,
    confidences: Tensor | None = None,
    pair_ids: Tensor | None = None,
    lambda_neg: float | Tensor | None = None,
    positive_weight: float | None = None,
    negative_group_weight: float | None = None,
) -> Tensor:
    """Advantage of every rollout over the other rollouts of its prompt.

    `rewards` is (B,). Give the groups in one of two ways: `group_size`, the G rollouts of a prompt next to each other; or
    `group_ids` (B,), any whole numbers, for groups of any sizes in any order. Below, r are the rewards of a group and G is
    its size. A * marks estimators of verdicts, where r must be 0 or 1.

    - `grpo`          (r - mean) / (std + eps), with the sample standard deviation (arXiv 2402.03300). TRL's eps is 1e-4,
                      verl's 1e-6; the choice matters where rewards hardly differ.
    - `dr_grpo`       r - mean (arXiv 2503.20783).
    - `rloo`          r minus the mean of the other rewards, G / (G - 1) (r - mean) (arXiv 2402.14740).
    - `lite_ppo`      (r - mean) / (std + eps), with the mean of the group and the deviation of the batch (arXiv 2508.08221;
                      TRL's scale_rewards="batch"), so pass the whole batch at once.
    - `gpg`           (r - mean) B / M, with M of the batch's B rollouts in groups whose rewards differ (arXiv 2504.02546 and
                      its code), so pass the whole batch at once. verl counts nonzero rewards in the place of M.
    - `grpo_passk`    (r - second largest) / (std + eps) for the best rollout of a group and 0 for the others, or for all
                      where several are best (arXiv 2503.19595, read in verl). Never negative.
    - `maxrl` *       (r - p) / p, with p the pass rate (arXiv 2602.02710 and its code).
    - `remax`         r - `reward_baselines` (B,), each the reward of the greedy completion of the rollout's prompt (arXiv
                      2310.10505, read in verl).
    - `opo`           r - sum(T r) / sum(T), with T = `lengths` in tokens (arXiv 2505.23585).
    - `bnpo` *        (r - p) / Beta-pdf(p; a, b), with p the pass rate and a, b fitted to the batch's pass rates
                      (arXiv 2506.02864 and its code). It compares prompts, so pass the whole batch at once. With one
                      group, or equal pass rates, a = b = 1 and it is `dr_grpo`. TRL's `bnpo` is something else: a way to
                      aggregate a loss.
    - `psr` *         r; `nsr` * r - 1; `w_reinforce` * positive_weight r - (1 - r), positive_weight 0.1 by default. No
                      baseline, no normalisation (arXiv 2506.01347).
    - `paired` *      (u - mean) / (std + eps) over the rollouts of two prompts, u = 1 where correct and -lambda_neg where
                      wrong. Needs `pair_ids` (B,), equal for the two groups of a pair, and `lambda_neg`, a number or (B,).
                      A single number cancels in the normalisation, up to eps; one per rollout does not. Weighted GRPO of
                      arXiv 2602.03452, from a reading note: lambda_neg and the normalisation are not verified.
    - `oblr`          r - sum(w r) / sum(w), with w = `squared_gradient_norms` (B,) of grad log pi, as the function of that
                      name estimates (arXiv 2511.23310). The baseline is derived, not read there; its learning rate is not
                      included.
    - `reinforce_plus_plus`  (r - mean) / sqrt(var + 1e-8) over the batch (arXiv 2501.03262), so pass the whole batch at
                      once. With `lengths` a rollout counts once a token, as in verl; without, once.
    - `reinforce_plus_plus_baseline`  the same of r - mean, with the mean of the group (arXiv 2501.03262).
    - `lens` *        GRPO of the calibrated rewards r - (1 - r) / G p / (D - p), D = max(G / sum(r / p), 2 max p), with
                      p = `confidences` (B,): exp(mean logp) under the sampling policy. Groups without a correct rollout
                      are centred and multiplied by negative_group_weight, 0.25 by default (arXiv 2510.08696, section 5.1).
                      Its equation 14 sums plain probabilities, which underflow; p replaces them.

    Where nothing differs the advantage is exactly 0, in every estimator but `psr`, `nsr`, `w_reinforce` and `remax`: equal
    rewards in a group (calibrated ones for `lens`; in a pair for `paired`; in the batch for `reinforce_plus_plus`, and in
    each of its groups for `reinforce_plus_plus_baseline` with `lengths`), or a group of one, which `rloo` and `grpo_passk`
    refuse. Weights that are all 0 in a group count alike. An argument that the estimator does not use is refused, except
    `eps`. Several rewards a rollout are for `gdpo_advantages`, and a baseline for each token is in `otb_advantages`.

    Computed in float64. The result is a constant to any gradient, in the dtype of floating `rewards`, else float32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted; the rollout of a NaN or inf reward.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "dr_grpo")
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    >>> group_advantages(torch.tensor([1.0, 4.0, 0.0]), group_ids=torch.tensor([7, 3, 7]), estimator="rloo")
    Traceback (most recent call last):
    ValueError: estimator 'rloo' compares a rollout with its group's others: every group needs 2 or more, group 3 has 1
    """
    groups = make_groups("rewards", rewards, group_size, group_ids)
    inputs.check_finite("rewards", rewards, group_size, group_ids)
    chosen = inputs.look_up(estimator)
    given = {
        "lengths": lengths,
        "reward_baselines": reward_baselines,
        "squared_gradient_norms": squared_gradient_norms,
        "confidences": confidences,
        "pair_ids": pair_ids,
        "lambda_neg": lambda_neg,
        "positive_weight": positive_weight,
        "negative_group_weight": negative_group_weight,
    }
    inputs.check_given(estimator, chosen, given, eps)
    inputs.check_rewards(estimator, chosen, rewards)
    inputs.check_sizes(estimator, chosen, groups, group_size, group_ids)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    r = rewards.detach().to(sum_dtype(rewards.device))
    used = {name: inputs.prepare(name, value, rewards, r.dtype) for name, value in given.items() if value is not None}
    if "pair_ids" in used:
        used["pairs"] = inputs.make_pairs(used.pop("pair_ids"), groups)
    if "eps" in chosen.takes:
        used["eps"] = eps
    return chosen.formula(r, groups, **used).to(dtype) + 0.0  # -0.0 + 0.0 is 0.0
