"""An engine in the trainer's process is a guest: it leaves the process as it found it."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def as_a_guest() -> Iterator[None]:
    """Whatever is seeded, drawn or set inside: random generators, threads and warnings are as they were afterwards.

    On a CPU nothing is compiled meanwhile, which would want a C++ compiler.
    """
    import numpy

    python, arrays, threads = random.getstate(), numpy.random.get_state(), torch.set_num_threads
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    stance = "default" if torch.cuda.is_available() else "force_eager"
    try:
        with torch.random.fork_rng(devices=gpus), torch.compiler.set_stance(stance), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads = threads  # on a CPU vLLM puts something in its place that does nothing
        random.setstate(python)
        numpy.random.set_state(arrays)
