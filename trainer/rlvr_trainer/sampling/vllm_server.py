"""Sampling by vLLM servers that `rlvr-ops serve` started: on this machine or others, one or several."""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from rlvr_trainer.printing import say
from rlvr_trainer.sampling import connecting, shared_memory, transfer
from rlvr_trainer.sampling.calls import AnswerError, Calls
from rlvr_trainer.sampling.sampler import (
    Completion,
    SamplerError,
    Sampling,
    Weights,
    number,
    refuse_other_weights,
    shapes_of,
)
from rlvr_trainer.sampling.vllm_engine import by_checkpoint_name, finish_reason

X = TypeVar("X")
T = TypeVar("T")

AT_ONCE = 256  # requests
LIVENESS = 5.0  # seconds between two looks at whether servers live that sample
EMPTYING = 10.0  # seconds for requests that were given up to leave the prefix cache


@dataclass
class Server:
    """One of those that are sampled from."""

    url: str
    workers: int = 1
    dtype: torch.dtype = torch.float32
    near: bool = False  # shares this machine's memory


class ServerSampler:
    """Prompts are dealt out over the servers, whose number changes nothing that is drawn; weights go to all of them.

    Args:
        urls: of the servers.
        model: the policy's, of transformers.
        tokenizer: the policy's.
        eos_ids: the end tokens.
        dtype: that the policy computes in; a server's may be another.
        patience: seconds for a server to start, to take weights, or to show a sign of life while it samples.

    Raises:
        SamplerError: a server does not answer, was not started by `rlvr-ops serve`, or serves another model.
    """

    def __init__(
        self,
        urls: list[str],
        model: Any,
        tokenizer: Any,
        eos_ids: list[int],
        *,
        dtype: torch.dtype,
        patience: float,
    ) -> None:
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.model, self.tokenizer, self.eos_ids, self.patience = model, tokenizer, eos_ids, patience
        weights = model.state_dict()
        self.shapes, self.has_room = shapes_of(weights), transfer.has_room(weights)
        self.version = ""
        self._closed = threading.Event()
        self._running: list[Calls] = []
        shared_memory.remove_leftovers()
        self._all(self._connect, self.servers)
        self.dtype = next((server.dtype for server in self.servers if server.dtype != torch.float32), torch.float32)
        if dtype == torch.float32 and self.dtype != dtype:
            theirs = str(self.dtype).removeprefix("torch.")
            say(
                f"the policy samples in {theirs} and learns in float32; rlvr-ops serve --dtype float32 samples in it too"
            )
        self.update(weights)

    def sample(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """See `Sampler.sample`."""

        def complete(calls: Calls, i: int) -> list[Completion]:
            url = self.servers[i % len(self.servers)].url
            return self._complete(calls, url, prompts[i], sampling, sampling.seed + i * sampling.n)

        found = self._all(complete, range(len(prompts)), watched=True)
        self._all(self._check_version, self.servers)
        return [completion for completions in found for completion in completions]

    def update(self, weights: Weights) -> None:
        """See `Sampler.update`. The prefix caches are emptied: they belong to the old weights."""
        refuse_other_weights(weights, self.shapes)
        named, version = by_checkpoint_name(self.model, weights), secrets.token_hex(8)
        near = any(server.near for server in self.servers)
        file: AbstractContextManager[Path | None] = shared_memory.shared_file() if near else nullcontext()
        with file as path:
            if path is not None:
                transfer.write(path, named)

            def push(calls: Calls, server: Server) -> None:
                try:
                    if server.near:
                        self._rpc(calls, server, "rlvr_load", str(path), version)
                    else:
                        self._broadcast(calls, server, named, version)
                except AnswerError as error:
                    raise SamplerError(f"{error}, so it has no weights to go on with: start it again") from error
                self._empty_cache(calls, server)

            self._all(push, self.servers)
        self.version = version

    def close(self) -> None:
        """See `Sampler.close`. What another thread waits for fails at once; the servers stay for whoever comes next."""
        self._closed.set()
        for calls in list(self._running):
            calls.stop()

    def _all(self, work: Callable[[Calls, X], T], items: Sequence[X], watched: bool = False) -> list[T]:
        """Work on all items at once; results in order. The first failure, or an interruption, gives up the rest."""
        calls, pool = Calls(), ThreadPoolExecutor(min(len(items), AT_ONCE) or 1)
        self._running.append(calls)
        try:
            if self._closed.is_set():
                raise SamplerError("the sampler has been closed")
            futures = [pool.submit(work, calls, item) for item in items]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=LIVENESS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if pending and watched:
                    for server in self.servers:
                        self._check_version(calls, server)
            return [future.result() for future in futures]
        finally:
            calls.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            self._running.remove(calls)

    def _connect(self, calls: Calls, server: Server) -> None:
        connecting.wait_for(calls, server.url, self.patience)
        try:
            answers = self._rpc(calls, server, "rlvr_describe")
        except AnswerError as error:
            raise connecting.not_ours(server.url, f"HTTP {error.status} to /collective_rpc") from error
        with connecting.understood(server.url):
            connecting.check_model(server.url, answers, self.model.config)
            connecting.check_vocabulary(calls, server.url, self.tokenizer, self.eos_ids, self.patience)
            server.workers, server.dtype = len(answers), getattr(torch, answers[0]["dtype"])
            server.near = self.has_room and connecting.is_near(calls, server.url, self.patience)

    def _rpc(
        self, calls: Calls, server: Server, method: str, *arguments: Any, pauses: Sequence[float] | None = None
    ) -> list[Any]:
        with connecting.understood(server.url):
            return connecting.rpc(calls, server.url, self.patience, method, *arguments, pauses=pauses)

    def _complete(self, calls: Calls, url: str, prompt: list[int], sampling: Sampling, seed: int) -> list[Completion]:
        """The completions of one prompt, which draw with `seed`, `seed` + 1, ..."""
        greedy = sampling.temperature == 0  # all alike, and vLLM then takes no n
        body = {
            "prompt": prompt,
            "n": 1 if greedy else sampling.n,
            "seed": seed,
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
            "stop": list(sampling.stop),
            "stop_token_ids": self.eos_ids,
            "skip_special_tokens": False,  # a stop text may be one
            "logprobs": 0,
            "return_token_ids": True,
        }
        with connecting.understood(url):  # however long others' requests come first: the server is watched
            choices = calls.ask(url, "/v1/completions", body, timeout=None)["choices"]
            found = [_completion(url, choice) for choice in sorted(choices, key=lambda choice: choice["index"])]
        return found * sampling.n if greedy else found

    def _check_version(self, calls: Calls, server: Server) -> None:
        """Refuse what was sampled with other weights. Every worker answers, so this shows too that all of them live."""
        with connecting.understood(server.url):
            versions = [found["version"] for found in self._rpc(calls, server, "rlvr_weights")]
        if any(version != self.version for version in versions):
            raise SamplerError(
                f"the server at {server.url} has not the weights of this run any more: it was started again,"
                " or another run uses it too"
            )

    def _broadcast(self, calls: Calls, server: Server, named: Weights, version: str) -> None:
        place = urlsplit(server.url)
        address = transfer.address_towards(place.hostname or "", place.port or 80)
        with transfer.sending(named, server.workers, address, self.patience) as port:
            arguments = address, port, 1 + server.workers, transfer.layout_of(named), self.patience, version
            self._rpc(calls, server, "rlvr_receive", *arguments, pauses=())  # the group is of those who came first

    def _empty_cache(self, calls: Calls, server: Server) -> None:
        """Blocks of requests that were given up a moment ago may still be held."""
        deadline = time.monotonic() + EMPTYING
        while not self._has_emptied_cache(calls, server):
            if time.monotonic() > deadline:
                raise SamplerError(
                    f"the server at {server.url} cannot empty its prefix cache: does anybody else use it?"
                )
            time.sleep(0.1)

    def _has_emptied_cache(self, calls: Calls, server: Server) -> bool:
        with connecting.understood(server.url):
            return bool(calls.ask(server.url, "/reset_prefix_cache", {}, timeout=self.patience)["success"])


def _completion(url: str, choice: dict[str, Any]) -> Completion:
    """One choice of vLLM's answer."""
    if choice["finish_reason"] not in ("stop", "length"):
        raise SamplerError(f"the server at {url} gave up a completion ({choice['finish_reason']})")
    ids, logps = list(choice["token_ids"]), choice["logprobs"]["token_logprobs"]
    return Completion(ids, list(map(number, logps)), finish_reason(choice["finish_reason"], choice["stop_reason"]))
