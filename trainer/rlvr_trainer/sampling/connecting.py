"""What a server is asked before it may sample: whether it is up, ours, of the same model and vocabulary, and how near."""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlvr_trainer.printing import say
from rlvr_trainer.sampling import shared_memory
from rlvr_trainer.sampling.calls import AnswerError, Calls, SilenceError
from rlvr_trainer.sampling.sampler import SamplerError
from rlvr_trainer.sampling.worker import plain

POLL = 0.5  # seconds between two looks at a server that is starting
COSMETIC = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
IDS_COMPARED = 256


def wait_for(calls: Calls, url: str, patience: float) -> None:
    """Return when the server is up; say once that it is waited for.

    Raises:
        SamplerError: it is not after `patience` seconds, or is no server of vLLM's.
    """
    deadline, said = time.monotonic() + patience, False
    while True:
        try:
            calls.ask(url, "/health", timeout=patience, pauses=())
            return
        except SilenceError as error:
            if time.monotonic() > deadline or calls.stopped():
                raise SamplerError(
                    f"the server at {url} does not answer ({error.what}), and was waited for {patience:.0f} s"
                    " (rollout.server_timeout): start it with rlvr-ops serve"
                ) from error
        except AnswerError as error:
            if error.status < 500 or time.monotonic() > deadline:
                raise not_ours(url, f"HTTP {error.status} to /health") from error
        if not said:
            say(f"waiting for the server at {url}, at most {patience:.0f} s (rollout.server_timeout)")
            said = True
        time.sleep(POLL)


def check_model(url: str, answers: list[dict[str, Any]], config: Any) -> None:
    """Refuse a server whose workers describe another model than that of `config`, or other log-probabilities.

    Raises:
        SamplerError: with the first setting that differs.
    """
    if answers[0]["logprobs_mode"] != "processed_logprobs":
        raise not_ours(url, f"its --logprobs-mode is {answers[0]['logprobs_mode']}")
    if answers[0]["engines"] != 1:  # one alone answers, whatever has become of the others
        raise not_ours(url, f"its --data-parallel-size is {answers[0]['engines']}: take that many servers instead")
    for name, theirs, ours in _differences(answers[0]["config"], plain(config)):
        raise SamplerError(
            f"the server at {url} serves a model with {name} {theirs}, and the policy's is {ours}:"
            " start it with the policy's model"
        )


def _differences(theirs: dict[str, Any], ours: dict[str, Any], inside: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name and values of what both configurations have, and differently."""
    for key in sorted((theirs.keys() & ours.keys()) - COSMETIC):
        one, other = theirs[key], ours[key]
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{inside}{key}.")
        elif one != other:
            yield f"{inside}{key}", one, other


def check_vocabulary(calls: Calls, url: str, tokenizer: Any, eos_ids: list[int], patience: float) -> None:
    """Refuse a server that writes another text for the same ids.

    Raises:
        SamplerError: it does.
    """
    ids = [*range(0, len(tokenizer), len(tokenizer) // IDS_COMPARED + 1), *eos_ids]
    if calls.ask(url, "/detokenize", {"tokens": ids}, timeout=patience)["prompt"] != tokenizer.decode(ids):
        raise SamplerError(
            f"the server at {url} has another vocabulary than the policy: start it with the policy's tokenizer"
        )


def is_near(calls: Calls, url: str, patience: float) -> bool:
    """Whether all of a server's workers see what this process writes to shared memory."""
    content = secrets.token_hex(16)
    with shared_memory.shared_file() as path:
        path.write_text(content)
        return all(worker["seen"] for worker in rpc(calls, url, patience, "rlvr_sees", str(path), content))


def rpc(
    calls: Calls, url: str, patience: float, method: str, *arguments: Any, pauses: Sequence[float] | None = None
) -> list[Any]:
    """What each of a server's workers answers to a method of `worker.Extension`; `pauses` as in `Calls.ask`."""
    body = {"method": method, "args": arguments}
    found: list[Any] = calls.ask(url, "/collective_rpc", body, timeout=patience, pauses=pauses)["results"]
    return found


@contextmanager
def understood(url: str) -> Iterator[None]:
    """Say whose answer it is that lacks what is read from it.

    Raises:
        SamplerError: it does.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise not_ours(url, f"{type(error).__name__} in an answer of it: {error}") from error


def not_ours(url: str, why: str) -> SamplerError:
    """For a server that lacks what `rlvr-ops serve` gives it."""
    return SamplerError(
        f"the server at {url} is not one that can be trained with ({why}): start it with rlvr-ops serve"
    )
