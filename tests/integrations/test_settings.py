"""rlvr_ops.integrations.settings: what a user sets, checked before training starts; and that adapters need no framework."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from framework_cases import SETTINGS, make_batch

from rlvr_ops import Cispo, Dppo, Rollouts, ace_advantages, ace_loss_from_logps
from rlvr_ops.integrations.settings import Settings
from rlvr_ops.surrogates import Real

NAMES = ["prime_rl", "skyrl", "slime", "nemo_rl", "openrlhf", "ms_swift"]
FRAMEWORKS = ["prime_rl", "skyrl", "slime", "nemo_rl", "openrlhf", "swift", "ray", "trl", "transformers"]


def rollouts_of(batch, **others):
    given = {
        "advantages": batch.advantages, "ref_per_token_logps": batch.ref, "old_per_token_logps": batch.old,
        "sampling_per_token_logps": batch.sampling, "completion_mask": batch.mask,
    }  # fmt: skip
    return Rollouts(None, **given | others)


def test_importing_an_integration_imports_no_framework():
    code = f"import sys, {', '.join('rlvr_ops.integrations.' + name for name in NAMES)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(FRAMEWORKS) & set(loaded)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_advantages_are_those_of_ace_advantages(settings):
    batch = make_batch()
    given = {name: value for name, value in settings.items() if name != "confidence"}
    whose = batch.old if settings.get("confidence") == "old" else batch.logps
    found = Settings(**settings).advantages(batch.logps, rollouts_of(batch))
    assert torch.equal(found, ace_advantages(batch.advantages, whose, batch.ref, batch.mask, **given))


def test_without_an_old_policy_its_confidence_is_the_current_ones():
    batch = make_batch()
    rollouts = rollouts_of(batch, old_per_token_logps=None)
    old, current = (Settings(confidence=name).advantages(batch.logps, rollouts) for name in ("old", "current"))
    assert torch.equal(old, current)


def test_alpha_0_hands_the_advantages_back_and_has_no_metrics():
    batch, chosen = make_batch(), Settings(alpha=0.0)
    assert chosen.advantages(batch.logps, rollouts_of(batch)) is batch.advantages
    assert chosen.metrics(batch.logps, rollouts_of(batch)) == {}


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_metrics_are_those_of_the_policy_whose_confidence_counts(settings):
    batch = make_batch()
    whose = batch.old if settings.get("confidence") == "old" else batch.logps
    wanted = ace_loss_from_logps(
        whose, batch.advantages, ref_per_token_logps=batch.ref, completion_mask=batch.mask, **settings
    ).metrics
    found = Settings(**settings).metrics(batch.logps, rollouts_of(batch))
    assert found == {name: value for name, value in wanted.items() if name.startswith("ace/")}
    assert found["ace/weight/mean"] > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"surrogate": "cispo", "surrogate_parameters": {"ratio_max": 3.0}},
        {"surrogate": Cispo(ratio_max=3.0)},
        {
            "surrogate": "ppo_clip",
            "importance_sampling_level": "sequence",
            "surrogate_parameters": {"epsilon_low": 3e-4},
        },
        {"surrogate": "cispo", "sampling_correction": "token_truncate", "sampling_clip_max": 2.0},
        {"surrogate": "ppo_clip", "off_policy_mask_threshold": 0.1},
        {"surrogate": lambda logps, rows: -rows.advantages * (logps - rows.sampling_per_token_logps).exp()},
    ],
)
def test_a_surrogate_takes_its_numbers_and_corrections(settings):
    batch, chosen = make_batch(), Settings(**settings)
    numbers = settings.get("surrogate_parameters", {})
    surrogate, keywords = settings["surrogate"], dict(settings)
    keywords.pop("surrogate_parameters", None)
    if surrogate == "ppo_clip":
        keywords |= numbers
    elif numbers:
        keywords["surrogate"] = Cispo(**numbers)
    reads = not isinstance(surrogate, str | Cispo) or {"sampling_correction", "off_policy_mask_threshold"} & set(
        settings
    )
    wanted = ace_loss_from_logps(
        batch.logps, batch.advantages, ref_per_token_logps=batch.ref, old_per_token_logps=batch.old,
        sampling_per_token_logps=batch.sampling if reads else None, completion_mask=batch.mask, **keywords,
    ).loss  # fmt: skip
    rollouts = rollouts_of(batch)
    weighted = rollouts_of(batch, advantages=chosen.advantages(batch.logps, rollouts))
    torch.testing.assert_close(chosen.loss(batch.logps, weighted, "grpo").loss, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"confidence": "sampler"}, "confidence"),
        ({"confidence_reduction": "max"}, "confidence_reduction"),
        ({"shape": "gelu"}, "shape"),
        ({"surrogate": "ppo"}, "ppo_clip"),
        ({"surrogate": "ppo", "surrogate_parameters": {"epsilon_low": 0.1}}, "ppo_clip"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level.*framework's own loss"),
        ({"sampling_correction": "token_mask"}, "sampling_correction.*framework's own loss"),
        ({"surrogate_parameters": {"epsilon_low": 0.1}}, "surrogate_parameters.*framework's own loss"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold.*framework's own loss"),
        ({"surrogate": Real(2)}, "alpha=1.0 does nothing with surrogate=Real.*signs alone: set alpha=0"),
        ({"surrogate": Dppo(), "importance_sampling_level": "sequence"}, "importance_sampling_level"),
    ],
)
def test_a_bad_setting_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_a_surrogate_of_signs_is_taken_with_alpha_0():
    assert Settings(alpha=0.0, surrogate=Real(2)).objective("grpo").surrogate == Real(2)


def test_a_reference_of_zeros_is_refused_whatever_the_padding_holds():
    batch = make_batch()
    zeros = torch.where(batch.mask, 0.0, 7.0)
    with pytest.raises(ValueError, match=r"reference's values holds only zeros.*score it, or alpha=0"):
        Settings().check_reference(
            "reference's values", rollouts_of(batch, ref_per_token_logps=zeros), batch.logps, "score it"
        )
    certain = torch.where(batch.mask, -1e-4, -7.0)
    Settings().check_reference("ref", rollouts_of(batch, ref_per_token_logps=zeros), certain, "score it")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_lines_of_the_docstring(name):
    page = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text().splitlines()
    shown = {line.strip() for line in page}
    lines = [
        line
        for line in importlib.import_module(f"rlvr_ops.integrations.{name}").__doc__.splitlines()
        if line[:4] == "    "
    ]
    assert lines
    assert [line for line in lines if line.strip() not in shown] == []
