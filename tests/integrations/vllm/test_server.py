"""`rollout.backend=vllm-server` with real servers."""

import threading
import time
import urllib.request

import pytest
import torch
from rlvr_trainer import tiny
from rlvr_trainer.sampling import SamplerError, Sampling, transfer
from rlvr_trainer.sampling.calls import AnswerError, Calls
from rlvr_trainer.sampling.connecting import rpc
from rlvr_trainer.sampling.vllm_engine import VllmSampler
from rlvr_trainer.sampling.vllm_server import ServerSampler
from transformers import AutoModelForCausalLM

EOS = [2]
SECRET = "the secret is 271828"


@pytest.fixture
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture
def connect(model, tokenizer, two_servers):
    def to(count=1):
        urls = [server.url for server in two_servers[:count]]
        return ServerSampler(urls, model, tokenizer, EOS, dtype=torch.float32, patience=60)

    return to


@pytest.fixture
def prompts(tokenizer):
    return tokenizer([SECRET, "12 + 7 = ", "What is the sum of one and two and three? " * 2]).input_ids


def move(model):
    """What an optimiser step does, and more of it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )


@torch.no_grad()
def scores(model, prompt, ids, temperature):
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(ids)), ids]


@pytest.mark.parametrize("near", [True, False])
def test_after_every_update_greedy_tokens_are_transformers_and_log_probabilities_the_trainers(
    connect, model, prompts, monkeypatch, near
):
    if not near:
        monkeypatch.setattr(transfer, "has_room", lambda weights: False)
    sampler = connect()
    assert [server.near for server in sampler.servers] == [near]
    assert sampler.dtype == torch.float32  # as it is stored: vLLM's own choice is bf16
    for _ in range(3):
        move(model)
        sampler.update(model.state_dict())
        greedy = sampler.sample(prompts, Sampling(24, temperature=0.0))
        for prompt, found in zip(prompts, greedy, strict=True):
            ids = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=EOS, pad_token_id=0
            )
            assert found.token_ids == ids[0, len(prompt) :].tolist()
        drawn = sampler.sample(prompts, Sampling(24, temperature=0.7, n=2, seed=3))
        for i, found in enumerate(drawn):
            expected = scores(model, prompts[i // 2], found.token_ids, 0.7)
            torch.testing.assert_close(torch.tensor(found.logps), expected, atol=1e-4, rtol=0)


def test_one_server_two_servers_and_the_engine_in_process_draw_the_same(connect, model, tokenizer, prompts):
    asked = Sampling(24, n=3, seed=2**47, stop=tuple("abcdefghij"))
    one, two = connect(1).sample(prompts, asked), connect(2).sample(prompts, asked)
    engine = VllmSampler(model, tokenizer, EOS, dtype=torch.float32, memory_share=0.05, max_model_len=256, sleeps=False)
    local = engine.sample(prompts, asked)
    engine.close()
    assert {found.finish_reason for found in one} >= {"stop", "length"}
    for others in (two, local):
        assert [found.token_ids for found in others] == [found.token_ids for found in one]
        assert [found.finish_reason for found in others] == [found.finish_reason for found in one]


def test_more_prompt_tokens_than_one_step_of_the_engine_takes_draw_the_same_as_few(connect, tokenizer, prompts):
    long = [(tokenizer(f"{i} and ").input_ids + prompts[2] * 3)[:200] for i in range(40)]
    assert sum(map(len, long)) > 3 * 2048  # vLLM's own step on a CPU
    sampler, asked = connect(), Sampling(8, seed=5)
    assert sampler.sample(long, asked)[:2] == sampler.sample(long[:2], asked)


def test_a_policy_of_another_size_is_refused(two_servers, tokenizer):
    other = tiny.make_model(len(tokenizer), layers=3)
    with pytest.raises(SamplerError, match=f"{two_servers[0].url} serves a model with num_hidden_layers 2, and"):
        ServerSampler([two_servers[0].url], other, tokenizer, EOS, dtype=torch.float32, patience=5)


def test_a_policy_with_another_vocabulary_is_refused(two_servers, model):
    characters = tiny.CHARACTERS
    try:
        tiny.CHARACTERS = characters[::-1]
        other = tiny.make_tokenizer()
    finally:
        tiny.CHARACTERS = characters
    with pytest.raises(SamplerError, match=f"{two_servers[0].url} has another vocabulary"):
        ServerSampler([two_servers[0].url], model, other, EOS, dtype=torch.float32, patience=5)


def test_the_server_goes_on_after_weights_that_were_refused(connect, model, prompts):
    sampler = connect()
    weights = model.state_dict()
    with pytest.raises(SamplerError, match="goes on with those that it has"):
        sampler.update({**weights, "lm_head.weight": torch.zeros(3, 3)})
    assert len(sampler.sample(prompts, Sampling(4))) == 3


def test_a_server_says_if_it_lacks_a_method_and_goes_on(connect, two_servers, prompts):
    sampler = connect()
    with pytest.raises(AnswerError):
        rpc(Calls(), two_servers[0].url, 10, "no_such_method")
    assert len(sampler.sample(prompts, Sampling(4))) == 3


def test_closing_drops_the_requests_at_the_server(connect, two_servers, prompts):
    sampler = connect()
    threading.Timer(0.5, sampler.close).start()
    began = time.monotonic()
    with pytest.raises(SamplerError):
        sampler.sample(prompts * 30, Sampling(150))
    assert time.monotonic() - began < 5
    for _ in range(50):
        with urllib.request.urlopen(f"{two_servers[0].url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        left = [line for line in lines if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))]
        if all(line.endswith(" 0.0") for line in left):
            break
        time.sleep(0.1)
    assert left
    assert all(line.endswith(" 0.0") for line in left)


def test_no_prompt_is_in_the_servers_log_even_if_the_request_fails(connect, two_servers, prompts):
    sampler = connect()
    sampler.sample(prompts, Sampling(8))
    with pytest.raises(SamplerError, match="HTTP 400") as error:
        sampler.sample([prompts[0] * 20], Sampling(8))
    with pytest.raises(SamplerError, match="HTTP 400") as malformed:
        Calls().ask(two_servers[0].url, "/v1/completions", {"prompt": [SECRET], "n": "many"}, timeout=5)
    ids = ", ".join(map(str, prompts[0]))
    for text in (two_servers[0].log.read_text(), str(error.value), str(malformed.value)):
        assert SECRET not in text
        assert ids not in text
