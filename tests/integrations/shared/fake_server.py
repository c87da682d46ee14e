"""A server that answers like `rlvr-ops serve`, without vLLM: for what a real one does too seldom."""

import json
import os
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rlvr_trainer.sampling.shared_memory import PREFIX, SHARED_MEMORY
from rlvr_trainer.sampling.worker import Extension, plain


class Worker(Extension):
    """In the place of vLLM's, which the methods are added to."""

    def __init__(self, config) -> None:
        self.config, self.mode, self.weights = config, "processed_logprobs", {}
        self.dtype, self.engines = "float32", 1

    def rlvr_describe(self):
        return {"config": plain(self.config), "dtype": self.dtype, "logprobs_mode": self.mode, "engines": self.engines}

    def reload_weights(self, weights_iterator):
        self.weights = {name: value.clone() for name, value in weights_iterator}


class FakeServer(ThreadingHTTPServer):
    """Completions are the prompt's ids, n times; `faults` maps a path to what goes wrong there, once each."""

    daemon_threads = True

    def __init__(self, config, tokenizer, workers=1) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = tokenizer
        self.workers = [Worker(config) for _ in range(workers)]
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, list] = {}
        self.asked: Counter[str] = Counter()
        self.requests: list[dict] = []
        self.hung_up = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """What hangs up on purpose is no news."""

    def answer(self, path, body):
        if path == "/collective_rpc":
            return {"results": self._on_all(body["method"], body["args"])}
        if path == "/detokenize":
            return {"prompt": self.tokenizer.decode(body["tokens"])}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/v1/completions":
            self.requests.append(body)
            return {"choices": [_choice(i, body) for i in reversed(range(body["n"]))]}
        return None

    def _on_all(self, method, arguments):
        found = [None] * len(self.workers)

        def work(i):
            found[i] = getattr(self.workers[i], method)(*arguments)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def _choice(i, body):
    ids = [*body["prompt"], body["seed"] + i]
    logprobs = {"token_logprobs": [-1.0] * (len(ids) - 1) + [None]}
    return {"index": i, "token_ids": ids, "logprobs": logprobs, "finish_reason": "length", "stop_reason": None}


class Handler(BaseHTTPRequestHandler):
    """One fault of a path after the other, then answers.

    A status, a text, `drop` for no answer, `hang` for none for a long time, `stall` for the beginning of one before that.
    """

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body) -> None:
        server = self.server
        server.asked[self.path] += 1
        faults = server.faults.get(self.path, [])
        fault = faults.pop(0) if faults else None
        if fault == "drop":
            self.connection.close()
        elif fault in ("hang", "stall"):
            if fault == "stall":
                self._begin(200, 99)
            self.connection.settimeout(20)
            if self.connection.recv(1) == b"":  # the client hangs up
                server.hung_up.set()
        elif isinstance(fault, str):
            self._begin(200, len(fault))
            self.wfile.write(fault.encode())
        elif fault is not None:
            self._send(fault, {"error": {"message": f"fault {fault}\nthe request was {body}"}})
        else:
            self._send(200, server.answer(self.path, body))

    def _send(self, status, value) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        self._begin(status, len(data))
        self.wfile.write(data)

    def _begin(self, status, length) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def files() -> list[Path]:
    """What this process has in shared memory."""
    return list(SHARED_MEMORY.glob(f"{PREFIX}{os.getpid()}-*"))
