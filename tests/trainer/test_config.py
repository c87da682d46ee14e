"""Settings: presets, overrides, and messages that say what to write instead."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from rlvr_trainer.algorithm import AlgorithmConfig
from rlvr_trainer.config import PRESETS, Config, load, shipped
from rlvr_trainer.names import MEANINGS, settings_of
from rlvr_trainer.parsing import ConfigError

from rlvr_ops import ACELoss, surrogates


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_what_nobody_wrote(name):
    algorithm = load(None, [f"algorithm.name={name}"]).algorithm
    for key, value in PRESETS[name].items():
        assert getattr(algorithm, key) == value
    assert algorithm.alpha == (1.0 if name.startswith("ace-") else 0.0)


def test_what_is_written_wins_over_the_preset():
    assert load(None, ["algorithm.name=ace-dapo", "algorithm.epsilon_high=0.3"]).algorithm.epsilon_high == 0.3


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_configuration_loads(name):
    assert load(name).run.steps > 0


def test_the_resolved_configuration_reads_back_equal(tmp_path):
    config = load("demo-tiny", ["algorithm.name=dapo", "task.instruction= = é"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "config.yaml") == config


def test_yaml_numbers_become_what_the_key_wants():
    config = load(None, ["optim.learning_rate=1e-5", "algorithm.beta=0", "algorithm.delta=null", "task.name=12"])
    assert (config.optim.learning_rate, config.algorithm.beta, config.algorithm.delta) == (1e-5, 0.0, None)
    assert config.task.name == "12"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learnig_rate=1", r"unknown key optim\.learnig_rate: did you mean optim\.learning_rate\?"),
        ("optimm.learning_rate=1", r"unknown key optimm\.learning_rate: did you mean optim\.learning_rate\?"),
        ("algorithm.name=ace-grop", r"unknown algorithm\.name 'ace-grop': did you mean 'ace-grpo'\?"),
        ("algorithm.loss_type=bnpo", r"unknown algorithm\.loss_type 'bnpo'.*known: dapo, dr_grpo, grpo"),
        ("run.steps=ten", r"run\.steps must be an integer, got 'ten' \(str\)"),
        ("run.steps=1.5", r"run\.steps must be an integer, got 1\.5 \(float\)"),
        ("run.steps=true", r"run\.steps must be an integer, got True \(bool\)"),
        ("optim.learning_rate=fast", r"optim\.learning_rate must be a number, got 'fast'"),
        ("run.log_completions=maybe", r"run\.log_completions must be true or false, got 'maybe'"),
        ("optim.betas=[0.9, x]", r"optim\.betas\[1\] must be a number, got 'x'"),
        ("optim.betas=[0.9]", r"optim\.betas must hold two numbers"),
        ("task.parameters=3", r"task\.parameters must be a section of keys, got 3"),
        ("task=3", r"must look like section\.key=value, got 'task=3'"),
        ("run.steps", r"must look like section\.key=value, got 'run\.steps'"),
        ("run.steps=[", r"run\.steps=\[ is not a YAML value: .*expected the node content"),
        ("run.steps.more=3", r"unknown key|must be an integer"),
        ("rollout.group_size=1", r"rollout\.group_size must be at least 2, got 1"),
        ("rollout.temperature=0", r"rollout\.temperature must be greater than 0, got 0\.0"),
        ("optim.learning_rate=.nan", r"optim\.learning_rate must be a finite number, got nan"),
        ("algorithm.delta=1.1", r"algorithm\.delta must be > 1 \+ epsilon_high = 1\.2 or None, got 1\.1"),
        ("algorithm.alpha=-1", r"algorithm\.alpha must be >= 0 and finite, got -1"),
        ("algorithm.epsilon_low=0", r"algorithm\.epsilon_low must be > 0 and finite, got 0\.0"),
        ("algorithm.surrogate=sappo", r"algorithm\.surrogate must be one of .*did you mean 'sapo'"),
        (
            "algorithm.surrogate=nowhere:loss",
            r"algorithm\.surrogate=nowhere:loss cannot be loaded: No module named 'nowhere'",
        ),
        (
            "algorithm.surrogate=nowhere.py:loss",
            r"algorithm\.surrogate=nowhere\.py:loss cannot be loaded: .*No such file",
        ),
        ("algorithm.surrogate=math:pi", r"algorithm\.surrogate=math:pi must be a function, got 3\.14"),
        ("algorithm.name=[a]", r"unknown algorithm\.name '\[a\]'"),
        ("algorithm.surrogate=json:loss", r"cannot be loaded: module 'json' has no attribute 'loss'"),
        (
            "algorithm.surrogate_parameters={ratio_max: 3}",
            r"algorithm\.surrogate_parameters do not fit: ppo_clip\(\) got an unexpected",
        ),
        ("algorithm.importance_sampling_level=rollout", r"unknown algorithm\.importance_sampling_level 'rollout'"),
        ("algorithm.top_entropy_quantile=0", r"algorithm\.top_entropy_quantile must lie in \(0, 1\]"),
        ("algorithm.advantages=arm", r"unknown algorithm\.advantages 'arm'"),
        ("algorithm.overlong_fraction=1", r"algorithm\.overlong_fraction must be in \[0, 1\), got 1\.0"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_wanted(override, message):
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=1e-5", "unknown key optim.lr: did you mean optim.learning_rate?"),
        ("lr=1e-5", "unknown key lr: did you mean optim.learning_rate?"),
        ("num_generations=8", "unknown key num_generations: did you mean rollout.group_size?"),
        ("rollout.n=8", "unknown key rollout.n: did you mean rollout.group_size?"),
        ("data.train_batch_size=8", "unknown key data.train_batch_size: did you mean rollout.prompts?"),
        ("actor_rollout_ref.actor.optim.lr=1", "actor.optim.lr: did you mean optim.learning_rate?"),
        ("per_device_train_batch_size=8", "did you mean optim.micro_batch?"),
        ("max_completion_length=8", "did you mean rollout.max_new_tokens?"),
        ("algorithm.kl_coef=0", "did you mean algorithm.beta?"),
        ("beta=0", "did you mean algorithm.beta?"),
        ("clip_ratio=0.2", "did you mean algorithm.epsilon_low?"),
        ("max_steps=8", "did you mean run.steps?"),
        ("output_dir=runs/x", "did you mean run.out?"),
        ("temperature=1", "did you mean evaluation.temperature or rollout.temperature?"),
        ("run.learning-rate=1", "did you mean optim.learning_rate?"),
        ("Run.Steps=3", "did you mean run.steps?"),
        ("run.zzz=3", "unknown key run.zzz (known: run.checkpoint_every, run."),
        ("zzz=3", "unknown key zzz (known: algorithm, evaluation, optim, "),
        ("algorithm.name=GRPO", "unknown algorithm.name 'GRPO': did you mean 'grpo'?"),
        ("algorithm.advantages=RLOO", "unknown algorithm.advantages 'RLOO': did you mean 'rloo'?"),
        ("policy.precision=Mixed", "unknown policy.precision 'Mixed': did you mean 'mixed'?"),
        ("run.steps=010", "run.steps=010 is not a YAML value: 010 is an octal number to YAML 1.1: write what is meant"),
        ("run.steps=1_000", "1_000 is a number to YAML 1.1"),
        ("run.steps=1:30", "1:30 is a number to YAML 1.1"),
        ("run.steps=0b11", "0b11 is a number to YAML 1.1"),
        ("run.log_completions=yes", "yes is true or false to YAML 1.1"),
        ("task.parameters={day: 2026-01-02}", "2026-01-02 is a date to YAML 1.1"),
        ("task.parameters={a: 1, b: 2, a: 3}", "a stands twice"),
        ("optim.learning_rate=inf", "optim.learning_rate must be a number, got 'inf'"),
        ("optim.learning_rate=.inf", "optim.learning_rate must be a finite number, got inf"),
        ("optim.learning_rate=1e-50", "optim.learning_rate must be a number of 32 bits"),
        ("optim.betas=[0.9, .nan]", "optim.betas[1] must be a finite number, got nan"),
        ("run.steps=", "run.steps must be an integer, got nothing"),
        ("run.steps=3000000000", "run.steps must be below 2**31"),
        ("run.out=", "run.out must not be empty"),
        (r"task.instruction=Think.\nAnswer:", r"task.instruction: \n is two characters here, a backslash and an n"),
        ('task.instruction="a" or "b"', "is not one text in quotes"),
        (r"policy.assistant_prefix=<think>\n", r"policy.assistant_prefix: \n is two characters here"),
        (r"rollout.stop=[\n]", r"rollout.stop: \n is two characters here"),
        ("run.out= x", "run.out begins or ends with a space: ' x'"),
        ("task.parameters={1: 2}", "task.parameters must have names as keys, got 1"),
        ("policy.chat_template_arguments={a: [.nan]}", "policy.chat_template_arguments.a[0] must be a finite number"),
        ("policy.system_prompt=None", "policy.system_prompt=None: write null for none"),
        ("task.instruction=caf\udce9", "task.instruction must be text in UTF-8"),
    ],
)
def test_what_people_type_is_answered_with_what_is_meant(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(None, [override])


def test_every_meaning_is_that_of_a_setting_and_no_word_has_two():
    assert set(MEANINGS) <= set(settings_of(Config))
    words = [word for words in MEANINGS.values() for word in words.split()]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (" Think.", " Think."),
        ("  = é #", "  = é #"),
        (r'"Think.\nAnswer:"', "Think.\nAnswer:"),
        (r"'\neq'", r"\neq"),
        ("'it''s'", "it's"),
        ("[INST] 010 yes: {", "[INST] 010 yes: {"),
        ("", ""),
        ("null", "null"),
        ("1e5", "1e5"),
        ("010", "010"),
    ],
)
def test_text_on_the_command_line_is_taken_to_the_letter_unless_it_is_in_quotes(text, meant, tmp_path):
    config = load(None, [f"task.instruction={text}"])
    assert config.task.instruction == meant
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "config.yaml") == config


def test_null_is_no_system_prompt():
    assert load(None, ["policy.system_prompt=null"]).policy.system_prompt is None
    assert load(None, ["policy.system_prompt='null'"]).policy.system_prompt == "null"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [", "is not valid YAML"),
        ("- 1\n- 2", "must hold sections of keys, got list"),
        ("run: 3", "run must be a section of keys, got 3"),
        ("algorithm: ace-grpo", r"algorithm must be a section of keys.*write algorithm\.name=NAME"),
        ("run:\n  steps: 3\n  out: a\n  steps: 4", r"config\.yaml is not valid YAML: line 4: steps stands twice"),
        ("run:\n  steps: 3\nrun:\n  out: a", r"config\.yaml is not valid YAML: line 3: run stands twice"),
        ("run:\n  steps: 010", r"line 2: 010 is an octal number to YAML 1\.1"),
        ("run:\n  log_completions: on", r"line 2: on is true or false to YAML 1\.1"),
        ("run:\n\tsteps: 3", r"is not valid YAML: line 2: found character '\\t' that cannot start any token"),
        ("run:\n  steps: \x07", r"is not valid YAML: .*special characters are not allowed"),
        ("task:\n  instruction: Think.\\nAnswer", r"line 2: \\n is two characters here"),
        ("task:\n  name: 1.10", r"task\.name must be text \(a number in quotes\), got 1\.1 \(float\)"),
        ("learning_rate: 1", r"unknown key learning_rate: did you mean optim\.learning_rate\?"),
        ("optimizer:\n  lr: 1", r"unknown key optimizer: did you mean optim\?"),
        ("run: {3: 4}", r"unknown key run\.3"),
        ("run: {[a]: 4}", "is not valid YAML: found unhashable key"),
        ("[" * 9999, "is not valid YAML: "),
        ("run:\n  stepz: 3", r"unknown key run\.stepz: did you mean run\.steps\?"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# café\nrun: {}".encode("latin-1"), r"config\.yaml is not UTF-8: byte 0xe9 in line 1"),
        (b"run:\n  out: caf\xe9", r"config\.yaml is not UTF-8: byte 0xe9 in line 2"),
        ("run: {}".encode("utf-16"), r"config\.yaml is not UTF-8: byte 0xff in line 1"),
    ],
)
def test_a_file_in_another_encoding_is_named_with_the_line(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_utf8_is_read_in_every_locale_with_a_mark_or_without(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    for content in ("task: {instruction: é}".encode(), "task: {instruction: é}".encode("utf-8-sig")):
        (tmp_path / "config.yaml").write_bytes(content)
        assert load(tmp_path / "config.yaml").task.instruction == "é"


def test_a_wrong_preset_in_a_file_gives_way_to_one_on_the_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("algorithm: {name: [a]}")
    assert load(path, ["algorithm.name=grpo"]).algorithm == load(None, ["algorithm.name=grpo"]).algorithm


def test_an_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# nothing\nrun:\n")
    assert load(path).run == Config().run


def test_a_file_that_does_not_exist_is_named_with_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"no configuration 'nowhere\.yaml'.*demo-tiny"):
        load("nowhere.yaml")


def test_another_algorithm_on_a_resolved_configuration_brings_its_own_settings(tmp_path):
    resolved = tmp_path / "config.yaml"
    resolved.write_text(load(None, ["algorithm.name=ace-dapo", "algorithm.epsilon_low=0.1"]).to_yaml())
    changed = load(resolved, ["algorithm.name=grpo"]).algorithm
    assert changed == load(None, ["algorithm.name=grpo", "algorithm.epsilon_low=0.1"]).algorithm


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm.advantages=nsr", "task.reward=score"],
            r"advantages=nsr needs rewards of 0 and 1, and task\.reward=score",
        ),
        (
            ["algorithm.advantages=bnpo", "algorithm.overlong_fraction=0.2"],
            "and algorithm.overlong_fraction > 0 gives others",
        ),
        (
            ["algorithm.name=sapo", "algorithm.epsilon_high=0.3"],
            r"algorithm\.epsilon_high=0\.3 belongs to surrogate='ppo_clip'",
        ),
        (["algorithm.name=gmpo", "algorithm.importance_sampling_level=sequence"], "does not go with surrogate gmpo"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(None, overrides)


def test_a_surrogate_of_ones_own_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "def loss(logps, rows, power=1):\n    return -rows.advantages * logps * power\nloss.whole_batch = True\n"
    )
    logps, rows = torch.tensor([-1.0]), SimpleNamespace(advantages=torch.tensor([2.0]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for where in ("my_losses:loss", "my_losses.py:loss", f"{tmp_path}/my_losses.py:loss"):
        algorithm = load(None, [f"algorithm.surrogate={where}", "algorithm.surrogate_parameters={power: 3}"]).algorithm
        assert algorithm.policy()["surrogate"](logps, rows).tolist() == [6.0]
        assert algorithm.policy()["surrogate"].whole_batch


def test_a_published_surrogate_takes_its_numbers():
    overrides = ["algorithm.name=dispo", "algorithm.surrogate_parameters={positive: [0.1, 5], negative: [0.5, 50]}"]
    assert load(None, overrides).algorithm.policy()["surrogate"] == surrogates.dispo((0.1, 5), (0.5, 50))


def test_a_surrogate_of_ones_own_is_loaded_once(tmp_path, capsys):
    path = tmp_path / "loud.py"
    path.write_text("print('loaded')\ndef loss(logps, rows):\n    return -rows.advantages * logps\n")
    algorithm = load(None, [f"algorithm.surrogate={path}:loss"]).algorithm
    assert algorithm.policy()["surrogate"] is algorithm.policy()["surrogate"]
    assert capsys.readouterr().out == "loaded\n"


@pytest.mark.parametrize("name", ["ace-dapo", "gspo", "luspo"])
def test_the_clip_of_a_preset_gives_way_to_another_surrogate(name):
    algorithm = load(None, [f"algorithm.name={name}", "algorithm.surrogate=cispo"]).algorithm
    assert (algorithm.epsilon_low, algorithm.epsilon_high, algorithm.importance_sampling_level) == (0.2, None, "token")
    assert algorithm.loss_type == PRESETS[name].get("loss_type", "grpo")
    with pytest.raises(ConfigError, match=r"epsilon_high=0\.3 belongs to surrogate='ppo_clip'"):
        load(None, [f"algorithm.name={name}", "algorithm.surrogate=cispo", "algorithm.epsilon_high=0.3"])


def test_what_a_file_cannot_give_is_said_before_anything_is_loaded(tmp_path):
    (tmp_path / "broken.py").write_text("def loss(:\n")
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*invalid syntax"):
        load(None, [f"algorithm.surrogate={tmp_path}/broken.py:loss"])
    (tmp_path / "fine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Numbers:\n"
        "    width: float = 1.0\n\ndef loss(logps, rows, width):\n    return -rows.advantages * logps\n"
    )
    where = f"algorithm.surrogate={tmp_path}/fine.py:loss"
    assert load(None, [where, "algorithm.surrogate_parameters={width: 2}"]).algorithm.policy()
    with pytest.raises(ConfigError, match="missing a required argument: 'width'"):
        load(None, [where])


def test_a_presets_clip_gives_way_to_numbers_of_its_surrogate():
    overrides = ["algorithm.name=gspo", "algorithm.surrogate_parameters={epsilon_low: 0.1}"]
    algorithm = load(None, overrides).algorithm
    assert algorithm.policy()["surrogate"] == surrogates.ppo_clip(0.1)
    assert algorithm.importance_sampling_level == "sequence"


def test_a_surrogate_that_fails_is_said_before_a_model_is_loaded(tmp_path):
    path = tmp_path / "mean.py"
    path.write_text("def loss(logps, rows):\n    return logps.mean()\n")
    algorithm = load(None, [f"algorithm.surrogate={path}:loss"]).algorithm
    with pytest.raises(
        ConfigError, match=r"mean\.py:loss failed on four tokens: .*one loss per token, \(n,\) = \(4,\), got \(\)"
    ):
        algorithm.probe()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_the_probe_and_is_called_by_its_name(name):
    algorithm = load(None, [f"algorithm.name={name}"]).algorithm
    algorithm.probe()
    assert algorithm.title() == name


def test_every_hyper_parameter_of_the_loss_is_a_key_with_its_default():
    elsewhere = {
        "temperature",
        "softcap",
        "logit_scale",
        "max_completion_length",
        "schedule",
        "workspace_bytes",
        "backend",
    }
    parameters = inspect.signature(ACELoss).parameters.values()
    wanted = {p.name: p.default for p in parameters if p.name not in elsewhere}
    algorithm = AlgorithmConfig()
    own = {"alpha": 0.0, "sampling_correction": "auto"}
    assert {key: getattr(algorithm, key) for key in wanted} == {**wanted, **own}


def test_the_objective_is_built_once_with_the_length_of_the_rollouts():
    config = load(None, ["algorithm.name=ace-dr_grpo", "rollout.max_new_tokens=7", "algorithm.beta=0.5"])
    objective = config.objective
    assert objective is config.objective
    assert (objective.max_completion_length, objective.kl.beta, objective.ace.alpha) == (7, 0.5, 1.0)


def test_another_surrogate_is_in_the_title():
    assert (
        load(None, ["algorithm.name=ace-grpo", "algorithm.surrogate=sapo"]).algorithm.title()
        == "ace-grpo with surrogate sapo"
    )
