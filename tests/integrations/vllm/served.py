"""`rlvr-ops serve` and `rlvr-ops train` in processes of their own."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from rlvr_trainer.sampling.processes import mapped_by, members

SMALL = ["--gpu-memory-utilization", "0.1", "--max-model-len", "256", "--max-num-seqs", "32"]
COMMAND = [sys.executable, "-c", "from rlvr_trainer.cli import main; raise SystemExit(main())"]


class Served:
    """`rlvr-ops serve` in a process of its own, its log in a file."""

    def __init__(self, model, log: Path, *options: str) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = ["serve", str(model), "--port", str(self.port), "--", *SMALL, *options]
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

    def sessions(self) -> list[int]:
        """That of the server, and that of the process that waits for ours to die."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def processes(self) -> dict[str, int]:
        """Of the server, by what they are."""
        found = {}
        for pid in (pid for session in self.sessions() for pid in members(session)):
            with suppress(OSError):  # it has ended
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
                found |= {kind: pid for kind in ("api_server", "EngineCore", "Worker") if kind in line}
        return found

    def shared_memory(self) -> set[Path]:
        """That its processes map."""
        return {path for session in self.sessions() for path in mapped_by(session) if path.exists()}

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
