"""The fused loss is TRL's own: the same loss, gradients and metrics, for every loss type and setting."""

import math

import pytest
import torch

from rlvr_ops import Plan
from rlvr_ops.integrations.trl import fused_loss
from rlvr_ops.integrations.trl.fused_loss import objective_of

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


def metrics_of(trainer):
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    return found


def check(trainer, batch, loss_and_gradients, but=()):
    """Fused against unfused and, without ACE, against stock TRL: the loss to 1e-6, gradients to 1e-5, the same metrics."""
    fused = loss_and_gradients(trainer, dict(batch))
    logged = metrics_of(trainer)
    objective, trainer._objective = trainer._objective, None
    stock = type(trainer).mro()[2]._compute_loss
    unfused = loss_and_gradients(trainer, dict(batch))
    expected = metrics_of(trainer)
    trainer._objective = objective
    same(fused, unfused)
    assert logged.keys() == expected.keys()
    for name, value in expected.items():
        assert not math.isnan(logged[name]), name
        assert name.startswith(but) or logged[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    if trainer._ace.alpha == 0:
        same(fused, loss_and_gradients(trainer, dict(batch), lambda *a: stock(trainer, *a)))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("name", SETTINGS)
def test_fused_is_unfused(name, alpha, make_trainer, tools):
    a_batch, loss_and_gradients = tools
    trainer = make_trainer(fused_loss=True, ace_alpha=alpha, **SETTINGS[name])
    check(trainer, a_batch(trainer), loss_and_gradients)


@pytest.mark.parametrize("family", ["tied", "softcap", "scale", "experts"])
def test_every_head_is_known(family, make_trainer, tools):
    a_batch, loss_and_gradients = tools
    trainer = make_trainer(fused_loss=True, family=family, beta=0.02)
    check(trainer, a_batch(trainer), loss_and_gradients)
    assert trainer.aux_loss_enabled == (family == "experts")


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize(
    ("loss_type", "mode"), [("dapo", mode) for mode in MODES] + [("vespo", "token_mask"), ("sapo", "token_truncate")]
)
def test_the_correction_for_vllms_sampling_is_trls(loss_type, mode, alpha, make_trainer, tools):
    a_batch, loss_and_gradients = tools
    settings = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.2}
    if "mask" in mode:
        settings["vllm_importance_sampling_clip_min"] = 0.8
    trainer = make_trainer(
        fused_loss=True, ace_alpha=alpha, loss_type=loss_type, off_policy_mask_threshold=0.02, **settings
    )
    trainer.use_vllm = True  # as if vLLM had sampled
    trainer._objective = objective_of(trainer)
    batch = a_batch(trainer)
    sampling = batch["old_per_token_logps"] + 0.3 * torch.randn(4, 6)
    sampling[0, 1] = math.nan  # vLLM gave none
    batch |= {"sampling_per_token_logps": sampling, "importance_sampling_ratio": ratio_as_trl(batch, sampling, mode)}
    not_scored = ("entropy", "clip_ratio", "ace/") if mode == "sequence_mask" else ()  # rollouts of weight 0 are not
    check(trainer, batch, loss_and_gradients, but=not_scored)


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
    truth = loss_and_gradients(exact, dict(batch))[1]["lm_head.weight"]
    trainer = make_trainer(fused_loss=True, bf16=True)
    fused = loss_and_gradients(trainer, dict(batch))[1]["lm_head.weight"]
    trainer._objective = None
    unfused = loss_and_gradients(trainer, dict(batch))[1]["lm_head.weight"]
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
