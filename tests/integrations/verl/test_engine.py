"""Our head as verl's engine, against the model's own logits and against verl's engine."""

import pytest
import tiny
import torch
import transformers
from torch.distributed.tensor import DTensor
from verl.models.transformers.dense_common import CausalLMOutputForPPO

import rlvr_ops.integrations.verl.engine as ours
from rlvr_ops import Ace
from rlvr_ops.integrations.verl import head

KINDS = {  # what each model's logits are besides hidden W^T
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},  # softcap, tied
    "gemma3_text": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},  # scale, tied
    "granite": {"logits_scaling": 4.0},  # divisor
    "phi": {},  # bias on the head
    "olmo2": {},
}
PADDING = pytest.mark.parametrize("remove_padding", [False, True], ids=["padded", "packed"])


@pytest.fixture(autouse=True)
def vendor(monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "rlvr_ops")


def responses(values, tensors):
    """The rows (B, T) that predict the responses, out of all sequences' tokens, 0 where there is none."""
    out = torch.zeros(tensors["response_mask"].shape)
    for row, part in enumerate(values.split(tensors["attention_mask"].sum(-1).tolist())):
        length = int(tensors["response_mask"][row].sum())
        out[row, :length] = part[-length - 1 : -1]
    return out


@PADDING
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_and_entropies_are_those_of_the_models_logits(models, kind, remove_padding):
    path, tensors = models(kind, **KINDS[kind]), tiny.batch()
    worker = tiny.training_worker(path, remove_padding=remove_padding)
    assert isinstance(worker.engine, ours.HeadEngine)
    logps, entropies = tiny.score(worker, tiny.nested(tensors, temperature=0.7))
    mask = tensors["response_mask"].bool()
    with torch.no_grad():
        _, wanted, wanted_entropies = tiny.plain_scores(path, tensors, temperature=0.7)
    torch.testing.assert_close(responses(logps, tensors)[mask], wanted[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(responses(entropies, tensors)[mask], wanted_entropies[mask], rtol=1e-5, atol=1e-5)


@PADDING
@pytest.mark.parametrize("kind", ["gemma2", "granite", "phi"])
def test_gradients_are_those_of_verls_engine(models, kind, remove_padding, monkeypatch):
    step = []
    for name in ("rlvr_ops", ""):
        monkeypatch.setenv("VERL_ENGINE_VENDOR", name)
        worker = tiny.training_worker(models(kind, **KINDS[kind]), remove_padding=remove_padding)
        step.append(tiny.train(worker, tiny.nested(tiny.batch()), tiny.actor("ace", entropy_coeff=0.05), Ace()))
    assert step[0][0]["loss"] == pytest.approx(step[1][0]["loss"], abs=1e-5)
    for name, gradient in step[1][1].items():
        torch.testing.assert_close(step[0][1][name], gradient, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_the_step_is_verls_but_for_rounding(models, monkeypatch):
    norms = []
    for name in ("rlvr_ops", ""):
        monkeypatch.setenv("VERL_ENGINE_VENDOR", name)
        worker = tiny.training_worker(models(), dtype="bfloat16")
        metrics, _ = tiny.train(worker, tiny.nested(tiny.batch()), tiny.actor("ace"), Ace())
        norms.append(metrics["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.03)


def test_lora_in_the_layers_gets_verls_gradients(models, monkeypatch):
    path, step = models(), []
    for name in ("rlvr_ops", ""):
        monkeypatch.setenv("VERL_ENGINE_VENDOR", name)
        torch.manual_seed(0)
        worker = tiny.training_worker(path, lora_rank=2, target_modules=["q_proj", "v_proj", "down_proj"])
        tiny.train(worker, tiny.nested(tiny.batch()), tiny.actor("ace"), Ace())  # B leaves 0
        step.append(tiny.train(worker, tiny.nested(tiny.batch(1)), tiny.actor("ace"), Ace())[1])
    trained = [name for name, gradient in step[1].items() if "lora" in name and gradient.any()]
    assert trained
    for name in step[1]:
        torch.testing.assert_close(step[0][name], step[1][name], rtol=1e-4, atol=1e-5)


def test_the_reference_that_verl_scores_with_its_adapter_off_is_the_base_model(models):
    path, tensors = models(), tiny.batch()
    worker = tiny.training_worker(path, lora_rank=2, target_modules=["q_proj"])
    for _ in range(2):
        tiny.train(worker, tiny.nested(tensors), tiny.actor("ace"), Ace())
    data = tiny.nested(tensors)
    data.set_non_tensor("no_lora_adapter", True)
    with torch.no_grad():
        _, wanted, _ = tiny.plain_scores(path, tensors)
    mask = tensors["response_mask"].bool()
    found = responses(tiny.score(worker, data)[0], tensors)
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", [False, True])
def test_entropies_cost_nothing_unless_somebody_reads_them(models, monkeypatch, asked):
    seen = []
    score = head.token_logps
    monkeypatch.setattr(head, "token_logps", lambda *a, **k: seen.append(k["with_entropy"]) or score(*a, **k))
    worker = tiny.training_worker(models())
    seen.clear()
    _, entropies = tiny.score(worker, tiny.nested(tiny.batch(), entropy=asked))
    assert seen == [asked, asked]
    assert (entropies is not None) == asked


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_hooks_fire_so_that_the_head_sees_the_whole_weight(models, monkeypatch, tie):
    worker, seen = tiny.training_worker(models(tie_word_embeddings=tie)), []
    score = head.token_logps
    monkeypatch.setattr(
        head, "token_logps", lambda hidden, weight, *a, **k: seen.append(weight) or score(hidden, weight, *a, **k)
    )
    layer = worker.engine.module.lm_head
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    tiny.score(worker, tiny.nested(tiny.batch()))
    assert seen[1::2] == ["hook", "hook"]
    assert not any(isinstance(weight, DTensor) for weight in seen[::2])
    assert tie or isinstance(layer.weight, DTensor)


@pytest.mark.filterwarnings("error:FSDP2-wrapped module")
def test_outputs_are_no_views_which_would_endanger_fsdps_hooks(models):
    tiny.train(tiny.training_worker(models()), tiny.nested(tiny.batch()), tiny.actor("ace", entropy_coeff=0.1), Ace())


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_check_at_the_start_leaves_every_weight_sharded(models, tie):
    worker = tiny.training_worker(models(tie_word_embeddings=tie))
    assert all(isinstance(parameter, DTensor) for parameter in worker.engine.module.parameters())


def test_a_model_that_gets_no_temperature_gives_its_logits(models):
    worker, ids = tiny.training_worker(models()), torch.arange(1, 6)[None]
    model, *_ = tiny.plain_scores(models(), tiny.batch())
    torch.testing.assert_close(worker.engine.module(input_ids=ids).logits, model(input_ids=ids).logits)


VERLS_HEAD = {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}


def test_verls_own_head_without_logits_fails_where_fsdp2_shards_the_lm_head_alone(models, monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "")
    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", transformers.Qwen3ForCausalLM.forward)  # it patches
    worker = tiny.training_worker(models("qwen3", tie_word_embeddings=False), **VERLS_HEAD)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        tiny.train(worker, tiny.nested(tiny.batch()), tiny.actor("ace"), Ace())


def test_verls_own_head_without_logits_leaves_out_what_a_model_does_to_its_logits(models, monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "")
    monkeypatch.setattr(transformers.GraniteForCausalLM, "forward", transformers.GraniteForCausalLM.forward)
    path, tensors = models("granite", logits_scaling=4.0, tie_word_embeddings=True), tiny.batch()
    logps, _ = tiny.score(tiny.training_worker(path, **VERLS_HEAD), tiny.nested(tensors))
    monkeypatch.undo()
    mask = tensors["response_mask"].bool()
    with torch.no_grad():
        _, scaled, _ = tiny.plain_scores(path, tensors)
        _, unscaled, _ = tiny.plain_scores(path, tensors, temperature=0.25)
    torch.testing.assert_close(responses(logps, tensors)[mask], unscaled[mask], rtol=1e-4, atol=1e-4)
    assert (responses(logps, tensors)[mask] - scaled[mask]).abs().max() > 0.1


def test_verls_own_head_beside_ours_is_refused(models):
    with pytest.raises(ValueError, match=r"brings a head of its own.*use_fused_kernels=True: set it to False"):
        tiny.training_worker(models(), use_fused_kernels=True, fused_kernel_options={"impl_backend": "torch"})


def test_an_adapter_on_the_head_is_refused(models):
    with pytest.raises(TypeError, match="lm_head of Qwen2ForCausalLM has an adapter: leave lm_head out"):
        tiny.training_worker(models(), lora_rank=2, target_modules=["q_proj", "lm_head"])


def test_logits_that_are_made_in_an_unknown_way_are_refused(models, monkeypatch):
    from rlvr_ops.head import from_model

    monkeypatch.setattr(from_model, "DIVISORS", ())
    with pytest.raises(TypeError, match="cannot vouch for GraniteForCausalLM"):
        tiny.training_worker(models("granite", logits_scaling=4.0))


def test_a_head_of_another_kind_is_refused(models):
    model = transformers.AutoModelForCausalLM.from_pretrained(models())
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match=r"must be an nn\.Linear, got Sequential"):
        head.install(model, dict)


def test_the_check_leaves_each_module_training_or_not_as_it_was(models):
    model = transformers.AutoModelForCausalLM.from_pretrained(models()).train()
    frozen = model.model.layers[0].eval()
    head.install(model, CausalLMOutputForPPO)
    head.check(model, "cpu")
    assert model.training
    assert model.lm_head.training
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize("vocabulary", [5, tiny.VOCABULARY])
def test_the_check_takes_any_vocabulary_and_no_nan(models, vocabulary):
    model = transformers.AutoModelForCausalLM.from_pretrained(models(vocab_size=vocabulary))
    head.install(model, CausalLMOutputForPPO)
    head.check(model, "cpu")
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(TypeError, match=r"cannot vouch for Qwen2ForCausalLM: .*differ by nan of the largest"):
        head.check(model, "cpu")
