"""slime: ACE in its loss (the policy in training) or in its advantages (the one that sampled), and our surrogates in the loss.

    echo "ace_alpha: 1.0" > ace.yaml  # ace_surrogate: cispo replaces slime's loss by ours
    ... --custom-config-path ace.yaml --use-kl-loss --kl-loss-coef 0 --ref-load /path/to/reference
        --loss-type custom_loss --custom-loss-function-path rlvr_ops.integrations.slime.ace_loss

or, with the policy that sampled, in the place of the last line

        --custom-advantage-function-path rlvr_ops.integrations.slime.ace_advantages --get-mismatch-metrics

`--use-kl-loss` makes slime score the reference, also with coefficient 0. With one update for each rollout slime skips the old
policy's log-probabilities; `--get-mismatch-metrics` or `--use-rollout-logprobs` gives the advantages some.

Read at commit 624b824 (version 0.3.1).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlvr_ops.integrations.settings import Settings, ace_factor
from rlvr_ops.rollouts import Rollouts

PREFIX = "ace_"
HOW = "give --use-kl-loss (with --kl-loss-coef 0 it adds no term) and --ref-load"
ESTIMATORS = ("grpo", "gspo", "cispo")  # whose advantage is the reward that slime has normalised within its group


def ace_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Set rollout_data["advantages"] and ["returns"] to GRPO's advantages, weighted by ACE, one (T_i,) for each sample.

    The confidence is that of the policy that sampled. slime's own loss follows.

    Raises:
        ValueError: log_probs or ref_log_probs are missing; another estimator, or normalised advantages.
    """
    settings = Settings(**({"confidence": "old"} | _given(args)))
    if settings.confidence != "old" or settings.surrogate is not None:
        raise ValueError(
            "ace_confidence='current' and ace_surrogate need the policy in training, which advantages are made before: use "
            "--loss-type custom_loss --custom-loss-function-path rlvr_ops.integrations.slime.ace_loss"
        )
    if args.advantage_estimator not in ESTIMATORS:
        raise ValueError(f"--advantage-estimator must be one of {ESTIMATORS}, got {args.advantage_estimator!r}")
    _refuse_normalised(args)
    logps = rollout_data.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    if not logps:
        raise ValueError(
            "log_probs is missing, which slime skips with one update for each rollout: give --get-mismatch-metrics or "
            "--use-rollout-logprobs"
        )
    rewards = torch.tensor(rollout_data["rewards"], dtype=torch.float32, device=logps[0].device)
    returns = [torch.full_like(logp, reward) for logp, reward in zip(logps, rewards.tolist(), strict=True)]
    rollouts = _rollouts(args, rollout_data, returns, logps)
    settings.check_reference("ref_log_probs", rollouts, torch.cat(logps), HOW)
    weighted = settings.advantages(torch.cat(logps), rollouts)
    rollout_data["returns"] = returns
    rollout_data["advantages"] = list(weighted.split([len(logp) for logp in logps]))


def ace_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's policy loss on advantages that ACE has weighted, or one of our surrogates reduced by `sum_of_sample_mean`.

    With `ace_surrogate`, slime's own loss runs on zero advantages, which leaves its entropy and KL terms and its metrics.
    Costs one more log-softmax of the logits, without a gradient unless the surrogate is ours.

    Raises:
        ValueError: ref_log_probs is missing.
    """
    from slime.backends.megatron_utils.loss import (
        get_log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs,
        policy_loss_function,
    )

    settings = Settings(**_given(args))
    settings.refuse_whole_batches("its advantages carry the denominators that slime's reducer has for each sample")
    ours = settings.surrogate is not None
    _refuse_normalised(args)
    for name in ("use_tis", "use_opsm", "custom_pg_loss_reducer_function_path") if ours else ():
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} changes slime's own loss, which ace_surrogate replaces: drop one"
            )
    with torch.set_grad_enabled(ours):
        _, scored = get_log_probs_and_entropy(
            logits, args=args, unconcat_tokens=batch["unconcat_tokens"], total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"], **get_rollout_top_p_logprob_kwargs(args, batch),
        )  # fmt: skip
    logps = torch.cat(scored["log_probs"])
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    rollouts = _rollouts(args, batch, batch["advantages"], old)
    settings.check_reference("ref_log_probs", rollouts, logps, HOW)
    weighted = settings.advantages(logps, rollouts)
    own = torch.zeros_like(weighted) if ours else weighted
    shown = {**batch, "advantages": list(own.split(batch["response_lengths"]))}
    loss, reported = policy_loss_function(args, shown, logits, sum_of_sample_mean)
    reported = {**reported, "ace/weight": sum_of_sample_mean(ace_factor(rollouts.advantages, weighted))}
    if ours:
        scaled = replace(rollouts, advantages=weighted * _weights(sum_of_sample_mean, logps))
        pg_loss = settings.loss(logps, scaled, "dapo").loss
        loss = loss + pg_loss
        reported |= {"loss": loss.detach(), "pg_loss": pg_loss.detach()}
    return loss, reported


def _given(args: Any) -> dict[str, Any]:
    return {name[len(PREFIX) :]: value for name, value in vars(args).items() if name.startswith(PREFIX)}


def _refuse_normalised(args: Any) -> None:
    if args.normalize_advantages:
        raise ValueError("--normalize-advantages would shift what ACE has weighted: drop it")


def _rollouts(args: Any, data: dict[str, Any], advantages: list[Tensor], old: list[Tensor] | None) -> Rollouts:
    """Pack slime's lists of (T_i,) into rows (N,). Each loss is a sum, as slime divides by itself."""
    if args.context_parallel_size > 1:
        raise ValueError("--context-parallel-size must be 1: ACE needs a rollout's tokens together")
    ref = data.get("ref_log_probs")
    ends = torch.tensor([0, *(len(values) for values in advantages)]).cumsum(0)
    return Rollouts(
        None, torch.cat(advantages), torch.cat(ref) if ref else None, torch.cat(old) if old else None,
        torch.cat(data["rollout_log_probs"]) if data.get("rollout_log_probs") else None, torch.cat(data["loss_masks"]),
        ends, 1,
    )  # fmt: skip


def _weights(reducer: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """How much slime's reduction, which is linear, counts each token (N,)."""
    with torch.enable_grad():
        ones = torch.ones_like(like, requires_grad=True)
        return torch.autograd.grad(reducer(ones), ones)[0]
