"""Which of transformers' causal LMs have a head that `Head.from_model` knows: all that can be built at a tiny size are asked.

    python -m tools.model_table              # print the table
    python -m tools.model_table --record     # write it to docs/models.md

Each model is random, with logits large enough to show a softcap. It is `exact` if `token_logps` of `hidden_states_of` and
`Head.from_model` gives the log-probabilities of the model's own logits to 1e-5, with padding on the left too, and refused if
`Head.from_model` says so.
"""

import argparse
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlvr_ops import Head, hidden_states_of, token_logps

PAGE = Path("docs/models.md")
BEGIN, END = "<!-- model table: written by tools.model_table --record -->", "<!-- end of the model table -->"
LARGEST, SECONDS = 10_000_000, 60
SIZES = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "ffn_hidden_size": 48, "max_seq_len": 64, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16, "state_size": 8,
    "num_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "rotary_dim": 8, "decoder_layers": 2, "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4, "expand": 2, "index_head_dim": 8, "index_n_heads": 2, "attention_hidden_size": 32,
    "logits_scaling": 8.0, "final_logit_softcapping": 5.0,
}  # fmt: skip
"""Given to each configuration that has the name."""
OWN: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": None},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.25},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_hidden_layers": None},
    "minicpm3": {"logits_scaling": None, "dim_model_base": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "xlstm": {"v_head_dim": None},
}
"""What a family wants beside or instead of it; None leaves a size out."""
LATENT_ATTENTION = {"head_dim": None, "num_key_value_heads": 4}


class Found(NamedTuple):
    """What a family's model turned out to be."""

    family: str
    head: str
    refusal: str


def families() -> list[str]:
    """transformers' model types that have a causal LM."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class NestedError(Exception):
    """A model around a text model, which is a family of its own."""


def build(family: str) -> Any | str:
    """A tiny random model of the family, or why there is none."""
    try:
        with _at_most(SECONDS):
            return _build(family) or "not asked: larger than 10 million parameters at these sizes"
    except NestedError:
        return "not asked: more than a text model, whose text part is a family of its own"
    except Exception:  # whatever a configuration objects to
        return "not asked: these sizes make no tiny model"


def _build(family: str) -> Any | None:
    kind = type(AutoConfig.for_model(family))
    names = set(dir(AutoConfig.for_model(family)))
    own = LATENT_ATTENTION if "qk_rope_head_dim" in names else {}
    sizes = {name: size for name, size in SIZES.items() if name in names} | own | OWN.get(family, {})
    config = kind(**{name: size for name, size in sizes.items() if size is not None})
    if config.get_text_config() is not config:
        raise NestedError
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    if sum(parameter.numel() for parameter in empty.parameters()) > LARGEST:
        return None
    torch.manual_seed(0)
    model = _spread_out(AutoModelForCausalLM.from_config(config).eval())
    model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
    return model


@torch.no_grad()
def _spread_out(model: Any) -> Any:
    """The model with other weights everywhere, and logits of some units."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not None:
        head.weight.add_(torch.randn_like(head.weight))
    return model


def ask(family: str, model: Any) -> Found:
    """Compare the log-probabilities of a completion with those of the model's own logits.

    Raises:
        AssertionError: they differ though `Head.from_model` took the model.
    """
    try:
        with _at_most(SECONDS):
            head = Head.from_model(model)
    except TypeError as refused:
        return Found(family, "", _reason(str(refused)))
    ids = torch.randint(3, 53, (2, 9))
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[:, -5:-1]
        found = token_logps(hidden_states_of(model, ids, length=4), head, ids[:, -4:]).logps
    torch.testing.assert_close(found, own.gather(-1, ids[:, -4:, None])[..., 0], rtol=1e-5, atol=1e-5)
    parts = {"bias": head.bias is not None, "scale": head.logit_scale != 1, "softcap": head.softcap is not None}
    return Found(family, " and ".join(name for name, there in parts.items() if there) or "plain", "")


def _reason(message: str) -> str:
    """Why a model was refused, without its name and numbers."""
    for words, reason in (
        ("padding on the left", "padding on the left changes its states"),
        ("not the model's own", "more than a linear layer between its states and its logits"),
        ("does not take the hidden states", "more than a linear layer between its states and its logits"),
        ("forward of its own", "an output layer with a forward of its own"),
        ("encoder-decoder", "an encoder-decoder"),
    ):
        if words in message:
            return reason
    return message


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def survey() -> list[Found]:
    """Every family that can be built, in order; one that cannot is marked so."""
    found = []
    for family in families():
        model = build(family)
        found.append(Found(family, "", model) if isinstance(model, str) else ask(family, model))
    return found


def table(found: list[Found]) -> str:
    """Markdown: one row for each kind of head, then one for each reason."""
    heads: dict[str, list[str]] = {}
    for one in found:
        heads.setdefault(f"exact, {one.head}" if one.head else one.refusal, []).append(one.family)
    kinds = sorted(
        heads, key=lambda kind: (not kind.startswith("exact"), kind.startswith("not asked"), -len(heads[kind]), kind)
    )
    rows = [f"| {kind} | {len(heads[kind])} | {', '.join(heads[kind])} |" for kind in kinds]
    return "\n".join(["| head | families | transformers' `model_type` |", "|---|---:|---|", *rows])


def main() -> None:
    """Print the table or record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write the table to {PAGE}")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    text = table(survey())
    if asked.record:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    print(text)


if __name__ == "__main__":
    main()
