"""Conversations to fine-tune on: what each speaker says between the marks of a published template; answers count.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}      a record

    chatml     <|im_start|>user\n 2 + 2? <|im_end|>\n <|im_start|>assistant\n 4 <|im_end|> \n            Qwen
    llama3     <|begin_of_text|> <|start_header_id|>user<|end_header_id|>\n\n 2 + 2? <|eot_id|> ...      Llama 3
    deepseek   <|begin_of_sentence|> <|User|> 2 + 2? <|Assistant|> 4 <|end_of_sentence|>                  V3, R1

A label counts where it is part of what the assistant says, its closing mark included. Standard library only.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from training.data.config import Chat

ROLES = ("system", "user", "assistant", "tool")
ANSWER = "assistant"
Message = tuple[str, str]  # role, content


class Part(NamedTuple):
    """A stretch of a conversation. ``mark``: one that a tokenizer may have tokens of its own for."""

    text: str
    mark: bool
    counted: bool


@dataclass(frozen=True, slots=True)
class Template:
    """What stands before all, and before and behind what each role says. ``end``: behind that, not counted."""

    begin: str
    before: dict[str, str]
    behind: dict[str, str]
    end: str = ""


TEMPLATES = {
    Chat.chatml: Template(
        "", {role: f"<|im_start|>{role}\n" for role in ROLES}, dict.fromkeys(ROLES, "<|im_end|>"), end="\n"
    ),
    Chat.llama3: Template(
        "<|begin_of_text|>",
        {role: f"<|start_header_id|>{'ipython' if role == 'tool' else role}<|end_header_id|>\n\n" for role in ROLES},
        dict.fromkeys(ROLES, "<|eot_id|>"),
    ),
    Chat.deepseek: Template(
        "<｜begin▁of▁sentence｜>",
        {"system": "", "user": "<｜User｜>", "assistant": "<｜Assistant｜>"},
        {"system": "", "user": "", "assistant": "<｜end▁of▁sentence｜>"},
    ),
}


def take_messages(chat: Chat, value: Any) -> tuple[list[Message]] | str:
    """The messages of a record, or why they are none, or none that can be written as ``chat`` says."""
    roles = TEMPLATES[chat].before
    if not isinstance(value, list) or not value:
        return "is no list of messages"
    found = []
    for number, message in enumerate(value):
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in roles or not isinstance(content, str):
            return f"has no role and content in message {number}: a role is one of {', '.join(roles)}, content is text"
        try:
            content.encode()
        except UnicodeEncodeError:
            return f"has half a surrogate pair in message {number}"
        found.append((role, content))
    if not any(role == ANSWER for role, _ in found):
        return "has nothing that the assistant says"
    return (found,)


def render(messages: list[Message], chat: Chat) -> list[Part]:
    """A conversation in parts."""
    template = TEMPLATES[chat]
    parts = [Part(template.begin, True, False)]
    for role, content in messages:
        counted = role == ANSWER
        parts += [Part(template.before[role], True, False), Part(content, False, counted)]
        parts += [Part(template.behind[role], True, counted), Part(template.end, True, False)]
    return [part for part in parts if part.text]
