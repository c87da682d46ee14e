"""Worker processes that judge, and the only way from the trainer to text that a policy wrote.

Each worker is asked by a thread of its own, which kills it when an answer takes too long and starts another: a hung answer costs
its limit and holds up nobody else's.
"""

import base64
import json
import os
import pickle
import site
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from rlvr_trainer.judging.verdict import BAD_REFERENCE, CRASHED, TIME, TOO_LONG, Verdict

if TYPE_CHECKING:
    from rlvr_trainer.config import TaskConfig

LONGEST_COMPLETION = 1_000_000  # characters
LONGEST_REPLY = 100_000
START_UP_SECONDS = 120.0  # importing sympy on a busy machine


class WorkerError(RuntimeError):
    """A worker that cannot be started: the installation is at fault, no answer."""


class Worker:
    """One process. `ask` gives None if it died or was killed; the next `ask` starts another."""

    def __init__(self, seconds: float, generators: bool) -> None:
        self.seconds, self.generators = seconds, generators
        self.sealed: list[str] = []
        self.closing = False
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
        """The reply, and whether the time limit was broken."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        return self._exchange(request, self.seconds)

    def kill(self) -> None:
        """End the process without waiting for it, from any thread, and one that is about to be started."""
        self.closing = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with suppress(OSError):
                    pipe.close()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self.close()
        command = [sys.executable, "-P", "-s", "-m", "rlvr_trainer.judging.worker", *["generators"] * self.generators]
        with suppress(OSError):  # then there is no process
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=tempfile.gettempdir(),
                env=_environment(),
                start_new_session=True,  # Ctrl-C is the trainer's
            )
        if self.closing:  # while it was being started
            self.kill()
        reply = self._exchange(None, START_UP_SECONDS)[0] if self._process is not None else None
        if reply is None:
            self.close()
            raise WorkerError(f"no judge could be started: run {' '.join(command)} to see why")
        self.sealed = list(reply["sealed"])

    def _exchange(self, request: dict[str, Any] | None, seconds: float) -> tuple[dict[str, Any] | None, bool]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = b"" if request is None else json.dumps(request).encode() + b"\n"
        with WATCHDOG.limit(process, seconds) as late:
            try:
                process.stdin.write(line)
                process.stdin.flush()
                return json.loads(process.stdout.readline(LONGEST_REPLY)), late.is_set()
            except (OSError, ValueError):  # it is dead, or said half of something
                self.close()
                return None, late.is_set()


class Watchdog:
    """A thread that kills processes whose time is up. A timer for each answer would cost more than most answers do."""

    TICK = 0.02  # seconds

    def __init__(self) -> None:
        self._limits: dict[int, tuple[float, subprocess.Popen[bytes], threading.Event]] = {}
        self._lock = threading.Lock()
        self._owner = 0  # the process that the thread runs in: after a fork there is none

    @contextmanager
    def limit(self, process: "subprocess.Popen[bytes]", seconds: float) -> Iterator[threading.Event]:
        """Kill `process` after `seconds` unless the block has ended by then; gives what is set if so."""
        if self._owner != os.getpid():
            self._start()
        late = threading.Event()
        self._limits[id(late)] = time.monotonic() + seconds, process, late
        try:
            yield late
        finally:
            del self._limits[id(late)]

    def _start(self) -> None:
        with self._lock:
            if self._owner != os.getpid():
                self._limits.clear()
                threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
                self._owner = os.getpid()

    def _watch(self) -> None:
        while True:
            time.sleep(self.TICK)
            now = time.monotonic()
            for deadline, process, late in list(self._limits.values()):
                if now > deadline and not late.is_set():
                    late.set()
                    process.kill()


WATCHDOG = Watchdog()


class Workers:
    """A few workers. Verdicts come in the order of the requests."""

    def __init__(self, processes: int = 2, seconds: float = 10.0, *, generators: bool = False) -> None:
        self.processes, self.seconds, self.generators = processes, seconds, generators
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._all: list[Worker] = []
        self._pool: ThreadPoolExecutor | None = None
        self._closing = False

    @classmethod
    def of(cls, config: "TaskConfig", *, generators: bool = False) -> "Workers":
        """As many workers, and as patient ones, as a task's settings ask for."""
        return cls(config.verifier_processes, config.verifier_timeout, generators=generators)

    def __call__(self, requests: Iterable[dict[str, Any]]) -> list[Verdict]:
        """A verdict on each request. Equal ones are judged once.

        Raises:
            WorkerError: no worker can be started.
        """
        listed = list(requests)
        if not listed:
            return []
        self._open()
        assert self._pool is not None
        keys = [json.dumps(request) for request in listed]
        distinct = dict(zip(keys, listed, strict=True))
        verdicts = dict(zip(distinct, self._pool.map(self._ask, distinct.values()), strict=True))
        return [verdicts[key] for key in keys]

    def sealed(self) -> list[str]:
        """What a worker has given up, in words; starts one."""
        self(({"references": ["1"]},))
        return next(worker.sealed for worker in self._all if worker.sealed)

    def close(self) -> None:
        """End all processes, whatever they are doing; the next call starts new ones."""
        if self._pool is not None:
            self._closing = True
            for worker in self._all:
                worker.kill()  # whoever waits for it waits no longer
            self._pool.shutdown(cancel_futures=True)
            for worker in self._all:
                worker.close()
            self._pool, self._all, self._idle, self._closing = None, [], SimpleQueue(), False

    def _open(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.processes, thread_name_prefix="judge")
            self._all = [Worker(self.seconds, self.generators) for _ in range(self.processes)]
            for worker in self._all:
                self._idle.put(worker)

    def _ask(self, request: dict[str, Any]) -> Verdict:
        if len(request.get("completion", "")) > LONGEST_COMPLETION:
            return Verdict(0.0, TOO_LONG)
        worker = self._idle.get()
        try:
            reply, late = worker.ask(request)
            if reply is None and not late and not self._closing:  # perhaps not the answer's fault: once more
                reply, late = worker.ask(request)
        finally:
            self._idle.put(worker)
        if reply is None:
            score = 0.0 if "completion" in request else None
            reason = TIME if late else CRASHED
            if score is None:
                return Verdict(None, BAD_REFERENCE, f"{request['references'][0]!r}: {reason}")
            return Verdict(score, reason, *request.get("references", [])[:1])
        return _verdict(reply)


def answers(
    pairs: Iterable[tuple[Sequence[str], str]], *, extract: str = "whole", accept_unevaluated: bool = False
) -> Iterable[dict[str, Any]]:
    """Requests to compare completions with reference answers, any of which is right."""
    for references, completion in pairs:
        yield {
            "references": list(references),
            "completion": completion,
            "extract": extract,
            "accept_unevaluated": accept_unevaluated,
        }


def references(texts: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Requests to see whether reference answers can be read."""
    for text in texts:
        yield {"references": [text]}


def generated(
    name: str, parameters: dict[str, Any], pairs: Iterable[tuple[dict[str, Any], str]], *, extract: str = "whole"
) -> Iterable[dict[str, Any]]:
    """Requests to let a generator judge completions of its own problems."""
    for entry, completion in pairs:
        packed = base64.b64encode(pickle.dumps(entry)).decode()
        yield {
            "generator": name,
            "parameters": parameters,
            "entry": packed,
            "completion": completion,
            "extract": extract,
        }


def _verdict(reply: dict[str, Any]) -> Verdict:
    """What a worker said, believed only as far as its types go."""
    score = reply.get("score")
    if score is not None and not (isinstance(score, float) and 0 <= score <= 1):
        return Verdict(0.0, CRASHED)
    texts = [str(reply.get(name, "")) for name in ("reason", "read_reference", "read_answer")]
    return Verdict(None if score is None else float(score), *texts)


def _environment() -> dict[str, str]:
    """Nothing of the trainer's environment but where Python finds its modules."""
    kept = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    paths = os.pathsep.join(_module_folders())
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        **kept,
        **threads,
        "PYTHONPATH": paths,
        "PYTHONUTF8": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _module_folders() -> list[str]:
    """Where this package, Python's and those that judge are; not the folder of somebody's script, with what else is in it."""
    roots = tuple(os.path.realpath(root) + os.sep for root in (sys.prefix, sys.base_prefix, site.getusersitepackages()))
    found = [path for path in sys.path if path and (os.path.realpath(path) + os.sep).startswith(roots)]
    specs = [find_spec(name) for name in ("math_verify", "latex2sympy2_extended", "sympy", "reasoning_gym")]
    found += [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin]
    return list(dict.fromkeys([str(Path(__file__).parents[2]), *found]))
