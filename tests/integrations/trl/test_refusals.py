"""What does not go together is refused when the trainer is made, and says what to do."""

import importlib.metadata
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from rlvr_ops.integrations.trl import ACEArguments, ACEGRPOConfig, ACEMixin, _check_version


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("ace_alpha", -1.0, "ace_alpha must be >= 0"),
        ("ace_alpha", float("nan"), "ace_alpha must be"),
        ("ace_confidence", "new", "ace_confidence must be one of"),
        ("ace_confidence_reduction", "max", "ace_confidence_reduction must be one of"),
        ("ace_shape", "gelu", "ace_shape must be one of"),
        ("fused_loss", "yes", "fused_loss must be a bool, got 'yes'"),
    ],
)
def test_wrong_settings_are_named(setting, value, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        ACEGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{setting: value})


def test_the_asynchronous_trainer_has_no_reference():
    with pytest.raises(TypeError, match=r"subclass of trl.GRPOTrainer, got AsyncGRPOTrainer. .* no reference model"):
        type("ACEAsync", (ACEMixin, AsyncGRPOTrainer), {})


def test_unsloths_rewritten_trainer_is_refused():
    rewritten = type("UnslothGRPOTrainer", (GRPOTrainer,), {})
    with pytest.raises(TypeError, match="Unsloth's rewritten trainer computes a loss of its own"):
        type("Ours", (ACEMixin, rewritten), {})


def test_the_mixin_comes_first():
    with pytest.raises(TypeError, match=r"class Ours\(ACEMixin, ...\)"):
        type("Ours", (GRPOTrainer, ACEMixin), {})


@pytest.mark.parametrize("settings", [{}, {"disable_dropout": True}, {"ace_alpha": 0.0}])
def test_dropout_is_warned_of(settings, make_trainer, folders):
    model = AutoModelForCausalLM.from_pretrained(folders())
    model.model.noise = torch.nn.Dropout(0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(model=model, **settings)
    assert any("model has dropout" in str(each.message) for each in caught) == (settings == {})


def test_a_mixed_trainer_needs_its_config():
    kind = type("Ours", (ACEMixin, GMPOTrainer), {})
    with pytest.raises(TypeError, match=r"args must be a GRPOConfig .* got nothing"):
        kind("model", None)


def test_an_adapter_on_the_head_is_refused(make_trainer):
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make_trainer(fused_loss=True, trainer={"peft_config": LoraConfig(target_modules=["q_proj", "lm_head"])})


def test_older_trl_is_refused(monkeypatch):
    monkeypatch.setattr("rlvr_ops.integrations.trl.version", lambda _: "1.15.2")
    with pytest.raises(ImportError, match=r"needs TRL >= 1.16, found 1.15.2"):
        _check_version()


def test_no_trl_is_refused(monkeypatch):
    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr("rlvr_ops.integrations.trl.version", missing)
    with pytest.raises(ImportError, match="needs TRL: pip install"):
        _check_version()


def test_importing_the_library_imports_no_trainer():
    code = "import sys, rlvr_ops; assert not {'trl', 'verl', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_without_a_name_has_no_reference(make_trainer):
    nameless = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=98, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match="model has no name, and TRL loads the reference that ACE needs by name"):
        make_trainer(model=nameless)


def test_a_nameless_model_with_new_adapters_is_its_own_reference(make_trainer, folders):
    model = AutoModelForCausalLM.from_pretrained(folders())
    model.config._name_or_path = ""
    make_trainer(model=model, trainer={"peft_config": LoraConfig(target_modules=["q_proj"])})


def test_what_is_no_config_is_refused(make_trainer):
    with pytest.raises(TypeError, match=r"args must be a GRPOConfig or made from one, .* got dict"):
        make_trainer(config=lambda *_, **__: {})


def test_a_subclass_that_scores_other_models_first_is_taken_and_the_policy_twice_is_not(make_trainer, tools):
    a_batch, loss_and_gradients = tools
    score = GRPOTrainer._get_per_token_logps_and_entropies

    class Twice(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            scored = self.ref_model if self.other else model
            self._get_per_token_logps_and_entropies(scored, ids, torch.ones_like(ids), 6)
            return super()._compute_loss(model, inputs)

    trainer = make_trainer(type("Ours", (ACEMixin, Twice), {"other": True}))
    batch = a_batch(trainer)
    expected = loss_and_gradients(make_trainer(), dict(batch))[0]
    assert torch.equal(loss_and_gradients(trainer, dict(batch))[0], expected)
    trainer.other = False
    with pytest.raises(TypeError, match="Ours scores the policy twice in its loss"):
        loss_and_gradients(trainer, dict(batch))
    assert score is GRPOTrainer._get_per_token_logps_and_entropies


def test_a_named_model_is_taken(make_trainer, folders):
    trainer = make_trainer(model=AutoModelForCausalLM.from_pretrained(folders()))
    assert trainer.ref_model is not None


@dataclass
class ACEGMPOConfig(ACEArguments, GMPOConfig):
    pass


class ACEGMPOTrainer(ACEMixin, GMPOTrainer):
    pass


def test_a_subclass_with_its_own_loss_takes_ace_and_refuses_the_fused_loss(make_trainer, tools):
    a_batch, loss_and_gradients = tools
    with pytest.raises(TypeError, match="fused_loss=True replaces the loss, and GMPOTrainer has one of its own"):
        make_trainer(ACEGMPOTrainer, ACEGMPOConfig, fused_loss=True)
    trainer = make_trainer(ACEGMPOTrainer, ACEGMPOConfig)
    batch = a_batch(trainer)
    with_ace = loss_and_gradients(trainer, dict(batch))[0]
    without = loss_and_gradients(trainer, dict(batch), lambda *a: GMPOTrainer._compute_loss(trainer, *a))[0]
    assert not torch.isclose(with_ace, without)
    assert "ace/weight/mean" in trainer._metrics["train"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            lambda self, model, inputs: inputs["advantages"].sum(),
            "reads its advantages before it has log-probabilities",
        ),
        (lambda self, model, inputs: inputs.get("advantages").sum(), "reads its advantages before"),
        (lambda self, model, inputs: torch.zeros(()), "computes no log-probabilities in its loss"),
    ],
)
def test_a_loss_that_ace_cannot_reach_is_refused(body, message, make_trainer, tools):
    a_batch, loss_and_gradients = tools
    kind = type("Ours", (ACEMixin, type("Early", (GRPOTrainer,), {"_compute_loss": body})), {})
    trainer = make_trainer(kind)
    with pytest.raises(TypeError, match=message):
        loss_and_gradients(trainer, a_batch(trainer))
