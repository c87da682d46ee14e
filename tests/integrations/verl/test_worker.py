"""Real TrainingWorker steps, by verl's engine and by ours, against our own losses on a transformers model."""

import pytest
import tiny
import torch
from verl.workers.utils import losses

import rlvr_ops.integrations.verl.engine  # noqa: F401
from rlvr_ops import Ace, ace_loss, ace_loss_from_logps
from rlvr_ops.head.from_model import hidden_states_of

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
OURS = {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 3.0}


@pytest.fixture(params=["", "rlvr_ops"], ids=["verls-engine", "our-engine"])
def engine(request, monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_VENDOR", request.param)


def given(tensors):
    return {
        "ref_per_token_logps": tensors["ref_log_prob"],
        "old_per_token_logps": tensors["old_log_probs"],
        "completion_mask": tensors["response_mask"],
    }


def expected(path, tensors, temperature=1.0, **config):
    """Our loss on the model's own log-probabilities, and the gradient of every parameter."""
    model, logps, _ = tiny.plain_scores(path, tensors, temperature)
    out = ace_loss_from_logps(logps, tensors["advantages"], **given(tensors), **config)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def assert_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("remove_padding", [False, True], ids=["padded", "packed"])
def test_a_step_of_ace_is_our_own_loss_and_gradient(engine, models, tie, remove_padding):
    path, tensors = models(tie_word_embeddings=tie), tiny.batch()
    worker = tiny.training_worker(path, remove_padding=remove_padding)
    metrics, gradients = tiny.train(worker, tiny.nested(tensors), tiny.actor("ace-dapo", **CLIP), Ace(1.3))
    out, wanted = expected(path, tensors, alpha=1.3, loss_type="dapo", **OURS)
    assert metrics["loss"] == pytest.approx(out.loss.item(), abs=1e-5)
    assert_gradients(gradients, wanted)


@pytest.mark.parametrize("method", ["ace-grpo", "ace-gspo", "ace-cispo"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_other_losses_and_temperatures_too(engine, models, method, temperature):
    path, tensors = models(), tiny.batch()
    mode = "seq-mean-token-mean" if method == "ace-grpo" else "token-mean"
    config = {
        "ace-grpo": OURS,
        "ace-gspo": OURS | {"delta": None, "importance_sampling_level": "sequence"},
        "ace-cispo": {"surrogate": "cispo"},
    }[method]
    actor = tiny.actor(method, loss_agg_mode=mode, **CLIP)
    metrics, gradients = tiny.train(
        tiny.training_worker(path), tiny.nested(tensors, temperature=temperature), actor, Ace()
    )
    out, wanted = expected(path, tensors, temperature, loss_type=mode, **config)
    assert metrics["loss"] == pytest.approx(out.loss.item(), abs=1e-5)
    assert_gradients(gradients, wanted)


def test_a_step_is_our_loss_from_hidden_states(engine, models):
    path, tensors = models(), tiny.batch()
    model, *_ = tiny.plain_scores(path, tensors)
    hidden = hidden_states_of(model, tensors["input_ids"], tensors["attention_mask"], tiny.RESPONSE)
    out = ace_loss(
        hidden, model.lm_head.weight, tensors["responses"], tensors["advantages"], loss_type="dapo", **given(tensors), **OURS
    )  # fmt: skip
    out.loss.backward()
    metrics, gradients = tiny.train(tiny.training_worker(path), tiny.nested(tensors), tiny.actor("ace", **CLIP), Ace())
    assert metrics["loss"] == pytest.approx(out.loss.item(), abs=1e-5)
    assert_gradients(gradients, {name: p.grad for name, p in model.named_parameters()})


def test_alpha_0_is_a_step_of_verls_vanilla_loss(engine, models):
    found, wanted = (
        tiny.train(tiny.training_worker(models()), tiny.nested(tiny.batch()), tiny.actor(mode), **loss)
        for mode, loss in (("ace", {"ace": Ace(0.0)}), ("vanilla", {"loss": verls}))
    )
    assert found[0]["loss"] == pytest.approx(wanted[0]["loss"], abs=1e-6)
    assert_gradients(found[1], wanted[1])


def verls(config, model_output, data, dp_group=None):
    return losses.ppo_loss(config, model_output, data, dp_group)


def test_micro_batches_make_no_difference(engine, models):
    steps = [
        tiny.train(
            tiny.training_worker(models(), micro_batch=size), tiny.nested(tiny.batch()), tiny.actor("ace"), Ace()
        )
        for size in (1, 4)
    ]
    assert steps[0][0]["loss"] == pytest.approx(steps[1][0]["loss"], abs=1e-6)
    assert_gradients(steps[0][1], steps[1][1])


def test_the_second_step_goes_on_from_the_updated_weights(engine, models, tmp_path):
    path, worker = models(), tiny.training_worker(models(), remove_padding=True)
    actor = tiny.actor("ace", **CLIP)
    tiny.train(worker, tiny.nested(tiny.batch()), actor, Ace())
    model, *_ = tiny.plain_scores(path, tiny.batch())
    model.load_state_dict(tiny.weights(worker))
    model.save_pretrained(tmp_path)
    metrics, gradients = tiny.train(worker, tiny.nested(tiny.batch(1)), actor, Ace())
    out, wanted = expected(tmp_path, tiny.batch(1), loss_type="dapo", **OURS)
    assert metrics["loss"] == pytest.approx(out.loss.item(), abs=1e-5)
    assert_gradients(gradients, wanted)


def test_kl_and_entropy_terms_of_verl_stay(engine, models):
    config = {"use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_coeff": 0.02}
    path, tensors = models(), tiny.batch()
    metrics, gradients = tiny.train(
        tiny.training_worker(path), tiny.nested(tensors), tiny.actor("ace", **CLIP, **config), Ace()
    )
    model, logps, entropies = tiny.plain_scores(path, tensors)
    out = ace_loss_from_logps(
        logps, tensors["advantages"], per_token_entropies=entropies, entropy_coef=0.02, beta=0.1, loss_type="dapo",
        **given(tensors), **OURS,
    )  # fmt: skip
    out.loss.backward()
    assert metrics["loss"] == pytest.approx(out.loss.item(), abs=1e-5)
    assert_gradients(gradients, {name: p.grad for name, p in model.named_parameters()})


def test_the_metrics_of_ace_are_in_verls_logs(engine, models):
    path, tensors = models(), tiny.batch()
    metrics, _ = tiny.train(
        tiny.training_worker(path, micro_batch=4), tiny.nested(tensors), tiny.actor("ace", **CLIP), Ace(0.5)
    )
    out, _ = expected(path, tensors, alpha=0.5, loss_type="dapo", **OURS)
    for name, value in out.metrics.items():
        assert metrics[name][0].aggregate() == pytest.approx(float(value), abs=1e-5), name
    assert {"ace/weight/mean", "ace/weight/max", "ace/shift/mean", "ace/frac_overconfident"} <= metrics.keys()


def test_a_batch_without_a_reference_is_refused(engine, models):
    with pytest.raises(ValueError, match="compares the policy with its reference"):
        tiny.train(tiny.training_worker(models()), tiny.nested(tiny.batch(ref=False)), tiny.actor("ace"), Ace())


def test_our_engine_shows_the_reference_to_verls_own_loss_function(models, monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "rlvr_ops")
    monkeypatch.setenv("RLVR_OPS_ACE_ALPHA", "1.3")
    path, tensors = models(), tiny.batch()
    metrics, gradients = tiny.train(
        tiny.training_worker(path), tiny.nested(tensors), tiny.actor("ace", **CLIP), loss=verls
    )
    out, wanted = expected(path, tensors, alpha=1.3, loss_type="dapo", **OURS)
    assert metrics["loss"] == pytest.approx(out.loss.item(), abs=1e-5)
    assert_gradients(gradients, wanted)
