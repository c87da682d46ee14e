"""Servers that are killed: the trainer says so and saves, and nothing is left of them."""

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rlvr_trainer.sampling import SamplerError, Sampling, transfer
from rlvr_trainer.sampling.processes import members
from rlvr_trainer.sampling.vllm_server import ServerSampler
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .conftest import COMMAND, Served, serving

RUN = [
    "policy.name=tiny",
    "policy.precision=full",
    "policy.warm_start_steps=2",
    "policy.device=cpu",
]
