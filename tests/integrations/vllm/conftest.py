"""Servers of a tiny model, started by the command that users start them by."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCH_COMPILE_DISABLE": "1"}  # before torch

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from rlvr_trainer import tiny
from rlvr_trainer.sampling.processes import members

SMALL = ["--gpu-memory-utilization", "0.05", "--max-model-len", "256", "--max-num-seqs", "32"]
COMMAND = [sys.executable, "-c", "from rlvr_trainer.cli import main; raise SystemExit(main())"]


class Served:
    """`rlvr-ops serve` in a process of its own, its log in a file."""

    def __init__(self, model, log: Path, *options: str, port: int | None = None) -> None:
        self.port, self.log = port or free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = ["serve", str(model), "--port", str(self.port), "--dtype", "float32", "--", *SMALL, *options]
        with open(log, "w") as file:
            self.process = subprocess.Popen([*COMMAND, *arguments], stdout=file, stderr=file)

    def wait(self) -> "Served":
        for _ in range(1200):
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def processes(self) -> dict[str, int]:
        """Of the server, by what they are."""
        found = {}
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            for pid in members(int(child)):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                kinds = ("api_server", "EngineCore", "Worker", "resource_tracker", "sampling.processes")
                found |= {kind: pid for kind in kinds if kind in line}
        return found

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(*servers: Served):
    """Wait for all, and stop all in the end."""
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.stop()


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
    """Of the same model; whoever kills one is the last to ask for it."""
    logs = tmp_path_factory.mktemp("logs")
    with serving(*(Served(tiny_folder, logs / name) for name in ("first", "second"))) as servers:
        yield servers
