"""prime-rl: ACE and our surrogates as its custom loss, and a reference for its `grpo` algorithm.

    [trainer.loss]
    type = "custom"
    import_path = "rlvr_ops.integrations.prime_rl.ace_loss"
    kwargs = {alpha = 1.0}  # surrogate = "cispo" replaces prime-rl's loss by ours

prime-rl scores a reference for its distillation algorithms only, and no setting adds one to `grpo`. So start its processes one by
one, and this in the place of `orchestrator`:

    from prime_rl.entrypoints.orchestrator import main
    from rlvr_ops.integrations.prime_rl import score_reference
    score_reference("Qwen/Qwen3-4B", "http://localhost:8001/v1")
    main()

Read at commit 559b447 (version 0.8.0).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from rlvr_ops.integrations.settings import Settings
from rlvr_ops.rollouts import Rollouts

HOW = "call rlvr_ops.integrations.prime_rl.score_reference in the orchestrator's process"


def ace_loss(inputs: Any, *, default: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """ACE's loss of one sequence, summed over its tokens as prime-rl wants it: prime-rl divides by the global token count.

    inputs: prime-rl's LossInputs, tensors (T,). The policy that sampled is inference_logprobs.
    default: the numbers of prime-rl's own loss (DefaultLossConfig), which runs on ACE's advantages. With a `surrogate` it
        runs on zero advantages and leaves its KL term to `inference_logprobs`; kl_tau=0 removes that.
    settings: those of `Settings`.

    Returns LossOutputs, with `ace/*` among the metrics.

    Raises:
        ValueError: ref_logprobs is missing and alpha > 0; a surrogate that compares sequences.
    """
    from prime_rl.configs.trainer import DefaultLossConfig
    from prime_rl.trainer.rl.loss import LossOutputs, default_loss_fn

    chosen = Settings(**settings)
    chosen.refuse_whole_batches("prime-rl hands over one sequence at a time")
    logps = inputs.trainer_logprobs
    rollouts = Rollouts(
        None, inputs.advantages, inputs.ref_logprobs, inputs.inference_logprobs, inputs.inference_logprobs,
        inputs.loss_mask, torch.tensor([0, logps.shape[0]]), 1,
    )  # fmt: skip
    chosen.check_reference("LossInputs.ref_logprobs", rollouts, logps, HOW)
    ours, weighted = chosen.surrogate is not None, chosen.advantages(logps, rollouts)
    shown = replace(inputs, advantages=torch.zeros_like(weighted) if ours else weighted)
    own = default_loss_fn(shown, DefaultLossConfig(**(default or {})))
    loss, metrics = own.loss, own.metrics | chosen.metrics(logps, rollouts)
    if ours:
        if inputs.loss_weights is not None:  # each token's loss, which every surrogate is linear in
            weighted = weighted * inputs.loss_weights
        found = chosen.loss(logps, replace(rollouts, advantages=weighted), "dapo")
        loss, metrics = loss + found.loss, found.metrics | metrics
    return LossOutputs(loss=loss, metrics=metrics)


def score_reference(name: str, base_url: str) -> None:
    """Make `grpo` score each rollout under a frozen model as well, by the code that prime-rl's `opd` does it with.

    name, base_url: the served model and its OpenAI-compatible endpoint; prime-rl does not start it. Call it in the
    orchestrator's process before its `main`. Sample at temperature 1: the endpoint's log-probabilities are those.
    """
    from prime_rl.configs.algorithm import FrozenModelConfig
    from prime_rl.orchestrator import algo

    class ReferenceScoredGRPO(algo.GRPOAlgorithm):
        score_episode = algo.OPDAlgorithm.score_episode

        async def setup(self) -> None:
            self.teacher_pool = await self.connect(FrozenModelConfig(name=name, base_url=base_url))

    algo.ALGORITHM_CLASSES["grpo"] = ReferenceScoredGRPO
