"""JSON over HTTP: several requests at once, which can all be given up from another thread."""

import http.client
import json
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from rlvr_trainer.sampling.sampler import SamplerError

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before a request is made again
CONNECTING = 10.0  # seconds
PROBING = 60  # seconds of silence until a connection is probed: a long answer outlasts a router's memory
BUSY = (502, 503, 504)


class AnswerError(SamplerError):
    """The server answered, with an error."""

    def __init__(self, url: str, status: int, text: str) -> None:
        super().__init__(f"the server at {url} answered with HTTP {status}: {text or 'nothing more'}")
        self.status = status


class SilenceError(SamplerError):
    """The server did not answer."""

    def __init__(self, url: str, error: Exception) -> None:
        self.what = "connection refused" if isinstance(error, ConnectionRefusedError) else str(error)
        super().__init__(f"the server at {url} does not answer any more ({self.what or type(error).__name__})")


class Calls:
    """Requests that belong together: `stop` ends them all, and those that would begin later.

    Every request has a connection of its own, and closing it is what tells vLLM to drop the request.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """From any thread. Those that wait for an answer get a `SilenceError` at once."""
        self._stopped.set()
        with self._lock:
            for open_socket in self._open:
                with suppress(OSError):  # it is closed already
                    open_socket.shutdown(socket.SHUT_RDWR)

    def stopped(self) -> bool:
        """Whether somebody called `stop`."""
        return self._stopped.is_set()

    def ask(
        self, url: str, path: str, body: Any = None, *, timeout: float | None, pauses: Sequence[float] | None = None
    ) -> Any:
        """The JSON of the answer, None if it is empty. With a `body` it is a POST.

        A connection that is refused or breaks, and a server that is busy, are tried again after each of `pauses` seconds
        (None: `PAUSES`). An answer that takes longer than `timeout` seconds (None: any time) is not, nor is one with an error.

        Raises:
            SilenceError: there was no answer.
            AnswerError: it had a status of 400 or more, or is no JSON.
        """
        for pause in (*(PAUSES if pauses is None else pauses), None):
            failure: SamplerError
            try:
                status, text = self._once(url, path, body, timeout)
                if status < 400:
                    return _json_of(url, status, text)
                failure = AnswerError(url, status, _message_of(text))
                if status not in BUSY:
                    raise failure
            except TimeoutError as error:
                raise SilenceError(url, error) from error
            except (OSError, http.client.HTTPException) as error:
                failure = SilenceError(url, error)
            if pause is None or self._stopped.wait(pause):
                raise failure
        raise AssertionError("the last pause is None")

    def _once(self, url: str, path: str, body: Any, timeout: float | None) -> tuple[int, bytes]:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=CONNECTING)
        opened = self._connect(connection)  # http.client forgets it while an answer is still read
        try:
            opened.settimeout(timeout)
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("GET" if data is None else "POST", path, data, headers)
            with connection.getresponse() as response:
                return response.status, response.read()
        finally:
            with self._lock:
                self._open.discard(opened)
            connection.close()

    def _connect(self, connection: http.client.HTTPConnection) -> socket.socket:
        try:
            connection.connect()
        except TimeoutError as error:
            raise ConnectionError(f"no connection in {CONNECTING:.0f} s") from error
        opened: socket.socket = connection.sock
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBING)
        with self._lock:
            if self._stopped.is_set():
                connection.close()
                raise ConnectionError("given up")
            self._open.add(opened)
        return opened


def _json_of(url: str, status: int, text: bytes) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise AnswerError(url, status, "this is no JSON") from error


def _message_of(text: bytes) -> str:
    """The first line of vLLM's message, and the parameter that it is about; what follows may quote the request."""
    plain, about = text.decode(errors="replace"), None
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        error = json.loads(plain)["error"]
        plain, about = error["message"], error.get("param")
    line = plain.strip().partition("\n")[0][:300]
    return f"{line} {about}" if about else line
