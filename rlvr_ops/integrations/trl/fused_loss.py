"""TRL's GRPO loss as an `Objective`, computed from hidden states in the model's forward."""

import inspect
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from rlvr_ops import KL, Cispo, Clip, Objective, Plan, Rollouts, SamplingCorrection, Sapo, Vespo
from rlvr_ops.integrations.trl.fused_head import FusedOutput, PolicyCall
from rlvr_ops.integrations.trl.metrics import log_ace, log_like_trl
from rlvr_ops.integrations.trl.reweighting import completion_mask_of
from rlvr_ops.surrogates import Surrogate

AGGREGATIONS = {"cispo": "dapo", "vespo": "dapo", "sapo": "grpo"}
"""How a loss type of TRL averages its tokens, where that has another name."""
PLAN = Plan(with_entropy=True)
INPUTS = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
"""What a model may take beside tokens, such as pixels, by TRL's names."""


def objective_of(trainer: Any) -> Objective | None:
    """The objective that a trainer's settings describe now: callbacks may change them.

    None if its loss is made of more than an objective is: TRL then computes it, from our head's log-probabilities and
    entropies. docs/trl.md lists these settings.
    """
    sampling, loss_type = _sampling(trainer), trainer.loss_type
    if _is_more_than_an_objective(trainer, sampling):
        return None
    return Objective(
        _surrogate(trainer),
        ace=trainer._ace,
        kl=KL("k3", trainer.beta, _corrects_kl(trainer)),
        importance_sampling_level="token" if loss_type == "vespo" else trainer.importance_sampling_level,
        off_policy_mask_threshold=trainer.off_policy_mask_threshold,
        sampling=sampling,
        aggregation=AGGREGATIONS.get(loss_type, loss_type),
        max_completion_length=trainer.max_completion_length,
    )


def _is_more_than_an_objective(trainer: Any, sampling: SamplingCorrection | None) -> bool:
    """Whether the loss has an entropy term normalised in TRL's way, or ratios that an objective does not combine."""
    corrected_vespo = trainer.loss_type == "vespo" and sampling is not None
    return (
        trainer._entropy_bonus_enabled
        or trainer.top_entropy_quantile < 1
        or (_corrects_kl(trainer) and trainer.importance_sampling_level == "sequence")
        or (corrected_vespo and (_corrects_kl(trainer) or trainer._ace.confidence == "old"))
    )


def _corrects_kl(trainer: Any) -> bool:
    return bool(trainer.beta and trainer.args.use_bias_correction_kl)


def _surrogate(trainer: Any) -> Surrogate:
    args, loss_type = trainer.args, trainer.loss_type
    if loss_type == "cispo":
        return Cispo(trainer.epsilon_high)
    if loss_type == "sapo":
        return Sapo(args.sapo_temperature_pos, args.sapo_temperature_neg)
    if loss_type == "vespo":
        return Vespo(args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg)
    return Clip(trainer.epsilon_low, trainer.epsilon_high, args.delta)


def _sampling(trainer: Any) -> SamplingCorrection | None:
    if not (trainer.use_vllm and trainer.vllm_importance_sampling_correction):
        return None
    bounds = trainer.vllm_importance_sampling_clip_max, trainer.vllm_importance_sampling_clip_min
    return SamplingCorrection(trainer.vllm_importance_sampling_mode, *bounds)


def fused_loss(trainer: Any, model: Any, inputs: dict[str, Any], objective: Objective) -> Tensor:
    """The loss of one micro-batch, and its metrics in the trainer's log."""
    mode = "train" if trainer.model.training else "eval"
    accumulation = trainer.current_gradient_accumulation_steps if mode == "train" else 1
    length = inputs["completion_ids"].shape[1]
    call = PolicyCall(_rollouts(trainer, inputs, objective, mode), objective, PLAN, length)
    output = _forward(trainer, model, inputs, call)
    loss: Tensor = output.loss if objective.aggregation == "dapo" else output.loss / accumulation
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * output.aux_loss / accumulation
        trainer._metrics[mode]["aux_loss"].append(trainer.accelerator.gather_for_metrics(output.aux_loss).mean().item())
    logps = output.log_probs.detach()
    log_like_trl(trainer, inputs, call, logps, output.entropy)
    if objective.ace.alpha > 0:
        log_ace(trainer, objective.ace, inputs, logps)
    return loss


def _rollouts(trainer: Any, inputs: dict[str, Any], objective: Objective, mode: str) -> Rollouts:
    sampled = objective.sampling is not None or objective.off_policy_mask_threshold is not None
    return Rollouts(
        inputs["completion_ids"], inputs["advantages"],
        inputs.get("ref_per_token_logps") if objective.needs_reference else None, inputs.get("old_per_token_logps"),
        inputs.get("sampling_per_token_logps") if sampled else None, completion_mask_of(inputs),
        num_items_in_batch=_tokens(trainer, inputs, mode) if objective.aggregation == "dapo" else None,
    )  # fmt: skip


def _tokens(trainer: Any, inputs: dict[str, Any], mode: str) -> Tensor:
    """The tokens of one update and process. TRL counts those of all batches that were generated together."""
    tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if mode == "train":
        tokens = tokens * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
    return tokens


def _forward(trainer: Any, model: Any, inputs: dict[str, Any], call: PolicyCall) -> FusedOutput:
    """Call the model with the loss, by way of TRL's own method: it knows the inputs of every model."""
    outputs: list[FusedOutput] = []

    def with_loss(**keywords: Any) -> FusedOutput:
        keywords.pop("with_entropy", None)
        outputs.append(model(**keywords, policy_call=call))
        return outputs[0]

    score = trainer._get_per_token_logps_and_entropies
    others = {name: inputs[name] for name in INPUTS if name in inputs}
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    score(with_loss, ids, mask, call.length, compute_aux_loss=trainer.aux_loss_enabled, **others)
    return outputs[0]
