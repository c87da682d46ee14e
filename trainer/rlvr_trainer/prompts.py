"""From a problem's prompt to the text that a model reads."""

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from rlvr_trainer.config import PolicyConfig
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.tasks import Prompt, plain_text

PROBE = "1 + 1"


@dataclass(frozen=True)
class PromptFormat:
    """How prompts are rendered: by the tokenizer's chat template, or as plain text if it has none.

    `system_prompt` takes the place of a prompt's own system message. `assistant_prefix` is behind everything, where the
    completion goes on.
    """

    system_prompt: str | None = None
    assistant_prefix: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: PolicyConfig) -> "PromptFormat":
        """The format that the settings ask for."""
        return cls(config.system_prompt, config.assistant_prefix, dict(config.chat_template_arguments))

    def text(self, tokenizer: Any, prompt: Prompt) -> str:
        """A prompt as the model wants to see it.

        Raises:
            ConfigError: the template refuses the prompt.
        """
        messages = self.messages(prompt)
        if tokenizer.chat_template is None:
            return self.plain(prompt)
        text = self._rendered(tokenizer, messages)
        role, content = messages[0]
        if role == "system" and content.strip() not in text:
            raise ConfigError("this template has no system role: it leaves the system message out")
        return text + self.assistant_prefix

    def plain(self, prompt: Prompt) -> str:
        """A prompt for a model without a chat template: messages under one another without their roles."""
        return plain_text(self.messages(prompt)) + self.assistant_prefix

    def messages(self, prompt: Prompt) -> tuple[tuple[str, str], ...]:
        """A prompt as (role, content), the system message that counts in front."""
        given = (("user", prompt),) if isinstance(prompt, str) else prompt
        if self.system_prompt is None:
            return given
        return (("system", self.system_prompt), *(message for message in given if message[0] != "system"))

    def check(self, tokenizer: Any) -> None:
        """Refuse settings that the tokenizer's template cannot use or does not read.

        Raises:
            ConfigError: the setting by name.
        """
        if tokenizer.chat_template is None:
            if self.arguments:
                raise ConfigError("policy.chat_template_arguments are set, and this tokenizer has no chat template")
            return
        template = tokenizer.get_chat_template()
        taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents", "kwargs"}
        for name in self.arguments:
            if name in taken | {"messages"}:
                raise ConfigError(f"policy.chat_template_arguments.{name} is not for the template: it is set elsewhere")
            if not re.search(rf"\b{re.escape(name)}\b", template):  # what it does not mention it cannot read
                raise ConfigError(f"policy.chat_template_arguments.{name} changes nothing in this template")
        try:
            self.text(tokenizer, PROBE)
        except ConfigError as error:
            if self.system_prompt is None:
                raise
            raise ConfigError(
                f"this template has no system role: policy.system_prompt cannot be used ({error})"
            ) from error

    def _rendered(self, tokenizer: Any, messages: tuple[tuple[str, str], ...]) -> str:
        """Through the template, whose own refusals are exceptions of Jinja, and whose faults are of any kind."""
        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **self.arguments
            )
        except Exception as error:
            raise ConfigError(f"the chat template refuses a prompt: {error}") from error
        return text


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of every rendered prompt; a chat template has written the special tokens already."""
    special = tokenizer.chat_template is None
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special).input_ids if texts else []
    return ids
