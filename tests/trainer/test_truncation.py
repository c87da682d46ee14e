"""Under `rollout.mask_truncated` what did not end teaches nothing, and a step of nothing else changes nothing."""

import copy

import pytest
import torch
from rlvr_trainer.console import read_jsonl
from rlvr_trainer.loop import train, update
from rlvr_trainer.policies import load_policy
from rlvr_trainer.rollouts import collect


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "dr_grpo", "luspo"])
def test_a_step_in_which_nothing_ended_changes_no_weight(small, digits, algorithm):
    config = small(f"algorithm.name={algorithm}", "algorithm.dynamic_sampling=false", "rollout.mask_truncated=true")
    policy = load_policy(config, digits())
    policy.eos_ids = [0]  # the pad: no completion that was sampled in full ends
    policy.model.generation_config.eos_token_id = [0]
    policy.start_sampler(config)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1.0, weight_decay=0.0)
    torch.manual_seed(0)
    batch, _ = collect(policy, digits(), 0, config)
    batch.rollouts.completion_mask.zero_()  # whatever did end by chance
    before = [parameter.clone() for parameter in policy.model.parameters()]
    values = update(policy, policy.frozen(), optimizer, batch, config, 0)
    assert (values["loss"], values["grad_norm"], values["num_tokens"]) == (0.0, 0.0, 0.0)
    assert all(map(torch.equal, before, policy.model.parameters()))


def test_truncated_completions_give_no_gradient_and_stay_in_the_denominator(small, ready, digits):
    """The gradient of GRPO with the others alone over the count of all of them, TRL's `mask_truncated_completions`."""
    torch.manual_seed(3)
    config = small(
        "rollout.mask_truncated=true", "rollout.group_size=16", "rollout.max_new_tokens=40", "optim.micro_batch=7"
    )
    policy = ready(config)
    batch, _ = collect(policy, digits(), 0, config)
    ended = batch.rollouts.ended
    assert 0 < ended.sum() < len(ended)

    initial = copy.deepcopy(policy.model.state_dict())

    def gradient(advantages):
        batch.advantages = advantages
        policy.model.load_state_dict(initial)
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
        seen = []
        optimizer.register_step_pre_hook(lambda o, *_: seen.append(policy.head.weight.grad.clone()))
        update(policy, policy.frozen(), optimizer, batch, config, 0)
        return seen[0]

    whole = batch.advantages
    torch.testing.assert_close(gradient(whole), gradient(torch.where(ended, whole, 99.0)))
    assert gradient(whole).abs().max() > 0


def test_a_run_learns_with_stop_texts_and_masked_truncation(small, tmp_path):
    stop = "['1', '2', '3']"
    train(small("rollout.mask_truncated=true", f"rollout.stop={stop}", "run.steps=2"), quiet=True)
    rows = read_jsonl(tmp_path / "run" / "completions.jsonl")
    assert any(row["completion"][-1:] in "123" for row in rows)
    assert all(row["length"] > 0 and not set("123") & set(row["completion"][:-1]) for row in rows)
