"""ACE inside TRL's trainer: what moves, whose confidence, which reference, over whole runs."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from rlvr_ops import ace_advantages
from rlvr_ops.integrations.trl import ACEGRPOConfig, ACEGRPOTrainer, ACEMixin

TIMES = ("runtime", "_per_second", "step_time", "total_flos")


def history(trainer):
    """Everything that was logged but what a clock says."""
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMES)} for row in trainer.state.log_history]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_alpha_0_is_grpo_bit_for_bit_over_50_steps(num_iterations, make_trainer):
    settings = {"max_steps": 50, "gradient_accumulation_steps": 2, "num_iterations": num_iterations, "beta": 0.01}
    stock = make_trainer(GRPOTrainer, GRPOConfig, **settings)
    stock.train()
    ours = make_trainer(ace_alpha=0.0, **settings)  # seeds anew
    ours.train()
    assert history(ours) == history(stock)
    assert torch.equal(weights(ours), weights(stock))
    assert {"loss", "grad_norm", "kl", "entropy", "clip_ratio/low_mean"} <= history(ours)[0].keys()


def test_alpha_0_loads_no_reference(make_trainer):
    assert make_trainer(ace_alpha=0.0).ref_model is None
    assert make_trainer(ace_alpha=0.0, beta=0.1).ref_model is not None


def test_a_plain_config_has_aces_defaults(make_trainer):
    trainer = make_trainer(config=GRPOConfig)
    assert trainer._ace.alpha == 1.0
    assert trainer.ref_model is not None
    assert trainer.beta == trainer.args.beta == 0.0


def record(trainer):
    """Every micro-batch's plain advantages, and those that TRL's loss read."""
    seen = []
    stock = GRPOTrainer._compute_loss

    class Watched(type(trainer)):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            seen.append((inputs["advantages"].clone(), self.read))
            return loss

        def _get_per_token_logps_and_entropies(self, *args, **keywords):
            found = super()._get_per_token_logps_and_entropies(*args, **keywords)
            if self._reweighted is not None:
                self.read, self.logps = self._reweighted["advantages"].clone(), found[0].detach()
            return found

    trainer.__class__ = Watched
    assert stock is GRPOTrainer._compute_loss
    return seen


def test_only_negative_advantages_move_and_nothing_compounds(make_trainer):
    trainer = make_trainer(max_steps=6, num_iterations=3, gradient_accumulation_steps=2)
    seen = record(trainer)
    trainer.train()
    assert len(seen) == 12
    for plain, read in seen:
        assert torch.equal(read[plain >= 0], plain[plain >= 0])
        assert (read[plain < 0] < plain[plain < 0]).all()
    for first, again in zip(seen[0:2], seen[2:4], strict=True):  # the second iteration over the same two batches
        assert torch.equal(first[0], again[0])
    wrong = seen[0][0] < 0
    start = -0.6931472 * seen[0][0][wrong]  # at the reference c = 0 and the weight is 1 + log 2
    torch.testing.assert_close(seen[0][1][wrong], seen[0][0][wrong] - start)


@pytest.mark.parametrize("confidence", ["current", "old"])
def test_whose_confidence_counts(confidence, make_trainer, tools):
    a_batch, loss_and_gradients = tools
    trainer = make_trainer(ace_confidence=confidence, ace_alpha=0.7, ace_confidence_reduction="sum", ace_shape="relu")
    record(trainer)
    batch = a_batch(trainer)
    kept = copy.deepcopy(batch)
    loss_and_gradients(trainer, batch)
    logps = batch["old_per_token_logps"] if confidence == "old" else trainer.logps
    expected = ace_advantages(
        batch["advantages"], logps, batch["ref_per_token_logps"], batch["completion_mask"], alpha=0.7,
        confidence_reduction="sum", shape="relu",
    )  # fmt: skip
    torch.testing.assert_close(trainer.read, expected)
    assert all(torch.equal(batch[name], kept[name]) for name in batch)


def test_what_a_tool_wrote_is_no_confidence(make_trainer, tools):
    a_batch, loss_and_gradients = tools
    trainer = make_trainer()
    record(trainer)
    tool_mask = torch.ones(4, 6, dtype=torch.long)
    tool_mask[:, 1] = 0
    batch = a_batch(trainer, tool_mask=tool_mask)
    batch["ref_per_token_logps"][:, 1] = -50.0
    loss_and_gradients(trainer, batch)
    mask = batch["completion_mask"] * tool_mask
    expected = ace_advantages(batch["advantages"], trainer.logps, batch["ref_per_token_logps"], mask)
    torch.testing.assert_close(trainer.read, expected)


def adapter(**settings):
    return LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=2, **settings)


def reference_logps(trainer):
    """The reference's log-probabilities as TRL scores them in a real generation step."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "1+1="}] * 4)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return batch["ref_per_token_logps"], ids, mask, batch["completion_ids"].shape[1]


def own_logps(model, ids, mask, length):
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].log_softmax(-1)
    return logits.gather(-1, ids[:, -length:, None])[..., 0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["whole model", "new adapter", "trained adapter"])
def test_the_reference_is_scored_at_every_beta(kind, beta, fused, make_trainer, folders):
    base = AutoModelForCausalLM.from_pretrained(folders())
    start, trainer = base, None
    if kind == "trained adapter":
        start = get_peft_model(copy.deepcopy(base), adapter())
    settings = {"beta": beta, "fused_loss": fused}
    if kind == "new adapter":
        settings["trainer"] = {"peft_config": adapter()}
    trainer = make_trainer(model=None if kind != "trained adapter" else copy.deepcopy(start), **settings)
    with torch.no_grad():  # a policy that has moved
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    found, ids, mask, length = reference_logps(trainer)
    counts = mask[:, -length:].bool()
    expected = own_logps(start.eval(), ids, mask, length)
    torch.testing.assert_close(found[counts], expected[counts], rtol=1e-4, atol=1e-5)
    assert (found - own_logps(trainer.model.eval(), ids, mask, length))[counts].abs().max() > 1e-2
    assert trainer.beta == trainer.args.beta == beta


@pytest.mark.parametrize("fused", [False, True])
def test_adapters_train_and_the_base_does_not(fused, make_trainer):
    trainer = make_trainer(fused_loss=fused, trainer={"peft_config": adapter()}, max_steps=3)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora" in name and "ref" not in name), name
    assert isinstance(trainer.model, PeftModel)


@pytest.mark.parametrize("fused", [False, True])
def test_evaluation_logs_ace_too(fused, make_trainer):
    rows = Dataset.from_list([{"prompt": "1+1="}] * 4)
    trainer = make_trainer(
        fused_loss=fused, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, max_steps=1,
        trainer={"eval_dataset": rows},
    )  # fmt: skip
    trainer.train()
    evaluated = next(row for row in history(trainer) if "eval_loss" in row)
    trained = history(trainer)[0]
    for name in ("ace/shift/mean", "ace/weight/mean", "ace/weight/max", "ace/frac_overconfident", "entropy"):
        assert name in trained
        assert f"eval_{name}" in evaluated


def test_the_first_update_is_at_the_reference_and_later_ones_are_not(make_trainer):
    trainer = make_trainer(max_steps=5)
    trainer.train()
    rows = [row for row in history(trainer) if "ace/shift/mean" in row]
    assert rows[0]["ace/shift/mean"] == 0.0
    assert rows[0]["ace/frac_exploratory"] in (0.0, 1.0)  # 0 if every completion was right
    assert any(abs(row["ace/shift/mean"]) > 1e-4 for row in rows[1:])


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_improves_a_tiny_policy(fused, make_trainer):
    trainer = make_trainer(
        fused_loss=fused, max_steps=40, per_device_train_batch_size=16, num_generations=8, max_completion_length=2
    )
    trainer.train()
    rewards = [row["reward"] for row in history(trainer) if "reward" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


def test_without_args_the_config_is_aces(folders, monkeypatch):
    monkeypatch.setattr(ACEGRPOConfig, "__post_init__", lambda _: None)  # whose default, bf16, wants a GPU
    made = {}
    monkeypatch.setattr(ACEMixin, "__init__", lambda _self, _model, _rewards, args: made.update(args=args))
    ACEGRPOTrainer(folders())
    assert isinstance(made["args"], ACEGRPOConfig)
    assert made["args"].output_dir.endswith("-ACE-GRPO")
