"""Head: the last layer of a policy, from hidden states to logits.

z = softcap * tanh(logit_scale * (h W^T + bias) / softcap) / temperature        (without a softcap: no tanh)
"""

import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from rlvr_kernels.checks import check_finite, check_logits, check_tensor, shape_of
from rlvr_kernels.logits import LogitMap, accumulator_dtype
from torch import Tensor, nn

from rlvr_ops.rollouts import Layout, per_rollout_or_token


@dataclass(frozen=True, eq=False)
class Head:
    """The lm_head's weight (V, H) and bias (V,), and the numbers between its output and the logits.

    temperature is the sampling temperature: a number, one per rollout (B,), or one per token. Numbers are constants: a
    tensor that requires a gradient is refused. In the place of the weight a `Head` stands for all that it has, so that
    `ace_loss(hidden, head, ...)` needs no further keyword and `Head(head, temperature=0.7)` is the same at another temperature.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0

    if TYPE_CHECKING:  # what the dataclass makes, but that a Head may come in the place of its weight

        def __init__(
            self, weight: "Tensor | Head", bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None,
            temperature: float | Tensor = 1.0,
        ) -> None: ...  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.weight, Head):
            self._take_over(self.weight)
        if not isinstance(self.weight, Tensor):
            check_tensor("lm_head_weight", self.weight)  # raises, with the way out
        check_logits(self.logit_scale, self.softcap)
        temperature = self.temperature
        if not isinstance(temperature, Tensor | int | float):
            raise TypeError(f"temperature must be a number or a tensor, got {temperature!r}")
        if not isinstance(temperature, Tensor) and not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")

    @classmethod
    def of(
        cls,
        lm_head: nn.Module,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float | Tensor = 1.0,
    ) -> "Head":
        """The head of an lm_head module: nn.Linear, or a LoRA adapter of peft around one.

        An adapter's weight is W + sum of scaling * B A, in the widest of their dtypes, differentiable in A and B. It is
        computed here, as a tensor (V, H): make a new head for every backward.

        Raises:
            TypeError: lm_head computes more than h W^T + b; the message says what.

        >>> Head.of(nn.Linear(4, 10)).weight.shape
        torch.Size([10, 4])
        """
        from rlvr_ops.head.adapters import weight_and_bias

        return cls(*weight_and_bias(lm_head), logit_scale, softcap, temperature)

    @classmethod
    def from_model(cls, model: nn.Module, *, temperature: float | Tensor = 1.0) -> "Head":
        """The head of a transformers causal LM: weight, bias, scale and softcap, with LoRA on the lm_head merged in.

        The first time for each model the head's logits are compared with the model's own, on a few tokens and in eval
        mode. docs/models.md lists what was compared. As with `of`, an adapter's weight is computed here: make a new head for
        every backward.

        Args:
            model: also inside peft, torch.compile or DistributedDataParallel.
            temperature: as in `Head`.

        Raises:
            TypeError: naming the model's class: an encoder-decoder, an output layer that is not linear, or logits that
                are more than softcap * tanh(logit_scale * (h W^T + bias) / softcap).

        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=4)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> Head.from_model(model).weight is model.lm_head.weight
        True
        """
        from rlvr_ops.head.from_model import compare_once, logit_numbers, output_layer, unwrapped

        model = unwrapped(model)
        lm_head = output_layer(model)
        try:
            head = cls.of(lm_head, **logit_numbers(model)._asdict())
        except TypeError as reason:
            raise TypeError(f"cannot vouch for {type(model).__name__}: {reason}") from None
        compare_once(model, head)
        return cls(head, temperature=temperature)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """All logits (..., V), materialised, before the temperature: for comparisons, never for training."""
        logits = self.logit_scale * nn.functional.linear(hidden_states.to(self.weight.dtype), self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _take_over(self, head: "Head") -> None:
        """Become `head`, at the temperature of whichever of the two has one."""
        ours, theirs = [not isinstance(x.temperature, Tensor) and x.temperature == 1 for x in (self, head)]
        beside = {
            "lm_head_bias": self.bias is not None,
            "logit_scale": self.logit_scale != 1,
            "softcap": self.softcap is not None,
            "temperature": not (ours or theirs),
        }
        for name in [name for name, given in beside.items() if given]:
            raise ValueError(f"{name} is given beside a Head, which has its own")
        for item in fields(self):
            if ours or item.name != "temperature":
                object.__setattr__(self, item.name, getattr(head, item.name))

    def check(self, hidden_states: Tensor) -> None:
        """Raise unless hidden states (..., H) fit the head."""
        check_tensor("hidden_states", hidden_states)
        if hidden_states.ndim not in (2, 3):
            raise ValueError(
                f"hidden_states must have shape (B, T, H), or (N, H) with cu_seqlens, got {shape_of(hidden_states)}"
            )
        weight, bias = self.weight, self.bias
        check_tensor("lm_head_weight", weight, hidden_states.device)
        if not hidden_states.shape[-1]:
            raise ValueError(f"hidden_states must have H > 0, got {shape_of(hidden_states)}")
        if weight.ndim != 2 or weight.shape[1] != hidden_states.shape[-1]:
            wanted = f"(V, H) with H = {hidden_states.shape[-1]} like hidden_states"
            way = "" if weight.numel() else ": gather it first (ZeRO-3), and again before backward"
            raise ValueError(f"lm_head_weight must have shape {wanted}, got {shape_of(weight)}{way}")
        if not weight.shape[0]:
            raise ValueError(f"lm_head_weight must have a row for each of V > 0 tokens, got {shape_of(weight)}")
        if bias is not None:
            check_tensor("lm_head_bias", bias, hidden_states.device)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"lm_head_bias must have shape (V,) = ({weight.shape[0]},), got {shape_of(bias)}")

    def check_finite(self) -> None:
        """Raise if a weight or bias is NaN or infinite. Reads them on the host."""
        check_finite("lm_head_weight", self.weight)
        check_finite("lm_head_bias", self.bias)

    def compute_dtype(self, hidden_states: Tensor) -> torch.dtype:
        """The dtype of the products: autocast's if it is on, else the wider of the two."""
        hidden, weight, device = hidden_states.dtype, self.weight.dtype, hidden_states.device.type
        if torch.is_autocast_enabled(device) and torch.float64 not in (hidden, weight):
            return torch.get_autocast_dtype(device)
        if hidden != weight and device != "cpu" and not torch.compiler.is_compiling():
            warnings.warn(
                f"hidden_states are {hidden} and lm_head_weight is {weight}, so their products run in "
                f"{torch.promote_types(hidden, weight)}, which can be ten times slower on an accelerator: cast one of them, or "
                "call the loss under torch.autocast",
                stacklevel=4,
            )
        return torch.promote_types(hidden, weight)

    def logit_map(self, layout: Layout, dtype: torch.dtype) -> LogitMap:
        """The map from products to logits without the bias, with 1 / temperature of every row (R,)."""
        device, dtype = self.weight.device, accumulator_dtype(dtype)
        return LogitMap(self._inverse_temperature(layout, device, dtype), None, self.logit_scale, self.softcap)

    def _inverse_temperature(self, layout: Layout, device: torch.device, dtype: torch.dtype) -> Tensor:
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            check_tensor("temperature", temperature, device, grad=False)
            temperature = temperature.expand(layout.rollouts) if temperature.ndim == 0 else temperature
            spread = per_rollout_or_token("temperature", temperature, layout, device, dtype)
            if device.type == "cpu" and not torch.compiler.is_compiling():
                wrong = ~(spread > 0) | spread.isinf()
                wrong = wrong if layout.mask is None else wrong & layout.mask
                if bool(wrong.any()):
                    raise ValueError(f"temperature must be > 0 and finite, got {float(spread[wrong][0])}")
            return 1 / spread
        return torch.ones(layout.rows, device=device, dtype=dtype) / temperature  # torch.full would burn it in


def check_ids(completion_ids: Tensor, hidden_states: Tensor) -> None:
    """Check the shape, dtype and device of the ids; `check_vocabulary` checks their range."""
    check_tensor("completion_ids", completion_ids, hidden_states.device, floating=False)
    if completion_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"completion_ids must have dtype int64 or int32, got {completion_ids.dtype}")
    if completion_ids.shape != hidden_states.shape[:-1]:
        wanted = tuple(hidden_states.shape[:-1])
        raise ValueError(
            f"completion_ids must have shape {wanted} like hidden_states without H, got {shape_of(completion_ids)}: "
            "row t predicts completion_ids[:, t], so after a prompt of P tokens pass hidden_states[:, P - 1 : -1]"
        )


def check_vocabulary(completion_ids: Tensor, layout: Layout, vocabulary: int) -> None:
    """Raise if an id that counts is outside [0, V). Reads the ids on the host."""
    flat = completion_ids.reshape(-1)
    outside = (flat < 0) | (flat >= vocabulary)
    outside = outside if layout.mask is None else outside & layout.mask
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        where = (row,) if layout.packed else divmod(row, layout.shape[1])
        raise ValueError(
            f"completion_ids must lie in [0, V) = [0, {vocabulary}) where completion_mask is 1, got {int(flat[row])} at {where}"
        )
