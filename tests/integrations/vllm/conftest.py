"""Servers of a tiny model, started by the command that users start them by."""

import os
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
sys.path.insert(0, os.path.dirname(__file__))

import pytest
import torch
from rlvr_trainer import tiny
from served import Served


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory):
    """A model like `tiny`, that nobody has taught anything."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny.make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_servers(tiny_folder, tmp_path_factory):
    """Of the same model, in a list; whoever kills one is the last to ask for it."""
    logs = tmp_path_factory.mktemp("logs")
    servers = [Served(tiny_folder, logs / name) for name in ("first", "second")]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.stop()
