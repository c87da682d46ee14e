"""vLLM in the trainer's process: the real engine, compared with transformers token by token and to 1e-4."""

import copy
import math
import random
import threading
import time

import pytest
import torch
from models import MODELS, make_policy, nudge, scores
from rlvr_trainer import loop
from rlvr_trainer.config import load
from rlvr_trainer.console import read_jsonl
from rlvr_trainer.sampling import SamplerError, Sampling
from rlvr_trainer.sampling.ahead import Ahead
from rlvr_trainer.sampling.generate import GenerateSampler
from rlvr_trainer.sampling.sampler import number

PROMPTS = [[5 + i % 90 for i in range(n)] for n in (11, 40, 180)]  # the last fills a block of the prefix cache
CONFIG = ["rollout.backend=vllm", "rollout.memory_share=0.05", "policy.precision=full"]


@pytest.fixture(scope="module", params=MODELS)
def policy(request, tmp_path_factory):
    policy = make_policy(request.param, tmp_path_factory.mktemp("model"))
    policy.start_sampler(load(None, CONFIG))
    yield policy
    policy.close()


def transformers_of(policy):
    return GenerateSampler(policy.model, policy.tokenizer, policy.eos_ids)


def test_greedy_tokens_are_those_of_transformers_after_each_of_three_updates(policy):
    greedy = Sampling(24, temperature=0, n=2)
    before = None
    for _ in range(3):
        nudge(policy.model)
        policy.refresh_sampler()
        found = policy.sampler.sample(PROMPTS, greedy)
        expected = transformers_of(policy).sample(PROMPTS, greedy)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
        assert [c.token_ids for c in found] != before  # the weights did change what is said
        before = [c.token_ids for c in found]


def test_logps_are_those_of_the_trainer(policy):
    for temperature in (0.7, 1.0):
        found = policy.sampler.sample(PROMPTS, Sampling(24, temperature, n=2, seed=5))
        for prompt, completion in zip([p for p in PROMPTS for _ in range(2)], found, strict=True):
            expected = scores(policy, prompt, completion.token_ids, temperature)
            assert (torch.tensor(completion.logps) - expected).abs().max() <= 1e-4


def test_a_completion_depends_on_its_seed_alone(policy):
    whole = policy.sampler.sample(PROMPTS, Sampling(12, n=2, seed=7))
    assert policy.sampler.sample(PROMPTS, Sampling(12, n=2, seed=7)) == whole
    for i, prompt in enumerate([p for p in PROMPTS for _ in range(2)]):
        (alone,) = policy.sampler.sample([prompt], Sampling(12, seed=7 + i))
        assert alone.token_ids == whole[i].token_ids
    assert len({tuple(c.token_ids) for c in policy.sampler.sample([PROMPTS[0]] * 4, Sampling(12, n=2, seed=1))}) > 4


def test_completions_end_where_transformers_ends_them(policy):
    """Longer than most completions, with texts of one and of two characters that stop: every reason occurs."""
    stop = ("7", "ab", "<unk>")
    reasons = set()
    for seed in range(4):
        for found in policy.sampler.sample(PROMPTS, Sampling(40, 1.3, n=4, seed=16 * seed, stop=stop)):
            reasons.add(found.finish_reason)
            texts = [policy.tokenizer.decode(found.token_ids[: i + 1]) for i in range(len(found.token_ids))]
            stopped = [any(text in said for text in stop) for said in texts]
            ended = [token in policy.eos_ids for token in found.token_ids]
            assert not any(stopped[:-1])
            assert not any(ended[:-1])
            assert found.finish_reason == ("stop" if stopped[-1] else "end" if ended[-1] else "length")
            assert len(found.token_ids) == len(found.logps) <= 40
    assert reasons == {"stop", "end", "length"} or reasons == {"stop", "length"}


def test_more_prompts_than_one_scheduler_step_holds(policy):
    """Prefilled in parts on a CPU, vLLM 0.32 would rewind a generator that knows no way back, and fail."""
    prompts = [[5 + (i * j) % 90 for i in range(180)] for j in range(1, 65)]
    found = policy.sampler.sample(prompts, Sampling(2, seed=1))
    assert {len(one.token_ids) for one in found} <= {1, 2}
    assert len(found) == 64


def test_closing_ends_what_another_thread_samples(tmp_path, monkeypatch):
    policy = make_policy("llama", tmp_path)
    policy.start_sampler(load(None, CONFIG))
    ahead = Ahead(lambda: policy.sampler.sample(PROMPTS[:1] * 64, Sampling(200)))
    time.sleep(0.5)
    policy.close()
    ahead.wait()
    assert "has been closed" in str(ahead.error)
    policy.close()
    with pytest.raises(SamplerError, match="has been closed"):
        policy.sampler.sample(PROMPTS, Sampling(4))


def test_the_trainers_random_state_is_its_own(policy):
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(3), random.random()
    torch.manual_seed(3)
    random.seed(3)
    policy.sampler.sample(PROMPTS, Sampling(4))
    policy.refresh_sampler()
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_threads_are_still_the_trainers_to_set(policy):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_wrong_weights_are_named_and_the_engine_goes_on(policy, fault):
    greedy = Sampling(8, temperature=0)
    before = policy.sampler.sample(PROMPTS, greedy)
    weights = dict(policy.model.state_dict())
    name = "model.norm.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "unknown":
        weights["model.extra.weight"] = weights[name]
    else:
        weights[name] = weights[name][:-1]
    wanted = {
        "missing": "model.norm.weight is missing",
        "unknown": "none called model.extra.weight",
        "shape": "has shape",
    }
    with pytest.raises(SamplerError, match=wanted[fault]):
        policy.sampler.update(weights)
    assert policy.sampler.sample(PROMPTS, greedy) == before


def test_runs_that_sample_ahead_repeat(policy, tmp_path):
    """Two runs of the same seeds, whose every step changes the weights."""
    policy.model.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    shared = ["rollout.asynchronous=true", "rollout.max_new_tokens=30", "rollout.prompts=2", "evaluation.samples=1"]
    more = ["run.steps=3", "task.held_out=4", "algorithm.overlong_fraction=0.95", f"policy.name={tmp_path / 'model'}"]
    rows = []
    for name in ("one", "two"):
        loop.train(load(None, [*CONFIG, *shared, *more, f"run.out={tmp_path / name}"]), quiet=True)
        found = [row for row in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in row]
        rows.append([{key: value for key, value in row.items() if "perf/" not in key} for row in found])
    assert rows[0] == rows[1]
    assert [row["sampling/policy_lag"] for row in rows[0]] == [0, 1, 1]
    assert rows[0][2]["kl"] > 0


class Platform:
    """A stand-in for the engine on a platform that can sleep, which a CPU cannot."""

    def __init__(self):
        self.calls, self.asleep = [], False
        self.llm_engine = self
        self.engine_core = self

    def is_sleeping(self):
        return self.asleep

    def wake_up(self):
        self.asleep = False
        self.calls.append("wake_up")

    def sleep(self, level):
        self.asleep = True
        self.calls.append(f"sleep {level}")

    def generate(self, prompts, parameters, use_tqdm):
        assert not self.asleep
        self.calls.append("generate")
        return []

    def collective_rpc(self, method, kwargs):
        assert not self.asleep
        self.calls.append(method)

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")

    def shutdown(self):
        self.calls.append("shutdown")


def test_where_the_platform_can_the_engine_sleeps_between_two_calls(policy):
    sampler = copy.copy(policy.sampler)
    sampler.engine, sampler.sleeps, sampler._lock = Platform(), True, threading.Lock()
    engine = sampler.engine
    sampler.sample(PROMPTS, Sampling(4))
    sampler.sample(PROMPTS, Sampling(4))
    sampler.update(policy.model.state_dict())
    sampler.close()
    nap = ["sleep 1", "wake_up"]
    updating = ["reload_weights", "reset_prefix_cache"]
    assert engine.calls == ["generate", *nap, "generate", *nap, *updating, "shutdown"]


def test_what_is_no_number_counts_as_unknown():
    assert math.isnan(number(None))
    assert math.isnan(number(math.nan))
    assert number(-1.5) == -1.5


def test_a_model_that_vllm_cannot_run_is_one_sentence(tmp_path):
    policy = make_policy("head_dim 24", tmp_path)
    with pytest.raises(SamplerError, match=r"vLLM failed while sampling: .*head_dim=24"):
        policy.start_sampler(load(None, CONFIG))


def test_an_engine_that_puts_weights_into_the_wrong_places_is_refused(tmp_path):
    """vLLM 0.32 packs a CPU's experts when they are first loaded, and loads the next ones over that."""
    with pytest.raises(SamplerError, match=r"disagrees with the policy: .* this Qwen3MoeForCausalLM's weights"):
        make_policy("qwen3 moe", tmp_path).start_sampler(load(None, CONFIG))
