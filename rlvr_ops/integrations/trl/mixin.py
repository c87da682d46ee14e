"""ACE for a trainer of TRL: a reference even at beta = 0, and advantages re-weighted once log-probabilities are there."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from rlvr_ops.integrations.trl.config import ace_of
from rlvr_ops.integrations.trl.fused_head import check_head, use_fused_head
from rlvr_ops.integrations.trl.fused_loss import fused_loss, objective_of
from rlvr_ops.integrations.trl.metrics import log_ace
from rlvr_ops.integrations.trl.refusals import check_arguments, check_reference, check_trainer, warn_of_dropout
from rlvr_ops.integrations.trl.reweighting import Reweighted


class ACEMixin:
    """ACE for a subclass of TRL's `GRPOTrainer`. Name it before the trainer, and give the trainer's config `ACEArguments`.

    A wrong completion's advantage is multiplied by 1 + alpha f(c), c the confidence shift from the reference to the policy.
    The reference is the one of beta > 0, also at beta = 0: the initial model, the model without its adapters, or the copy
    that TRL makes of a trained adapter. Everything else stays the trainer's: generation, rewards, losses, denominators,
    metrics. `ace/*` metrics are added.

    A subclass is taken if its `_compute_loss` asks `_get_per_token_logps_and_entropies` before it reads the advantages.

    >>> from trl.experimental.gmpo import GMPOTrainer
    >>> class ACEGMPOTrainer(ACEMixin, GMPOTrainer):
    ...     pass

    Raises:
        TypeError: the trainer has no reference (AsyncGRPOTrainer), or was rewritten (Unsloth); a subclass reads its
            advantages too early, or has a loss of its own and fused_loss=True.
        ValueError: a model without a name to load the reference from.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        check_trainer(cls, ACEMixin)

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *arguments: Any, **keywords: Any
    ) -> None:
        check_arguments(type(self), args)
        self._ace = ace_of(args)
        self._fused = bool(getattr(args, "fused_loss", False))
        adapted = keywords.get("peft_config") is not None or hasattr(model, "peft_config")
        check_reference(model, needed=self._ace.alpha > 0 and not adapted)
        self._policy: Any = None
        self._reweighted: Reweighted | None = None
        beta = args.beta
        args.beta = self._scoring_beta(beta)
        try:
            super().__init__(model, reward_funcs, args, *arguments, **keywords)  # type: ignore[call-arg]
        finally:
            args.beta = beta
        self.beta = beta
        if self._ace.alpha > 0 and not args.disable_dropout:
            warn_of_dropout(self.model)  # type: ignore[attr-defined]
        if self._fused:
            check_head(self.model)  # type: ignore[attr-defined]
            for scored in (self.model, self.ref_model):  # type: ignore[attr-defined]
                use_fused_head(scored, self.temperature, fp32=args.cast_lm_head_to_fp32)  # type: ignore[attr-defined]

    def _scoring_beta(self, beta: float) -> float:
        """A beta at which TRL loads and scores a reference if ACE wants one."""
        return beta or float(self._ace.alpha > 0)

    @contextmanager
    def _reference_scored(self) -> Iterator[None]:
        beta, self.beta = self.beta, self._scoring_beta(self.beta)
        try:
            yield
        finally:
            self.beta = beta

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self._reference_scored():
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]

    def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
        scored = functools.partial(model, with_entropy=keywords.get("compute_entropy", False)) if self._fused else model
        found = super()._get_per_token_logps_and_entropies(scored, *arguments, **keywords)  # type: ignore[misc]
        if self._reweighted is not None and model is self._policy:  # a loss may score other models as well
            self._reweighted.weigh(found[0])
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        objective = objective_of(self) if self._fused else None
        if objective is not None:
            return fused_loss(self, model, inputs, objective)
        if self._ace.alpha == 0:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        self._policy, self._reweighted = model, Reweighted(inputs, self._ace, type(self).__name__)
        batch = self._reweighted
        try:
            loss: Tensor = super()._compute_loss(model, batch)  # type: ignore[misc]
        finally:
            self._policy = self._reweighted = None
        if batch.logps is None:
            raise TypeError(f"{type(self).__name__} computes no log-probabilities in its loss: ACE needs them")
        log_ace(self, self._ace, inputs, batch.logps)
        return loss
