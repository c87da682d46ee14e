"""The fused loss is TRL's own: the same loss, gradients and metrics, for every loss type and setting."""

import pytest
import torch

LOSS_TYPES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
SETTINGS = {
    **{f"loss_type={name}": {"loss_type": name} for name in LOSS_TYPES},
    **{
        f"sequence, {name}": {"loss_type": name, "importance_sampling_level": "sequence"}
        for name in ("grpo", "dapo", "luspo", "cispo", "sapo")
    },
    "cispo's bound": {"loss_type": "cispo", "epsilon_high": 1.1},
    "two-sided clip": {"delta": 1.5, "epsilon": 0.1},
    "KL": {"beta": 0.1},
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


def check(trainer, batch, loss_and_gradients):
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
        assert logged[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
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
