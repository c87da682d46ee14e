"""NeMo-RL: ACE and our surrogates around its own clipped policy-gradient loss.

In a copy of examples/run_grpo.py, after `setup` has returned its `loss_fn`:

    from rlvr_ops.integrations.nemo_rl import ACELossFn
    loss_fn = ACELossFn(loss_fn, alpha=1.0)  # surrogate="cispo" replaces the clipped loss by ours
    loss_fn.loss_fn.reference_policy_kl_penalty = 0  # optional: the reference without a KL term

with `loss_fn.reference_policy_kl_penalty: 0.01` in the configuration: NeMo-RL loads a reference only if that is above 0.

Read at commit 7ea279a (version 0.6.0). The trainer with a single controller builds its loss in a worker and takes none.
"""

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor

from rlvr_ops.integrations.settings import Settings, ace_factor
from rlvr_ops.rollouts import Rollouts

HOW = (
    "set loss_fn.reference_policy_kl_penalty above 0 and grpo.skip_reference_policy_logprobs_calculation to false in the "
    "configuration"
)


class ACELossFn:
    """A NeMo-RL LossFunction that gives `loss_fn`, a ClippedPGLossFn, advantages that ACE has weighted.

    With a `surrogate`, `loss_fn` runs on zero advantages, which leaves its KL term and its metrics, and our loss is added with
    the same denominator: global_valid_toks, or global_valid_seqs if `loss_fn` averages rollouts. Its ratio_clip_*, use_cispo,
    disable_ppo_ratio and importance-sampling corrections are then not read; the settings hold ours.

    Reads prev_logprobs (the old policy; none under force_on_policy_ratio), generation_logprobs (the engine that sampled) and
    reference_policy_logprobs, all of shape (B, S), of which column 0 predicts nothing.

    Raises:
        ValueError: reference_policy_logprobs is missing or, where NeMo-RL skipped it, zeros.
    """

    def __init__(self, loss_fn: Any, **settings: Any) -> None:
        from nemo_rl.algorithms.loss.interfaces import MetricNormalizer

        self.loss_fn, self.settings = loss_fn, Settings(**settings)
        own = getattr(loss_fn, "metric_normalizations", {})
        self.metric_normalizations = {**own, "ace/weight": MetricNormalizer.TOKENS}

    def __getattr__(self, name: str) -> Any:
        if name == "loss_fn":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.loss_fn, name)

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a micro-batch, and the metrics of `loss_fn` with `ace/weight`, the mean factor of a token's advantage."""
        rollouts = self._rollouts(data)
        whole = data.get("curr_logprobs_unfiltered", next_token_logprobs)  # as the reference: without top-k and top-p
        self.settings.check_reference("reference_policy_logprobs", rollouts, whole, HOW)
        weighted = self.settings.advantages(whole, rollouts)
        ours = self.settings.surrogate is not None
        if len(next_token_logprobs) == 1:
            self.settings.refuse_whole_batches("NeMo-RL hands over one sequence: turn sequence packing off")
        shown = copy.copy(data)
        shown["advantages"] = data["advantages"].clone()
        shown["advantages"][:, 1:] = 0 if ours else weighted
        loss, metrics = self.loss_fn(next_token_logprobs, shown, global_valid_seqs, global_valid_toks)
        factor = ace_factor(rollouts.advantages, weighted).masked_fill(_mask(data) == 0, 0)
        metrics |= {"ace/weight": float(factor.sum() / global_valid_toks)}
        if ours:
            token_level = self.loss_fn.loss_type.name == "TOKEN_LEVEL"
            count = global_valid_toks if token_level else global_valid_seqs
            counted = replace(rollouts, advantages=weighted, num_items_in_batch=count)
            found = self.settings.loss(next_token_logprobs, counted, "dapo" if token_level else "grpo")
            loss = loss + found.loss
            metrics |= {"loss": loss.item()}
        return loss, metrics

    def _rollouts(self, data: Any) -> Rollouts:
        ref = data.get("reference_policy_logprobs")
        old = None if getattr(self.loss_fn, "force_on_policy_ratio", False) else data["prev_logprobs"][:, 1:]
        return Rollouts(
            None, data["advantages"][:, 1:], None if ref is None else ref[:, 1:], old,
            data["generation_logprobs"][:, 1:], _mask(data),
        )  # fmt: skip


def _mask(data: Any) -> Tensor:
    """Which tokens (B, S - 1) count."""
    return data["token_mask"][:, 1:] * data["sample_mask"][:, None]
