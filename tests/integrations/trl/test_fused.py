"""The fused loss is TRL's own: the same loss, gradients and metrics, for every loss type and setting."""

import math

import pytest
import torch
from peft import PromptTuningConfig
from transformers import Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from rlvr_ops import Plan
from rlvr_ops.integrations.trl import fused_loss

LOSS_TYPES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
SETTINGS = {
    **{f"loss_type={name}": {"loss_type": name} for name in LOSS_TYPES},
    **{
        f"sequence, {name}": {"loss_type": name, "importance_sampling_level": "sequence"}
        for name in ("grpo", "dapo", "luspo", "cispo", "sapo")
    },
    "cispo's bound": {"loss_type": "cispo", "epsilon_high": 1.1},
    "two-sided clip": {"delta": 1.5, "epsilon": 0.1},
    "KL": {"beta": 0.1, "use_bias_correction_kl": False},
    "KL, bias-corrected": {"beta": 0.1, "use_bias_correction_kl": True},
    "KL, bias-corrected, sequence": {
        "beta": 0.1,
        "use_bias_correction_kl": True,
        "importance_sampling_level": "sequence",
    },
    "off-policy mask": {"off_policy_mask_threshold": 0.01},
    "entropy bonus": {"entropy_coef": 0.05},
    "most uncertain tokens": {"top_entropy_quantile": 0.4},
    "temperature": {"temperature": 0.7},
    "accumulation": {"gradient_accumulation_steps": 3, "loss_type": "dapo"},
    "vespo, sequence, KL, bias-corrected": {
        "loss_type": "vespo",
        "importance_sampling_level": "sequence",
        "beta": 0.5,
        "use_bias_correction_kl": True,
    },
    "float32 head": {"cast_lm_head_to_fp32": True},
    "dr_grpo, accumulation": {"gradient_accumulation_steps": 2, "loss_type": "dr_grpo"},
}


def same(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance / 10, atol=tolerance / 10)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=tolerance, atol=tolerance * gradient.abs().max(), msg=name
        )


def metrics_of(trainer, mode):
    found = {name: values[-1] for name, values in trainer._metrics[mode].items()}
    trainer._metrics[mode].clear()
    return found


def check(make_trainer, tools, change=lambda trainer, batch: batch, but=(), mode="train", tolerance=1e-5, **settings):
    """A fused trainer against an unfused one: the loss to 1e-6, gradients to 1e-5, the same metrics.

    Without ACE the other is TRL's own trainer, with TRL's own head.
    """
    a_batch, loss_and_gradients = tools
    fused = make_trainer(fused_loss=True, **settings)
    stock = {name: value for name, value in settings.items() if not name.startswith("ace_")}
    plain = settings.get("ace_alpha") == 0
    other = make_trainer(GRPOTrainer, GRPOConfig, **stock) if plain else make_trainer(**settings)
    batch = change(fused, a_batch(other))
    change(other, batch)
    ours, theirs = [loss_and_gradients(trainer, dict(batch), mode=mode) for trainer in (fused, other)]
    same(ours, theirs, tolerance)
    logged, expected = metrics_of(fused, mode), metrics_of(other, mode)
    logged, expected = [{k: v for k, v in found.items() if not k.startswith(but)} for found in (logged, expected)]
    assert logged == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("name", SETTINGS)
def test_fused_is_unfused(name, alpha, make_trainer, tools):
    check(make_trainer, tools, ace_alpha=alpha, **SETTINGS[name])


def without_old(_, batch):
    return {name: value for name, value in batch.items() if name != "old_per_token_logps"}


def with_tools(_, batch):
    return batch | {"tool_mask": torch.tensor([[1, 0, 1, 1, 0, 1]] * 4)}


def one_masked(_, batch):
    return batch | {"completion_mask": batch["completion_mask"] * torch.tensor([[1], [0], [1], [1]])}


def per_token(_, batch):
    return batch | {"advantages": torch.randn(4, 6)}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("confidence", ["current", "old"])
@pytest.mark.parametrize("change", [without_old, with_tools, one_masked, per_token])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_every_kind_of_batch(loss_type, change, confidence, mode, make_trainer, tools):
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "ace_confidence": confidence}
    check(make_trainer, tools, change, mode=mode, loss_type=loss_type, beta=0.03, **settings)


@pytest.mark.parametrize("family", ["tied", "softcap", "scale", "experts"])
def test_every_head_is_known(family, make_trainer, tools):
    check(make_trainer, tools, family=family, beta=0.02, gradient_accumulation_steps=2)
    assert make_trainer(family=family).aux_loss_enabled == (family == "experts")


def test_a_float32_head_leaves_autocast(make_trainer, tools):
    a_batch, loss_and_gradients = tools
    settings = {"bf16": True, "cast_lm_head_to_fp32": True, "ace_alpha": 0.0, "learning_rate": 1e-2}
    trainers = [make_trainer(fused_loss=True, **settings), make_trainer(**settings)]
    batch = a_batch(trainers[1])
    ours, theirs = [loss_and_gradients(trainer, dict(batch))[0] for trainer in trainers]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_more_than_linear_is_refused(make_trainer, monkeypatch):
    forward = Qwen2ForCausalLM.forward

    def warmer(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 1.01 * output.logits
        return output

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", warmer)
    with pytest.raises(TypeError, match="cannot vouch for Qwen2ForCausalLM"):
        make_trainer(fused_loss=True)
    make_trainer()


def test_adapters_that_add_to_the_prompt_are_refused(make_trainer):
    tuned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, tokenizer_name_or_path=None)
    with pytest.raises(TypeError, match=r"fused_loss=True does not go with this model, .* adds to the prompt"):
        make_trainer(fused_loss=True, trainer={"peft_config": tuned})


def test_old_and_reference_come_from_the_same_head(make_trainer):
    trainer = make_trainer(fused_loss=True, max_steps=1, num_iterations=2)
    heads = []
    for model in (trainer.model, trainer.ref_model):
        model.lm_head.register_forward_pre_hook(lambda _, inputs: heads.append(len(inputs)))
    trainer.train()
    assert heads.count(2) == 3  # the old policy, the reference and the loss: hidden states and what to compute of them
    row = next(row for row in trainer.state.log_history if "ace/shift/mean" in row)
    assert row["ace/shift/mean"] == 0.0


def test_settings_that_change_in_a_run_count(make_trainer, tools):
    a_batch, loss_and_gradients = tools
    trainer, other = make_trainer(fused_loss=True), make_trainer()
    batch = a_batch(other)
    for each in (trainer, other):
        each.beta, each.epsilon_low = 0.5, 0.01
    same(loss_and_gradients(trainer, dict(batch)), loss_and_gradients(other, dict(batch)))


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_without_wrong_completions_dilutes_nothing(fused, make_trainer, tools):
    a_batch, loss_and_gradients = tools
    trainer = make_trainer(fused_loss=fused)
    for advantages in ([1.0, 1.0, 0.5, 0.4], [0.0, 0.0, 0.0, 0.0]):
        loss_and_gradients(trainer, a_batch(trainer) | {"advantages": torch.tensor(advantages)})
    metrics = trainer._metrics["train"]
    assert [name for name in metrics if name.startswith("ace/") and metrics[name]] == []
    assert len(metrics["entropy"]) == (1 if fused else 2)


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize(
    ("loss_type", "mode"), [("dapo", mode) for mode in MODES] + [("vespo", "token_mask"), ("sapo", "token_truncate")]
)
def test_the_correction_for_vllms_sampling_is_trls(loss_type, mode, alpha, make_trainer, tools):
    settings = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.2}
    if "mask" in mode:
        settings["vllm_importance_sampling_clip_min"] = 0.8

    def sampled(trainer, batch):
        trainer.use_vllm = True  # as if vLLM had sampled
        torch.manual_seed(2)
        sampling = batch["old_per_token_logps"] + 0.3 * torch.randn(4, 6)
        sampling[0, 1] = math.nan  # vLLM gave none
        return batch | {
            "sampling_per_token_logps": sampling,
            "importance_sampling_ratio": ratio_as_trl(batch, sampling, mode),
        }

    not_scored = ("entropy", "clip_ratio", "ace/") if mode == "sequence_mask" else ()  # rollouts of weight 0 are not
    check(
        make_trainer, tools, sampled, but=not_scored, ace_alpha=alpha, loss_type=loss_type, off_policy_mask_threshold=0.02,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("confidence", ["current", "old"])
def test_vespo_with_vllms_correction_and_a_corrected_kl_is_trls(confidence, make_trainer, tools):
    def sampled(trainer, batch):
        trainer.use_vllm = True
        return batch | {"importance_sampling_ratio": torch.full((4, 6), 1.1)}

    check(
        make_trainer, tools, sampled, tolerance=5e-5, loss_type="vespo", beta=0.1, ace_confidence=confidence,
        vllm_importance_sampling_mode="token_truncate",
    )  # fmt: skip


def ratio_as_trl(batch, sampling, mode):
    """What TRL puts into a batch that vLLM sampled, bounds 0.8 (masks) and 1.2."""
    gap = ((batch["old_per_token_logps"] - sampling) * batch["completion_mask"]).nan_to_num(nan=0.0)
    ratio = (gap.sum(1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(max=1.2)
    return ratio.masked_fill((ratio < 0.8) | (ratio > 1.2), 0.0)


def test_in_bf16_fused_is_as_near_to_float32_as_unfused(make_trainer, tools):
    a_batch, loss_and_gradients = tools
    exact = make_trainer(fused_loss=True)
    batch = a_batch(exact)
    trainers = exact, make_trainer(fused_loss=True, bf16=True), make_trainer(bf16=True)
    found = [loss_and_gradients(trainer, dict(batch))[1]["lm_head.weight"] for trainer in trainers]
    truth, fused, unfused = found
    assert (fused - truth).norm() <= 1.5 * (unfused - truth).norm()


def test_a_rollout_without_an_advantage_costs_no_product(make_trainer, tools, monkeypatch):
    a_batch, loss_and_gradients = tools
    trainer = make_trainer(fused_loss=True)
    batch = a_batch(trainer) | {"advantages": torch.tensor([0.0, 0.0, -1.0, 0.0])}
    loss_and_gradients(trainer, dict(batch))
    outputs = []
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda **k: outputs.append(forward(**k)) or outputs[-1])
    loss_and_gradients(trainer, dict(batch))
    assert outputs[0].log_probs.isnan().any(1).tolist() == [True, True, False, True]


def partition(lm_head):
    """As DeepSpeed's ZeRO-3: the weight has no elements but in the module's forward, and from its output's backward on."""
    whole = lm_head.weight.data

    def gather(*_):
        lm_head.weight.data = whole

    def free(_module, _inputs, output):
        lm_head.weight.data = torch.empty(0)
        for value in output.values():
            if value is not None and value.requires_grad:
                value.register_hook(gather)

    lm_head.register_forward_pre_hook(gather)
    lm_head.register_forward_hook(free)
    lm_head.weight.data = torch.empty(0)


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
def test_a_head_that_zero_3_partitions_is_gathered(schedule, make_trainer, tools, monkeypatch):
    a_batch, loss_and_gradients = tools
    trainer = make_trainer(fused_loss=True)
    batch = a_batch(trainer)
    expected = loss_and_gradients(trainer, dict(batch))
    monkeypatch.setattr(fused_loss, "PLAN", Plan(schedule, with_entropy=True))
    partition(trainer.model.lm_head)
    same(loss_and_gradients(trainer, dict(batch)), expected)
