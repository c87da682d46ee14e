"""Settings of the engine that samples: what is refused, what other libraries call it, and when its weights are corrected for."""

import re

import pytest
from rlvr_trainer.config import load
from rlvr_trainer.parsing import ConfigError

from rlvr_ops import SamplingCorrection
from rlvr_ops.objectives.sampling import CORRECTIONS

SERVER = ["rollout.backend=vllm-server", "rollout.servers=[http://host:8000]"]
TRUNCATED = SamplingCorrection("token_truncate", 3.0)


def correction(*overrides):
    return load(None, list(overrides)).objective.sampling


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["policy.precision=full"], None),
        (["policy.precision=mixed"], TRUNCATED),
        (["policy.precision=full", "rollout.backend=vllm"], TRUNCATED),
        (["policy.precision=full", *SERVER], TRUNCATED),
        (["policy.precision=full", "rollout.asynchronous=true"], TRUNCATED),
        (
            ["algorithm.sampling_clip_max=2", "algorithm.sampling_clip_min=0.5"],
            SamplingCorrection(TRUNCATED.kind, 2, 0.5),
        ),
    ],
)
@pytest.mark.parametrize("auto", [[], ["algorithm.sampling_correction=auto"]])
def test_auto_corrects_where_the_samplers_log_probabilities_are_not_the_trainers(overrides, wanted, auto):
    assert correction(*overrides, *auto) == wanted


@pytest.mark.parametrize("precision", ["full", "mixed"])
def test_a_correction_that_is_named_is_used_wherever_the_sampler_is(precision):
    where = f"policy.precision={precision}"
    for kind in CORRECTIONS:
        named = f"algorithm.sampling_correction={kind}"
        assert correction(where, named) == SamplingCorrection(kind, 3.0)
        assert correction(where, named, "algorithm.sampling_clip_max=null") == SamplingCorrection(kind, None)
    assert correction(where, "algorithm.sampling_correction=none") is None


def test_the_correction_reads_back_equal(tmp_path):
    config = load(None, ["algorithm.sampling_correction=sequence_mask", "algorithm.sampling_clip_max=2", *SERVER])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm.sampling_correction=none", "algorithm.sampling_clip_max=2"],
            "algorithm.sampling_clip_max and sampling_clip_min are bounds of a sampling_correction, got none",
        ),
        (
            ["policy.precision=full", "algorithm.sampling_clip_min=0.5"],
            "algorithm.sampling_clip_max and sampling_clip_min are bounds of a sampling_correction, got none",
        ),
        (["algorithm.sampling_clip_max=0"], "algorithm.sampling_clip_max must be > 0, got 0.0"),
        (
            ["algorithm.sampling_clip_min=4"],
            "algorithm.sampling_clip_min must lie between 0 and sampling_clip_max = 3.0, got 4.0",
        ),
        (
            ["algorithm.sampling_correction=token-mask"],
            "unknown algorithm.sampling_correction 'token-mask': did you mean 'token_mask'?",
        ),
        (["algorithm.sampling_correction=null"], "unknown algorithm.sampling_correction 'null'. (known: auto, none, "),
        (["rollout.backend=vLLM"], "unknown rollout.backend 'vLLM': did you mean 'vllm'?"),
        (["rollout.backend=sglang"], "unknown rollout.backend 'sglang'. (known: transformers, vllm, vllm-server)"),
        (SERVER[:1], "rollout.backend=vllm-server needs rollout.servers=[http://host:port]"),
        (SERVER[1:], "rollout.backend=transformers asks no rollout.servers"),
        (["rollout.backend=vllm", *SERVER[1:]], "rollout.backend=vllm asks no rollout.servers"),
        (["rollout.servers=http://host:8000"], "rollout.servers must be a list, got 'http://host:8000'"),
        *(
            (
                [*SERVER[:1], f"rollout.servers=['{url}']"],
                f"rollout.servers must hold addresses like http://host:8000, got '{url}'",
            )
            for url in (
                "host:8000",
                "http://host:8000/v1",
                "ftp://host",
                "http://a b",
                "http://",
                "",
                "http://host:80a0",
                "http://host:70000",
            )
        ),
        (
            [*SERVER[:1], "rollout.servers=[http://host:8000, http://host:8000/]"],
            "rollout.servers holds one server twice: ['http://host:8000', 'http://host:8000/']",
        ),
        (["rollout.memory_share=0"], "rollout.memory_share must be in (0, 1], got 0.0"),
        (["rollout.memory_share=1.5"], "rollout.memory_share must be in (0, 1], got 1.5"),
        (["rollout.server_timeout=0"], "rollout.server_timeout must be greater than 0, got 0.0"),
        (
            ["rollout.backend=vllm", "rollout.temperature=0.005"],
            "rollout.temperature must be at least 0.01 with vLLM, got 0.005",
        ),
        (
            [*SERVER, "evaluation.temperature=0.001"],
            "evaluation.temperature must be at least 0.01 with vLLM, got 0.001",
        ),
        (["rollout.asynchronous=1"], "rollout.asynchronous must be true or false, got 1"),
    ],
)
def test_a_wrong_sampler_setting_is_named_with_what_is_wanted(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(None, overrides)


@pytest.mark.parametrize("url", ["http://host:8000", "https://10.0.0.1:1/", "http://[::1]:8000"])
def test_an_address_of_a_server_is_taken(url):
    assert load(None, [*SERVER[:1], f"rollout.servers=['{url}']"]).rollout.servers == [url]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("use_vllm", "rollout.backend"),
        ("vllm_mode", "rollout.backend"),
        ("rollout.name", "rollout.backend"),
        ("actor_rollout_ref.rollout.name", "rollout.backend"),
        ("name", "algorithm.name or policy.name or task.name"),
        ("vllm_server_base_url", "rollout.servers"),
        ("vllm_server_timeout", "rollout.server_timeout"),
        ("vllm_gpu_memory_utilization", "rollout.memory_share"),
        ("actor_rollout_ref.rollout.gpu_memory_utilization", "rollout.memory_share"),
        ("vllm.gpu_memory_utilization", "rollout.memory_share"),
        ("train.async_enable", "rollout.asynchronous"),
        ("vllm_importance_sampling_correction", "algorithm.sampling_correction"),
        ("vllm_importance_sampling_mode", "algorithm.sampling_correction"),
        ("algorithm.rollout_correction.rollout_is", "algorithm.sampling_correction"),
        ("vllm_importance_sampling_cap", "algorithm.sampling_clip_max"),
        ("vllm_importance_sampling_clip_max", "algorithm.sampling_clip_max"),
        ("algorithm.rollout_correction.rollout_is_threshold", "algorithm.sampling_clip_max"),
        ("vllm_importance_sampling_clip_min", "algorithm.sampling_clip_min"),
    ],
)
def test_the_words_of_other_libraries_are_answered_with_the_setting(word, meant):
    with pytest.raises(ConfigError, match=re.escape(f"unknown key {word}: did you mean {meant}?")):
        load(None, [f"{word}=1"])
