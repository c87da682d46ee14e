"""Prompts as a model reads them, and settings that a chat template cannot use: refused by name before anything is sampled."""

import pytest
from rlvr_trainer import tiny
from rlvr_trainer.config import PolicyConfig
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.policies import load_policy
from rlvr_trainer.prompts import PromptFormat

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
THINKING = PLAIN + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
SILENT = "{% for m in messages if m.role == 'user' %}[user]{{ m.content }}{% endfor %}[assistant]"
TALK = (("system", "Own."), ("user", "1+1"), ("assistant", "2"), ("user", "2+2"))


@pytest.fixture
def tokenizer():
    """Make a tokenizer with a chat template, or none."""

    def make(template=None):
        made = tiny.make_tokenizer()
        made.chat_template = template
        return made

    return make


def text(tokenizer, prompt="hello", **settings):
    form = PromptFormat.of(PolicyConfig(**settings))
    form.check(tokenizer)
    return form.text(tokenizer, prompt)


def test_messages_go_through_the_template_as_they_are(tokenizer):
    assert text(tokenizer(PLAIN), TALK) == "[system]Own.[user]1+1[assistant]2[user]2+2[assistant]"


def test_the_setting_takes_the_place_of_a_prompts_own_system_message(tokenizer):
    assert text(tokenizer(PLAIN), TALK[:2], system_prompt="Ours.") == "[system]Ours.[user]1+1[assistant]"
    assert text(tokenizer(PLAIN), TALK[:2], system_prompt="") == "[system][user]1+1[assistant]"


def test_without_a_template_messages_are_plain_text_the_system_message_first(tokenizer):
    assert text(tokenizer(), TALK[:2]) == "Own.\n\n1+1"
    assert text(tokenizer(), TALK[:2], system_prompt="Ours.") == "Ours.\n\n1+1"
    assert text(tokenizer(), "1+1", system_prompt="") == "1+1"


def test_the_assistants_prefix_is_behind_everything(tokenizer):
    assert text(tokenizer(PLAIN), assistant_prefix="<think>\n") == "[user]hello[assistant]<think>\n"
    assert text(tokenizer(), assistant_prefix="<think>\n") == "hello<think>\n"


def test_chat_template_arguments_reach_the_template(tokenizer):
    asked = {"chat_template_arguments": {"enable_thinking": False}}
    assert text(tokenizer(THINKING), **asked) == "[user]hello[assistant]<think></think>"
    assert text(tokenizer(THINKING), chat_template_arguments={"enable_thinking": True}) == "[user]hello[assistant]"


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (
            PLAIN,
            {"chat_template_arguments": {"enable_thinking": False}},
            r"policy\.chat_template_arguments\.enable_thinking changes nothing in this template",
        ),
        (
            THINKING,
            {"chat_template_arguments": {"enable_think": False}},
            r"policy\.chat_template_arguments\.enable_think changes nothing in this template",
        ),
        (
            PLAIN,
            {"chat_template_arguments": {"tokenize": True}},
            r"policy\.chat_template_arguments\.tokenize is not for the template: it is set elsewhere",
        ),
        (
            PLAIN,
            {"chat_template_arguments": {"messages": []}},
            r"policy\.chat_template_arguments\.messages is not for the template",
        ),
        (
            None,
            {"chat_template_arguments": {"enable_thinking": False}},
            r"policy\.chat_template_arguments are set, and this tokenizer has no chat template",
        ),
        (
            NO_SYSTEM,
            {"system_prompt": "Be brief."},
            r"no system role: policy\.system_prompt cannot be used \(.*System role not supported\)",
        ),
        (
            SILENT,
            {"system_prompt": "Be brief."},
            r"no system role: policy\.system_prompt cannot be used \(.*leaves the system message out\)",
        ),
        ("{{ raise_exception('never') }}", {}, r"the chat template refuses a prompt: never"),
    ],
)
def test_a_setting_that_the_template_cannot_use_is_refused_by_name(tokenizer, template, settings, message):
    with pytest.raises(ConfigError, match=message):
        text(tokenizer(template), **settings)


def test_a_prompts_own_system_message_is_refused_where_the_template_has_no_such_role(tokenizer):
    for template in (NO_SYSTEM, SILENT):
        assert text(tokenizer(template)).endswith("[assistant]")
        with pytest.raises(ConfigError, match=r"System role not supported|leaves the system message out"):
            text(tokenizer(template), TALK[:2])


@pytest.fixture
def saved(small, digits, tmp_path):
    """A policy in a folder, after a change to it; gives the settings that name the folder."""

    def make(change, *overrides):
        policy = load_policy(small("policy.warm_start_steps=0"), digits())
        change(policy)
        policy.save(tmp_path / "model")
        return small(f"policy.name={tmp_path / 'model'}", *overrides)

    return make


def test_a_template_is_checked_when_the_policy_is_loaded(saved, digits):
    def change(policy):
        policy.tokenizer.chat_template = NO_SYSTEM

    with pytest.raises(ConfigError, match=r"policy\.system_prompt cannot be used"):
        load_policy(saved(change, "policy.system_prompt=Be brief."), digits())


def test_special_tokens_outside_the_embedding_are_refused_when_the_policy_is_loaded(saved, digits):
    def pad(policy):
        policy.tokenizer.add_special_tokens({"pad_token": "<another>"})

    def end(policy):
        policy.generation_defaults.eos_token_id = [2, 5000]  # what the model came with is what is saved

    with pytest.raises(ConfigError, match=r"pad token '<another>' has id 1\d\d, and its embedding only 1\d\d rows"):
        load_policy(saved(pad), digits())
    with pytest.raises(ConfigError, match=r"end token .* has id 5000, and its embedding only 1\d\d rows"):
        load_policy(saved(end), digits())


def test_a_tokenizer_without_pad_and_end_takes_the_models_end_token(saved, digits):
    def change(policy):
        policy.tokenizer.pad_token = policy.tokenizer.eos_token = None

    policy = load_policy(saved(change), digits())
    assert (policy.tokenizer.pad_token_id, policy.eos_ids) == (2, [2])


def test_tiny_is_taught_with_the_prompts_it_is_asked_later(small, digits, monkeypatch):
    taught = []
    own = tiny._supervised
    monkeypatch.setattr(tiny, "_supervised", lambda t, prompts, a: (taught.extend(prompts), own(t, prompts, a))[1])
    config = small("policy.warm_start_steps=1", "policy.system_prompt=Be brief.", "policy.assistant_prefix=' = '")
    policy = load_policy(config, digits())
    assert taught[0] == "Be brief.\n\nproblem 0 = " == policy.texts(["problem 0"])[0]
    with pytest.raises(ConfigError, match="chat_template_arguments are set, and 'tiny' has no chat template"):
        load_policy(small("policy.chat_template_arguments={enable_thinking: false}"), digits())
