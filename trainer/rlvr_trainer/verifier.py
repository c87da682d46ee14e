"""math-verify in worker processes, each answer with a time limit of ours.

math-verify's own timeouts use signals, which a thread cannot, so both are switched off and a worker that takes too long
is killed with its pool. What fails (a crash, a time-out, an answer that does not parse) comes back as None, never as 0:
the caller counts it and leaves the group out.
"""

import multiprocessing
import multiprocessing.pool
from collections.abc import Sequence

LONGEST_BARE_ANSWER = 200  # characters
START_UP_SECONDS = 120.0  # importing sympy on a busy machine


def _start_worker() -> None:
    import logging
    import signal

    import math_verify  # noqa: F401  imported once per worker, outside the time limit of any answer

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's, which closes the pool itself


def judge(answer: str, completion: str) -> float:
    """1.0 if `completion` is `answer`, or states it in any equivalent mathematical form, else 0.0.

    A completion of one short line is also read as if it stood in a \\boxed{}, like the answer: bare LaTeX, pairs and words.

    Raises:
        ValueError: `answer` itself is nothing that math-verify can read.
    """
    from math_verify import parse, verify

    if completion.strip() == answer.strip():
        return 1.0
    gold = parse(_boxed(answer), parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"math-verify cannot read the reference answer {answer!r}")
    stated = completion.strip()
    readings = {stated, _boxed(stated) if len(stated) <= LONGEST_BARE_ANSWER and "\n" not in stated else stated}
    given = [parse(reading, parsing_timeout=None, raise_on_error=True) for reading in readings]
    return float(any(verify(gold, one, timeout_seconds=None, raise_on_error=True) for one in given))


def _boxed(text: str) -> str:
    """LaTeX that math-verify takes as an answer."""
    return text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}"


class MathVerifier:
    """A pool of processes that judge (answer, completion) pairs; restarted whenever a pair runs out of time."""

    def __init__(self, processes: int = 2, timeout: float = 10.0) -> None:
        self.processes, self.timeout = processes, timeout
        self._pool: multiprocessing.pool.Pool | None = None

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Scores in the order of `pairs`; None where the verifier raised, crashed or ran out of time."""
        scores: list[float | None] = []
        while len(scores) < len(pairs):
            pool = self._start()
            pending = [pool.apply_async(judge, pair) for pair in pairs[len(scores) :]]
            for result in pending:
                try:
                    scores.append(result.get(self.timeout))
                except multiprocessing.TimeoutError:
                    scores.append(None)
                    self.close()
                    break  # the pool is gone and its queue with it: start again behind this pair
                except Exception:
                    scores.append(None)
        return scores

    def _start(self) -> multiprocessing.pool.Pool:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # fork is unsafe once torch has threads
            self._pool = context.Pool(self.processes, initializer=_start_worker)
            self._pool.apply_async(judge, ("1", "1")).get(START_UP_SECONDS)
        return self._pool

    def close(self) -> None:
        """End the worker processes; the next call starts new ones."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
            self._pool = None
