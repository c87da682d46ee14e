"""What a server is asked before it may sample."""

import copy

import pytest
import torch
from rlvr_trainer import tiny
from rlvr_trainer.sampling import SamplerError
from rlvr_trainer.sampling.shared_memory import SHARED_MEMORY

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="this system has no /dev/shm")


def test_a_server_that_is_starting_is_waited_for_and_that_is_said_once(start, connect, capsys):
    server = start()
    server.faults = {"/health": [503, "drop", 503]}
    connect(server)
    assert capsys.readouterr().out == f"waiting for the server at {server.url}, at most 5 s (rollout.server_timeout)\n"


def test_a_server_that_never_starts_is_named(start, connect):
    server = start()
    server.stop()
    with pytest.raises(SamplerError, match=rf"{server.url} does not answer .connection refused.*rlvr-ops serve"):
        connect(server, patience=0.1)


@pytest.mark.parametrize(("path", "fault"), [("/health", 404), ("/collective_rpc", 404), ("/collective_rpc", 500)])
def test_a_server_without_what_training_needs_is_refused(start, connect, path, fault):
    server = start()
    server.faults = {path: [fault]}
    with pytest.raises(SamplerError, match=f"{server.url} .*HTTP {fault} to {path}.*start it with rlvr-ops serve"):
        connect(server)


def test_a_server_of_raw_log_probabilities_is_refused(start, connect):
    server = start()
    server.workers[0].mode = "raw_logprobs"
    with pytest.raises(SamplerError, match=r"its --logprobs-mode is raw_logprobs.*start it with rlvr-ops serve"):
        connect(server)


def test_a_server_with_another_model_is_refused_by_the_first_setting_that_differs(start, connect):
    server = start()
    server.workers[0].config = tiny.make_model(99).config
    with pytest.raises(SamplerError, match=f"{server.url} serves a model with vocab_size 99, and the policy's is 100"):
        connect(server)


def test_a_setting_that_differs_inside_another_is_named(start, connect):
    server = start()
    server.workers[0].config = copy.deepcopy(server.workers[0].config)
    server.workers[0].config.rope_parameters = {"rope_type": "default", "rope_theta": 7.0, "dtype": "other"}
    with pytest.raises(SamplerError, match=r"serves a model with rope_parameters\.rope_theta 7.0, and the policy's is"):
        connect(server)


def test_a_server_of_several_engines_is_refused(start, connect):
    server = start()
    server.workers[0].engines = 2
    with pytest.raises(SamplerError, match=f"{server.url} .*its --data-parallel-size is 2"):
        connect(server)


def test_a_server_that_computes_in_less_than_the_policy_is_said_once(start, connect, capsys):
    servers = start(), start()
    for server in servers:
        server.workers[0].dtype = "bfloat16"
    connect(*servers, dtype=torch.bfloat16)
    assert not capsys.readouterr().out
    assert connect(*servers).dtype == torch.bfloat16
    said = "the policy samples in bfloat16 and learns in float32; rlvr-ops serve --dtype float32 samples in it too\n"
    assert capsys.readouterr().out == said


def test_a_server_with_another_vocabulary_is_refused(start, connect):
    server = start()
    server.tokenizer = tiny.make_tokenizer(["the same beginning, 1", "the same beginning, 2"])
    server.tokenizer.decode = lambda ids: "another"
    with pytest.raises(SamplerError, match=f"{server.url} has another vocabulary"):
        connect(server)
