"""Who takes part in which case."""

from benchmarks import peers, peers_fused
from benchmarks.cases import Batch, Case
from benchmarks.eager import by_cross_entropy, by_logsumexp, on_active_rows, scored
from benchmarks.entrants import Entry, Outputs, Run, need_cuda
from rlvr_ops import ace_loss, grpo_loss, token_logps


def _ours(case: Case, schedule: str = "auto") -> Run:
    def score(batch: Batch) -> Outputs:
        scores = token_logps(batch.hidden, batch.weight, batch.ids, with_entropy=case.entropy)
        return Outputs(None, scores.logps, scores.entropy)

    def loss(batch: Batch) -> Outputs:
        given = batch.hidden, batch.weight, batch.ids, batch.advantages
        if case.loss == "ace":
            out = ace_loss(
                *given, ref_per_token_logps=batch.ref, old_per_token_logps=batch.old, schedule=schedule,
                with_entropy=case.entropy,
            )  # fmt: skip
        else:
            out = grpo_loss(
                *given, old_per_token_logps=batch.old, schedule=schedule, with_entropy=case.entropy
            )  # fmt: skip
        return Outputs(out.loss, out.per_token_logps, out.metrics.get("entropy"))

    return score if case.forward else loss


def _without_workspace(case: Case) -> Run:
    need_cuda()

    def score(batch: Batch) -> Outputs:
        return Outputs(None, token_logps(batch.hidden, batch.weight, batch.ids, workspace_bytes=0).logps)

    return score


def _all_rows(case: Case) -> bool:
    return case.active == 1 and not case.forward


def _log_probabilities_alone(case: Case) -> bool:
    return not case.entropy


def _plain_grpo(case: Case) -> bool:
    return case.loss == "grpo" and not case.entropy


def _floor(case: Case) -> bool:
    return _all_rows(case) and not case.entropy and not case.frozen


def _nothing(case: Case) -> Run:
    return lambda batch: Outputs()


CCE, TORCH = "cut-cross-entropy", "F.linear_cross_entropy"
ENTRIES = [
    Entry("products", "matrix products alone", _nothing, kind="products"),
    Entry("products-8NVH", "matrix products of two passes", _nothing, lambda c: _all_rows(c) and not c.frozen,
          kind="products"),
    Entry("eager-cross_entropy", "eager, cross_entropy", lambda c: scored(c, by_cross_entropy), kind="eager"),
    Entry("eager-logsumexp", "eager, logsumexp", lambda c: scored(c, by_logsumexp), kind="eager"),
    Entry("rlvr_ops", "rlvr_ops", _ours, kind="ours"),
    Entry("rlvr_ops-two_pass", "rlvr_ops, two_pass", lambda c: _ours(c, "two_pass"), _all_rows, kind="ours"),
    Entry("rlvr_ops-no_workspace", "rlvr_ops, workspace_bytes=0", _without_workspace,
          lambda c: c.forward and not c.entropy, kind="ours"),
    Entry("eager-active_rows", "eager, cross_entropy on active rows", lambda c: on_active_rows(c, by_cross_entropy),
          lambda c: c.active < 1),
    Entry("eager-compiled", "eager under torch.compile", peers.compiled_eager),
    Entry("trl", "TRL ChunkedLogProbFunction", peers.trl_chunked, package="trl"),
    Entry("liger-scaled_ce", "Liger FusedLinearScaledCrossEntropy", peers.liger_scaled, package="liger-kernel"),
    Entry("verl-torch", "verl FusedLinearForPPO", peers.verl_torch, package="verl"),
    Entry("verl-triton", "verl linear_cross_entropy", peers.verl_triton, package="verl"),
    Entry("torch-chunked", f"{TORCH}, per token", peers.torch_linear_cross_entropy, _log_probabilities_alone, "torch"),
    Entry("cce-exact", CCE, peers.cut_cross_entropy, _log_probabilities_alone, CCE),
    Entry("liger-grpo", "Liger FusedLinearGRPOLoss", peers_fused.liger_grpo, _plain_grpo, "liger-kernel"),
    Entry("liger-grpo-tf32", "Liger FusedLinearGRPOLoss, TF32", peers_fused.liger_grpo_tf32, _plain_grpo, "liger-kernel"),
    Entry("liger-triton_grpo", "Liger triton_grpo_loss", peers_fused.liger_triton_grpo, _plain_grpo, "liger-kernel"),
    Entry("torch-floor", f"{TORCH}, mean", peers_fused.torch_cross_entropy_floor, _floor, "torch", "floor"),
    Entry("quack-floor", "QuACK chunked_linear_cross_entropy", peers_fused.quack_floor, _floor, "quack-kernels", "floor"),
]  # fmt: skip
"""In the order in which they are loaded."""

NEEDED = ("products", "eager-cross_entropy", "eager-logsumexp")
"""Measured in every case, because the ratios are to them."""


def entries(case: Case) -> list[Entry]:
    """Those that can do the case at all, whether or not they are installed here."""
    return [entry for entry in ENTRIES if entry.takes(case)]
