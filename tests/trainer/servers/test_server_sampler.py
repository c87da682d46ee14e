"""`rollout.backend=vllm-server` against a server that fails in the ways that servers do. The real one: integrations/vllm."""

import math
import os
import signal
import stat
import threading
import time
from pathlib import Path

import fake_server
import pytest
import torch
from rlvr_trainer import tiny
from rlvr_trainer.sampling import SamplerError, Sampling, transfer, vllm_server
from rlvr_trainer.sampling.shared_memory import PREFIX, SHARED_MEMORY, shared_file
from rlvr_trainer.sampling.vllm_server import ServerSampler

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="this system has no /dev/shm")
PROMPTS = [[5, 6, 7], [8, 9], [10]]


def test_results_do_not_depend_on_how_many_servers_there_are(start, connect):
    one, two = connect(start()), connect(start(), start())
    asked = Sampling(8, n=2, seed=30)
    assert one.sample(PROMPTS, asked) == two.sample(PROMPTS, asked)
    drawn = [completion.token_ids for completion in one.sample(PROMPTS, asked)]
    assert drawn == [[*PROMPTS[i // 2], 30 + i] for i in range(6)]


def test_a_log_probability_that_the_server_has_none_for_is_nan(start, connect):
    logps = connect(start()).sample([[5, 6]], Sampling(8))[0].logps
    assert logps[:2] == [-1.0, -1.0]
    assert math.isnan(logps[2])


def test_greedy_completions_are_asked_for_once(start, connect):
    server = start()
    found = connect(server).sample([[5, 6]], Sampling(8, temperature=0.0, n=3))
    assert len(found) == 3
    assert [request["n"] for request in server.requests] == [1]


@pytest.mark.parametrize("fault", [503, "drop"])
def test_a_request_that_fails_once_is_made_again(start, connect, fault):
    server = start()
    sampler = connect(server)
    server.faults = {"/v1/completions": [fault, fault]}
    assert len(sampler.sample([[5, 6]], Sampling(8))) == 1
    assert server.asked["/v1/completions"] == 3


@pytest.mark.parametrize("fault", [503, "drop"])
def test_a_request_that_always_fails_ends_with_the_name_of_the_server(start, connect, fault):
    server = start()
    sampler = connect(server)
    server.faults = {"/v1/completions": [fault] * 9}
    with pytest.raises(SamplerError, match=f"^the server at {server.url} .*$"):
        sampler.sample([[5, 6]], Sampling(8))
    assert server.asked["/v1/completions"] == 3


@pytest.mark.parametrize("fault", [400, 500])
def test_an_error_of_the_request_is_not_tried_again_and_the_request_is_not_repeated_in_the_message(
    start, connect, fault
):
    server = start()
    sampler = connect(server)
    server.faults = {"/v1/completions": [fault]}
    with pytest.raises(SamplerError, match=f"^the server at {server.url} answered with HTTP {fault}: fault {fault}$"):
        sampler.sample([[5, 6]], Sampling(8))
    assert server.asked["/v1/completions"] == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc", "/reset_prefix_cache", "/detokenize"])
@pytest.mark.parametrize("answer", ["<html>", "", "{}", "[]", "null", '{"choices": [{"index": 0}], "results": [3]}'])
def test_an_answer_that_is_none_of_vllms_names_the_server(start, connect, path, answer):
    server = start()
    with pytest.raises(SamplerError, match=f"^the server at {server.url} .*"):  # noqa: PT012
        server.faults = {path: [answer]} if path != "/v1/completions" else {}
        sampler = connect(server)
        server.faults = {path: [answer]}
        sampler.sample([[5, 6]], Sampling(8))


def test_a_server_that_died_is_named(start, connect):
    server = start()
    sampler = connect(server)
    server.stop()
    with pytest.raises(
        SamplerError, match=rf"^the server at {server.url} does not answer any more \(connection refused\)"
    ):
        sampler.sample([[5, 6]], Sampling(8))


def test_a_server_that_hangs_while_it_samples_is_given_up(start, connect, monkeypatch):
    monkeypatch.setattr(vllm_server, "LIVENESS", 0.1)
    server = start()
    sampler = connect(server, patience=0.5)
    server.faults = {"/v1/completions": ["hang"], "/collective_rpc": ["hang"]}
    with pytest.raises(SamplerError, match=f"{server.url} does not answer any more .timed out"):
        sampler.sample([[5, 6]], Sampling(8))


def test_a_slow_completion_is_waited_for_while_the_server_lives(start, connect, monkeypatch):
    monkeypatch.setattr(vllm_server, "LIVENESS", 0.05)
    server = start()
    sampler = connect(server, patience=0.3)
    answer = server.answer
    server.answer = lambda path, body: (time.sleep(0.8 * (path == "/v1/completions")), answer(path, body))[1]
    assert len(sampler.sample([[5, 6]], Sampling(8))) == 1


@pytest.mark.parametrize("fault", ["hang", "stall"])
def test_close_from_another_thread_ends_what_is_sampled(start, connect, fault):
    server = start()
    sampler = connect(server)
    server.faults = {"/v1/completions": [fault]}
    threading.Timer(0.2, sampler.close).start()
    began = time.monotonic()
    with pytest.raises(SamplerError):
        sampler.sample([[5, 6]], Sampling(8))
    assert time.monotonic() - began < 2
    assert server.hung_up.wait(2)  # which makes vLLM drop the request
    with pytest.raises(SamplerError, match="closed"):
        sampler.sample([[5, 6]], Sampling(8))
    sampler.close()


@pytest.mark.parametrize("fault", ["hang", "stall"])
def test_ctrl_c_stops_at_once_and_no_thread_is_left_for_the_interpreter_to_wait_for(start, connect, fault):
    server = start()
    sampler = connect(server)
    server.faults = {"/v1/completions": [fault]}
    before = threading.enumerate()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sampler.sample([[5, 6]], Sampling(8))
    assert time.monotonic() - began < 2
    assert server.hung_up.wait(2)
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor") and thread not in before:
            thread.join(2)
            assert not thread.is_alive()


def test_one_server_that_fails_gives_up_the_requests_to_the_others(start, connect):
    good, bad = start(), start()
    sampler = connect(good, bad)
    good.faults = {"/v1/completions": ["hang"]}
    bad.answer = lambda path, body: time.sleep(0.3) or 1 / 0  # once the other has its request
    with pytest.raises(SamplerError, match=bad.url):
        sampler.sample([[5], [6]], Sampling(8))
    assert good.hung_up.wait(2)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("near", [True, False])
def test_weights_arrive_as_they_are(start, connect, model, monkeypatch, workers, near):
    if not near:
        monkeypatch.setattr(transfer, "has_room", lambda weights: False)
    server = start(workers=workers)
    sampler = connect(server)
    assert sampler.servers[0].near == near
    changed = {name: torch.randn_like(value).bfloat16() for name, value in model.state_dict().items()}
    sampler.update(changed)
    for worker in server.workers:
        assert worker.weights.keys() == changed.keys()
        assert all(torch.equal(worker.weights[name], value) for name, value in changed.items())


def test_weights_tied_to_one_another_arrive_under_each_name(tokenizer, start, monkeypatch):
    tied = tiny.make_model(len(tokenizer))
    tied.config.tie_word_embeddings = True
    tied.lm_head.weight = tied.model.embed_tokens.weight
    server = start()
    server.workers[0].config = tied.config
    ServerSampler([server.url], tied, tokenizer, [2], dtype=torch.float32, patience=5)
    assert torch.equal(server.workers[0].weights["lm_head.weight"], tied.lm_head.weight)
    assert torch.equal(server.workers[0].weights["model.embed_tokens.weight"], tied.lm_head.weight)


def test_a_server_on_another_machine_gets_weights_by_a_process_group(start, connect, monkeypatch):
    monkeypatch.setattr(fake_server.Worker, "rlvr_sees", lambda self, path, content: {"seen": False})
    sampler = connect(start())
    assert not sampler.servers[0].near
    assert len(sampler.sample([[5, 6]], Sampling(8))) == 1


def test_a_transfer_that_fails_is_not_begun_again(start, connect, model, monkeypatch):
    monkeypatch.setattr(transfer, "has_room", lambda weights: False)
    server = start()
    sampler = connect(server)
    before = server.asked["/collective_rpc"]
    server.faults = {"/collective_rpc": ["drop"]}
    with pytest.raises(SamplerError, match=server.url):
        sampler.update(model.state_dict())
    assert server.asked["/collective_rpc"] == before + 1


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="this system does not list its sockets")
def test_weights_are_given_at_one_address_alone():
    store = transfer._store_at("127.0.0.1", 1)
    port = f":{store.port:04X}"
    lines = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()]
    assert [line[1] for line in lines if line[1].endswith(port) and line[3] == "0A"] == [f"0100007F{port}"]


def test_a_file_of_another_user_is_not_seen(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "read_text", refuse)
    assert fake_server.Worker(None).rlvr_sees(str(tmp_path / "file"), "") == {"seen": False}


def test_the_file_in_shared_memory_is_for_this_user_alone(start, connect, monkeypatch):
    seen = []
    load = fake_server.Worker.rlvr_load
    monkeypatch.setattr(
        fake_server.Worker,
        "rlvr_load",
        lambda self, path, version: (seen.append(os.stat(path)), load(self, path, version)),
    )
    connect(start())
    assert stat.S_IMODE(seen[0].st_mode) == 0o600


def test_weights_that_are_not_the_policys_are_refused_before_anything_is_sent(start, connect, model):
    server = start()
    sampler = connect(server)
    asked = server.asked.copy()
    weights = model.state_dict()
    with pytest.raises(SamplerError, match=r"lm_head.weight is missing"):
        sampler.update({name: value for name, value in weights.items() if name != "lm_head.weight"})
    with pytest.raises(SamplerError, match=r"lm_head.weight has shape \(3, 3\)"):
        sampler.update({**weights, "lm_head.weight": torch.zeros(3, 3)})
    assert server.asked == asked
    assert len(sampler.sample([[5, 6]], Sampling(8))) == 1


def test_a_server_that_cannot_take_weights_is_not_sampled_from(start, connect, model):
    server = start()
    sampler = connect(server)
    server.faults = {"/collective_rpc": [500]}
    with pytest.raises(SamplerError, match=rf"{server.url} answered with HTTP 500.*no weights to go on with"):
        sampler.update(model.state_dict())


def test_a_file_that_a_killed_process_left_is_removed_and_one_that_is_in_use_stays(start, connect):
    """By who holds it: another container's processes have ids of their own."""
    reading, writing = os.pipe()
    maker = os.fork()
    if not maker:
        with shared_file() as path:
            os.write(writing, str(path).encode())
            time.sleep(60)
        os._exit(0)
    left = Path(os.read(reading, 999).decode()).parent
    nobodys = left.rename(left.with_name(f"{PREFIX}999999999-0123"))
    connect(start())
    assert nobodys.is_dir()
    os.kill(maker, signal.SIGKILL)
    os.waitpid(maker, 0)
    connect(start())
    assert not nobodys.exists()


def test_a_server_that_was_started_again_or_serves_another_run_is_noticed(start, connect):
    server = start()
    first, second = connect(server), connect(server)
    second.sample([[5, 6]], Sampling(8))
    with pytest.raises(SamplerError, match=f"{server.url} has not the weights of this run any more"):
        first.sample([[5, 6]], Sampling(8))
