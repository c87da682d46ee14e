"""`rlvr-ops serve`: vLLM's own server with what the trainer needs of it, and an eye on all of its processes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlvr_trainer.checkpoints import list_checkpoints
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.sampling.processes import ended_with_us
from rlvr_trainer.sampling.sampler import SamplerError
from rlvr_trainer.session import INITIAL_POLICY
from rlvr_trainer.stopping import SIGNALS

COMMAND = (
    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
    *("--worker-extension-cls", "rlvr_trainer.sampling.worker.Extension"),
    *("--logprobs-mode", "processed_logprobs"),  # of the distribution that is drawn from: after the temperature
    *("--generation-config", "vllm"),  # a model's own top_k or repetition penalty would draw from another one
    "--disable-uvicorn-access-log",
)
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, by which weights come
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_MAX_STOP_STRINGS": "1024",  # of 4: `rollout.stop` takes any number
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # off, the server cannot tell that its engine died
}
ON_A_CPU = ("--enforce-eager", "--no-enable-chunked-prefill")  # a seed cannot be kept over the parts of a prompt there
ENVIRONMENT_ON_A_CPU = {
    "TORCH_COMPILE_DISABLE": "1",  # it would want a C++ compiler
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin starve the trainer's
}
MEMORY = "--gpu-memory-utilization"


def serve(model: str, *, host: str, port: int, dtype: str, arguments: list[str]) -> int:
    """Serve until a signal comes, and give the exit code for it. What `arguments` say to vLLM wins.

    What vLLM can load is served with its own weights, for whoever asks before a trainer comes. `smollm2-135m` lies in a
    file that vLLM cannot read, and has made-up ones until then.

    Raises:
        SamplerError: vLLM is not installed, or the server did not start, or it died.
        ConfigError: a run that holds no model yet, or `smollm2-135m` without its package.
    """
    if find_spec("vllm") is None:
        raise SamplerError('rlvr-ops serve needs vLLM: pip install "rlvr-ops[train,vllm]"')
    import torch

    on_a_cpu = not torch.cuda.is_available()
    environment = {**(ENVIRONMENT_ON_A_CPU if on_a_cpu else {}), **os.environ, **ENVIRONMENT}
    with tempfile.TemporaryDirectory(prefix="rlvr-ops-") as folder:
        path, options = _model(model, Path(folder))
        dtype = _stored_dtype(path) if dtype == "auto" else dtype
        command = [*COMMAND, "--model", path, *options, "--host", host, "--port", str(port), "--dtype", dtype]
        if on_a_cpu:
            command += ON_A_CPU
        if on_a_cpu and MEMORY not in arguments:
            command += [MEMORY, "0.3"]  # by itself it would take nine tenths, and here that is everybody's
        return _watch([*command, *arguments], environment, folder)


def _stored_dtype(path: str) -> str:
    """The type that a model's weights are stored in: vLLM's `auto` is bf16 for fp32."""
    from transformers import AutoConfig

    try:
        dtype = AutoConfig.from_pretrained(path).dtype
    except (OSError, ValueError):  # of a kind that vLLM alone knows
        return "auto"
    return str(dtype or "float32").removeprefix("torch.")


def _model(name: str, folder: Path) -> tuple[str, list[str]]:
    """What vLLM loads for a name that the trainer has for a model or for a run, and how."""
    if name == "smollm2-135m":
        from rlvr_trainer.policies import smollm2
        from rlvr_trainer.sampling.vllm_engine import write_model

        model, tokenizer = smollm2()
        write_model(folder, model.config, tokenizer)
        return str(folder), ["--served-model-name", name, "--load-format", "dummy"]
    path = Path(name)
    if name == "tiny" or (path / "config.yaml").is_file():
        inside = [path / "model", *reversed(list_checkpoints(path)), path / INITIAL_POLICY]
        found = [place for place in inside if (place / "config.json").is_file()]
        if not found:
            hint = "is made for a task: give the folder of a run of it" if name == "tiny" else "holds no model yet"
            raise ConfigError(f"{name} {hint} (rlvr-ops train ... run.steps=0 makes one)")
        return str(found[0]), []
    return name, []


def _watch(command: list[str], environment: dict[str, str], folder: str) -> int:
    """Run the server in a session of its own, and leave nothing of it when it or this process ends."""
    received: list[int] = []
    with _signals_to(received):
        server = subprocess.Popen(command, env=environment, start_new_session=True)
        with ended_with_us(server.pid, folder):
            while server.poll() is None and not received:
                time.sleep(0.1)
    if not received:
        code = server.returncode
        how = signal.Signals(-code).name if code < 0 else f"with exit code {code}"
        raise SamplerError(f"the server ended ({how}), which nobody asked it to; nothing of it is left")
    return 128 + received[0]


@contextmanager
def _signals_to(received: list[int]) -> Iterator[None]:
    def handle(number: int, frame: Any) -> None:
        received.append(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
