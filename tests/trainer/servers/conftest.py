"""Servers that fail in the ways that servers do, and samplers that connect to them."""

import fake_server
import pytest
import torch
from rlvr_trainer import tiny
from rlvr_trainer.sampling import calls, connecting
from rlvr_trainer.sampling.vllm_server import ServerSampler


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny.make_model(len(tokenizer))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(calls, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(connecting, "POLL", 0.01)
    yield
    assert not fake_server.files()


@pytest.fixture
def start(model, tokenizer):
    servers = []

    def one(**options):
        servers.append(fake_server.FakeServer(model.config, tokenizer, **options))
        return servers[-1]

    yield one
    for server in servers:
        server.stop()


@pytest.fixture
def connect(model, tokenizer):
    def to(*servers, patience=5.0, dtype=torch.float32):
        urls = [server.url for server in servers]
        return ServerSampler(urls, model, tokenizer, [2], dtype=dtype, patience=patience)

    return to
