"""Conversations as messages, and the files that hold them."""

from __future__ import annotations

import json

from transnormer.data.chat import conversations

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def say(*turns):
    """Messages from "role: content"."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


CHAT = say(
    "system: Be brief.",
    "user: Hello!",
    "assistant: Good day.",
    "user: And?",
    "assistant: Farewell.",
)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path, format="messages"):
    return [document.content for document in conversations([path], format)]
