"""TRL's GRPOTrainer without a model: its own methods, on an object that holds only what they read."""

from collections import defaultdict
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from parity_cases import Batch, Outcome, differentiate

# What GRPOTrainer.__init__ takes from its arguments under the same name.
SAME_NAME = (
    "loss_type", "importance_sampling_level", "beta", "top_entropy_quantile", "off_policy_mask_threshold", "entropy_coef",
    "use_adaptive_entropy", "use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "max_completion_length", "num_iterations",
    "mask_truncated_completions", "pad_to_multiple_of", "num_generations", "scale_rewards", "multi_objective_aggregation",
)  # fmt: skip


@cache
def trainer_class() -> type:
    """GRPOTrainer with the methods replaced that would need a model, a sampler or a verifier; imported once."""
    pytest.importorskip("trl")
    from accelerate import Accelerator
    from trl.trainer.grpo_trainer import GRPOTrainer

    class WithoutModel(GRPOTrainer):
        def __init__(self, config, *, accumulation=1, training=True, **answers):
            for name in SAME_NAME:
                setattr(self, name, getattr(config, name))
            self.args, self.answers = config, answers
            self.epsilon_low = config.epsilon
            self.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
            self._entropy_bonus_enabled = self.entropy_coef != 0.0
            self.aux_loss_enabled, self.current_gradient_accumulation_steps = False, accumulation
            self.model = SimpleNamespace(training=training, is_gradient_checkpointing=False)
            self.ref_model, self.state = "reference", SimpleNamespace(global_step=0)
            self.accelerator = Accelerator(cpu=True)
            self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
            self._logs = defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)}
            self._pending_extra_logs, self._pending_metrics = {}, {}
            self._tokenizer = SimpleNamespace(pad_token_id=0)
            self.environment_factories = self.environments = self.tools = None
            weights = config.reward_weights or [1.0]
            self.reward_weights, self.reward_funcs = torch.tensor(weights), [None] * len(weights)
            self.reward_func_names = [f"verifier {i}" for i in range(len(weights))]

        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            return self.answers["reference" if model == "reference" else "policy"]

        def _generate(self, prompts):
            return self.answers["generated"]

        def _calculate_rewards(self, *args):
            return self.answers["rewards"]

    return WithoutModel


def trainer(**config):
    """The smallest trainer that a GRPOConfig of these fields makes."""
    made = trainer_class()
    from trl import GRPOConfig

    mine = {name: config.pop(name) for name in ("accumulation", "training", "policy", "reference", "generated", "rewards")
            if name in config}  # fmt: skip
    quiet = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], "per_device_train_batch_size": 6}
    return made(GRPOConfig(**quiet | {"num_generations": 3} | config), **mine)


def compute_loss(batch: Batch, *, old=False, sampling=None, num_items=None, **config) -> Outcome:
    """`GRPOTrainer._compute_loss` of the batch, and its gradients."""
    b, t = batch.logps.shape
    inputs = {
        "prompt_ids": torch.ones(b, 1, dtype=torch.long),
        "prompt_mask": torch.ones(b, 1, dtype=torch.long),
        "completion_ids": torch.ones(b, t, dtype=torch.long),
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "num_items_in_batch": batch.mask.sum() if num_items is None else torch.as_tensor(num_items),
        "ref_per_token_logps": batch.ref,
    }
    inputs |= {"old_per_token_logps": batch.old} if old else {}
    inputs |= {} if sampling is None else sampling

    def loss(logps, entropies):
        return trainer(policy=(logps, entropies, None), **config)._compute_loss(None, inputs)

    return differentiate(loss, batch)


def generate_and_score(batch: Batch, rewards=None, **config) -> dict[str, torch.Tensor]:
    """`GRPOTrainer._generate_and_score_completions` of a sampler that made the batch, in float32.

    The batch's holes go in as a tool mask, its padding as shorter completions.
    """
    lengths = [int(row.nonzero().max()) + 1 for row in batch.mask]

    def ragged(values):
        return [row[:n].tolist() for row, n in zip(values, lengths, strict=True)]

    count, completions = len(lengths), ragged(torch.ones_like(batch.mask).long())
    worker = trainer(
        policy=(batch.old.float(), None, None),
        reference=(batch.ref.float(), None, None),
        generated=(
            [[1]] * count, completions, ragged(batch.mask.long()), [""] * count, ragged(batch.sampling.float()), {}, None, None,
        ),
        rewards=torch.zeros(count, 1) if rewards is None else rewards.view(count, -1),
        use_vllm=True, **config,
    )  # fmt: skip
    output = worker._generate_and_score_completions([{"prompt": "1 + 1 ="}] * count)
    assert torch.equal(output["completion_mask"] * output["tool_mask"], batch.mask.long())
    return output
