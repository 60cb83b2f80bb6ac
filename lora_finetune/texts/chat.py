"""Chats: messages in the forms that people have them in, and through a model's chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_finetune.base.errors import first_line

from transformers.utils import chat_template_utils

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, Any]

# --- Reading ------------------------------------------------------------------------------------

# Who speaks in ShareGPT's form, as roles; some exports have the roles themselves.
SHAREGPT_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"
}  # fmt: skip

# Keys of messages that say whether one is learnt: OpenAI's, axolotl's and another; 0 and false say
# that it is not, 1 and true that it is.
MARKS = ("weight", "train", "loss")
REASONING = ("reasoning_content", "reasoning", "thinking")


def read_messages(row: dict[str, Any]) -> list[Message]:
    """The messages of a row, as templates take them.

    They are in "messages", in "conversations", or in "prompt" and "completion"; each is {"role",
    "content"} or ShareGPT's {"from", "value"}. The result has strings as contents, objects as
    arguments of tool calls, and no null. ValueError says what is wrong where.
    """
    key = next((key for key in ("messages", "conversations") if row.get(key) is not None), "prompt")
    found = row[key]
    if key == "prompt" and isinstance(found, list) and isinstance(row["completion"], list):
        found = found + row["completion"]
    if not found or not is_objects(found):
        raise ValueError(f'its "{key}" are not a list of messages')
    messages = []
    for number, message in enumerate(found, 1):
        try:
            messages.append(read_message(message))
        except ValueError as error:
            raise ValueError(f"message {number} of its {key}: {error}") from None
    system = row.get("system")  # beside the conversations in some exports
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def read_message(found: dict[str, Any]) -> Message:
    message = {key: value for key, value in found.items() if value is not None}
    if message.get("from") == "function_call":  # LLaMA-Factory's: a call, or a list of them
        calls = parse(str(message.pop("value", "")), "its function_call")
        calls = calls if isinstance(calls, list) else [calls]
        message |= {"from": "gpt", "tool_calls": [{"function": call} for call in calls]}
    if "role" not in message and isinstance(speaker := message.pop("from", None), str):
        if speaker not in SHAREGPT_ROLES:
            raise ValueError(f'is from "{speaker:.40}", none of {", ".join(SHAREGPT_ROLES)}')
        message["role"] = SHAREGPT_ROLES[speaker]
        if "value" in message:
            message.setdefault("content", message.pop("value"))
    if not isinstance(message.get("role"), str):
        raise ValueError("has no role")
    if message["role"] == "function":  # OpenAI's earlier name
        message["role"] = "tool"
    for mark in MARKS:
        if message.get(mark, 1) not in (0, 1):
            raise ValueError(f'its "{mark}" is {message[mark]!r:.50}, not 0 or 1, false or true')
    if call := message.pop("function_call", None):  # OpenAI's earlier form of a single call
        message.setdefault("tool_calls", [{"type": "function", "function": call}])
    if calls := message.pop("tool_calls", None):
        if not is_objects(calls):
            raise ValueError("its tool_calls are not a list of objects")
        message["tool_calls"] = [read_tool_call(call) for call in calls]
        message.setdefault("content", "")
    message["content"] = read_content(message.get("content"))
    return message


def read_content(content: object) -> str:
    """The content of a message, a string or a list of objects with text."""
    if isinstance(content, str):
        return content
    if content is None:
        raise ValueError("has no content")
    if not is_objects(content):
        raise ValueError(f"its content is not a string, but {content!r:.50}")
    for item in content:
        if item.get("type") != "text" or not isinstance(item.get("text"), str):
            raise ValueError(f"its content has something other than text: {item!r:.50}")
    return "".join(item["text"] for item in content)


def read_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with an object of arguments, which OpenAI has as a string of JSON."""
    if "function" in call:
        if not isinstance(call["function"], dict):
            raise ValueError("the function of a tool call is not an object")
        return call | {"function": read_tool_call(call["function"])}
    arguments = call.get("arguments") or "{}"
    if isinstance(arguments, str):
        arguments = parse(arguments.strip() or "{}", "the arguments of a tool call")
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a tool call are not an object")
    return call | {"arguments": arguments}


def read_tools(row: dict[str, Any]) -> list[dict] | None:
    """The tools of a row, a list or a string of JSON, as OpenAI has them; None without any.

    OpenAI's earlier "functions" and LLaMA-Factory's tools are the functions themselves.
    """
    key = "functions" if row.get("tools") is None else "tools"
    tools = row.get(key)
    if isinstance(tools, str):
        tools = parse(tools.strip() or "null", f'its "{key}"')
    if not tools:
        return None
    if not is_objects(tools):
        raise ValueError(f'its "{key}" are not a list of objects')
    are_whole = ["function" in tool or "type" in tool for tool in tools]
    return [
        tool if is_whole else {"type": "function", "function": tool}
        for tool, is_whole in zip(tools, are_whole, strict=True)
    ]


def read_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a row has for the chat template, an object or a string of JSON."""
    found = row.get("chat_template_kwargs") or {}
    found = parse(found, 'its "chat_template_kwargs"') if isinstance(found, str) else found
    if not isinstance(found, dict):
        raise ValueError('its "chat_template_kwargs" are not an object')
    return found


def is_learnt(message: Message) -> bool:
    return all(message.get(mark, 1) for mark in MARKS)


def is_objects(value: object) -> bool:
    """Whether a JSON value is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def parse(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what}: a string that is not JSON") from None


# --- Through the template -----------------------------------------------------------------------

Span = tuple[int, int]  # start and end, in characters


class Chat(NamedTuple):
    """The messages of a row, and what else it has for the template."""

    messages: list[Message]
    tools: list[dict] | None = None
    arguments: dict[str, Any] = {}  # of the template, such as enable_thinking

    def until(self, end: int) -> Chat:
        return self._replace(messages=self.messages[:end])

    def saying(self, number: int, content: str) -> Chat:
        """The chat with another content, and nothing else, in one of its messages."""
        other = {"role": self.messages[number]["role"], "content": content}
        return self._replace(
            messages=[*self.messages[:number], other, *self.messages[number + 1 :]]
        )


@dataclass
class Template:
    """A model's chat template.

    Nothing is added to what rows and user give it: mlx-lm's wrapper sets enable_thinking, by the
    vocabulary (tokenizer_utils.py:395 of 0.32.2).
    """

    tokenizer: TokenizerWrapper
    arguments: dict[str, Any] = field(default_factory=dict)  # where a row has none of its own
    now: datetime | None = None  # the time that it may put into texts; None: the present
    takes_json: bool = False  # whether the arguments of tool calls are JSON text for it

    @property
    def has_date(self) -> bool:
        return "strftime_now" in str(self.tokenizer.chat_template)

    def render(self, chat: Chat, **options: bool) -> str:
        """The text of a chat; raises ValueError where the template does not take it.

        Some templates take the arguments of a tool call as an object, and some as JSON text, which
        they join to a string. They refuse the other form, or show an object in Python's words.
        """
        refused = None
        calls = [call for m in chat.messages for call in m.get("tool_calls", [])]
        objects = [
            str(arguments) for call in calls if (arguments := function_of(call)["arguments"])
        ]
        for takes_json in (self.takes_json, not self.takes_json)[: 2 if calls else 1]:
            try:
                text = self.apply(chat, takes_json, options)
            except Exception as error:  # a template may raise anything
                refused = refused or first_line(error)
                continue
            if takes_json or not any(shown in text for shown in objects):
                self.takes_json = takes_json
                return text
        raise ValueError(f"the model's chat template does not take it: {refused}")

    def apply(self, chat: Chat, takes_json: bool, options: dict[str, bool]) -> str:
        messages = [for_template(message, takes_json) for message in chat.messages]
        options = self.arguments | chat.arguments | options
        if in_python := self.tokenizer._chat_template:  # one of mlx-lm's own
            return in_python(messages, tools=chat.tools, **options)
        apply = self.tokenizer._tokenizer.apply_chat_template
        with time_is(self.now):
            return apply(messages, tools=chat.tools, tokenize=False, **options)

    def try_render(self, chat: Chat, **options: bool) -> str:
        """As `render`, but "" where the template does not take the messages."""
        try:
            return self.render(chat, **options)
        except ValueError:
            return ""

    def left_out(self, chat: Chat, text: str) -> list[str]:
        """The fields of messages and the tools that a chat's text lacks, whole or some of them.

        ValueError where it is the same without a message, as with a role that nobody knows.
        """
        shown, end, left_out = squeeze(text), 0, []
        for number, message in enumerate(chat.messages):
            fields = strings_of(message)
            found = {name: shown.find(field, end) for name, field in fields.items()}
            end = max([end, *(at + len(fields[name]) for name, at in found.items() if at >= 0)])
            if -1 in found.values():
                if self.try_render(chat.saying(number, "")) == text:
                    raise ValueError(
                        f"the model's chat template puts message {number + 1}, of the role "
                        f'"{message["role"]:.40}", nowhere in its text'
                    )
                cut = [name for name, field in fields.items() if field not in shown]
                left_out += [f"the {name} of message {number + 1}" for name in cut]
        names = [str(function_of(tool).get("name")) for tool in chat.tools or []]
        return left_out + [f"the tool {name}" for name in names if squeeze(name) not in shown]

    # --- Where a message is in the text

    def find(self, chat: Chat, text: str, number: int) -> Span | None:
        """Where a message is in the text of its chat, with what closes it; None if that is unsure.

        An answer starts after the generation prompt, and ends where the text of the messages up to
        it does. Templates that change earlier messages when more follow have no such places: then
        they are where the text changes when the message says something else, and what closes the
        message is what the two texts have in common behind it.
        """
        before, through = chat.until(number), chat.until(number + 1)
        opened, prompt = self.opened(before) if number else ("", "")
        closed = text
        if len(chat.messages) > number + 1:
            closed = self.try_render(through, add_generation_prompt=True) if prompt else ""
            if not closed.endswith(prompt or "\0"):
                closed, prompt = self.try_render(through), ""
            closed = closed[: len(closed) - len(prompt)]
        is_answer = chat.messages[number]["role"] == "assistant"
        starts = is_answer and opened and text.startswith(opened)
        ends = closed and text.startswith(closed)
        if starts and ends:
            span = len(opened), len(closed)
        elif found := self.changing(chat, text, number):
            alone = self.changing(through, closed, number) if closed and not ends else None
            closing = commonprefix(text[found[1] :], closed[alone[1] :]) if alone else 0
            span = len(opened) if starts else found[0], found[1] + closing
            span = span if not ends else (span[0], len(closed))
        else:
            return None
        return span if span[0] < span[1] else None

    def opened(self, chat: Chat) -> tuple[str, str]:
        """The text of a chat with the generation prompt, and that alone, "" where it is unsure.

        Some templates end a text without a generation prompt in the end-of-text token.
        """
        opened, before = self.try_render(chat, add_generation_prompt=True), self.try_render(chat)
        for end in ("", self.tokenizer.eos_token or ""):
            start = before.removesuffix(end)
            if start and opened.startswith(start):
                return opened, opened[len(start) :]
        return opened, ""

    def changing(self, chat: Chat, text: str, number: int) -> Span | None:
        """Where the text of a chat changes when a message says something else, if it may."""
        start = same_end = len(text)
        for other in "ab":
            changed = self.try_render(chat.saying(number, other))
            if not changed:
                return None
            if changed != text:
                same = commonprefix(text, changed)
                start = min(start, same)
                same_end = min(same_end, commonprefix(text[same:][::-1], changed[same:][::-1]))
        return start, len(text) - same_end


def template_of(tokenizer: TokenizerWrapper, arguments: str | None = None) -> Template | None:
    """A model's chat template with arguments, a JSON object; None where the model has none."""
    return (
        Template(tokenizer, json.loads(arguments or "{}")) if tokenizer.has_chat_template else None
    )


@contextmanager
def time_is(now: datetime | None) -> Iterator[None]:
    """While it lasts, the present is another time for the `strftime_now` of templates."""
    present = chat_template_utils.datetime
    if now:
        chat_template_utils.datetime = SimpleNamespace(now=lambda: now)
    try:
        yield
    finally:
        chat_template_utils.datetime = present


def for_template(message: Message, takes_json: bool) -> Message:
    """A message without the marks that are not for templates."""
    found = {key: value for key, value in message.items() if key not in MARKS}
    if takes_json and "tool_calls" in found:
        found["tool_calls"] = [with_json(call) for call in found["tool_calls"]]
    return found


def with_json(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": with_json(call["function"])}
    return call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)}


def commonprefix(one: str, other: str) -> int:
    """The number of characters that two texts have in common at their start."""
    return len(os.path.commonprefix([one, other]))


def strings_of(message: Message) -> dict[str, str]:
    """What the text should show of a message, squeezed: content, reasoning, names of functions."""
    fields = {name: message.get(name) for name in (*REASONING, "content")}
    for number, call in enumerate(message.get("tool_calls", []), 1):
        fields[f"tool call {number}"] = function_of(call).get("name")
    return {name: squeeze(field) for name, field in fields.items() if isinstance(field, str)}


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """The function in a tool or a tool call; in some forms it is that itself."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


def squeeze(text: str) -> str:
    """A text without white space, which templates trim, and escapes, since some put it as JSON."""
    for escape in ("\\n", "\\r", "\\t", "\\"):
        text = text.replace(escape, "")
    return "".join(text.split())
