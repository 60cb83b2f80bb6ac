"""Chats: messages in the forms that people have them in, and through a model's chat template."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_finetune.base.errors import first_line

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, Any]

# --- Reading ------------------------------------------------------------------------------------

# Who speaks in ShareGPT's form, as roles; some exports have the roles themselves.
SHAREGPT_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"
}  # fmt: skip


def read_messages(row: dict[str, Any]) -> list[Message]:
    """The messages of a row that has "messages" or "conversations", as templates take them.

    Each is {"role", "content"} or ShareGPT's {"from", "value"}. The result has strings as contents,
    objects as arguments of tool calls, and no null. ValueError says what is wrong where.
    """
    key = "conversations" if row.get("messages") is None else "messages"
    found = row[key]
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


def read_tools(tools: object) -> list[dict] | None:
    """The tools of a row, a list or a string of JSON; None where there are none."""
    if isinstance(tools, str) and tools.strip():
        tools = parse(tools, 'its "tools"')
    if tools and not is_objects(tools):
        raise ValueError('its "tools" are not a list of objects')
    return tools or None


def is_objects(value: object) -> bool:
    """Whether a JSON value is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def parse(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what}: a string that is not JSON") from None


# --- Through the template -----------------------------------------------------------------------


@dataclass
class Template:
    """A model's chat template."""

    tokenizer: TokenizerWrapper

    def render(self, messages: list[Message], tools: list[dict] | None, **options: bool) -> str:
        """The text of messages; raises ValueError where the template does not take them."""
        apply = self.tokenizer.apply_chat_template
        try:
            return apply(messages, tools=tools, tokenize=False, **options)
        except Exception as error:  # a template may raise anything
            why = first_line(error)
            raise ValueError(f"the model's chat template does not take it: {why}") from None

    def try_render(self, messages: list[Message], tools: list[dict] | None, **options: bool) -> str:
        """As `render`, but "" where the template does not take the messages."""
        try:
            return self.render(messages, tools, **options)
        except ValueError:
            return ""

    def leaves_out(self, messages: list[Message], tools: list[dict] | None, text: str) -> bool:
        """Whether the text made of messages lacks a field of one, some of a field, or a tool.

        ValueError where it is the same without a message, as with a role that nobody knows.
        """
        shown, end, cut = squeeze(text), 0, False
        for number, message in enumerate(messages):
            fields = strings_of(message)
            found = {field: shown.find(field, end) for field in fields}
            end = max([end, *(at + len(field) for field, at in found.items() if at >= 0)])
            if -1 in found.values():
                blank = {"role": message["role"], "content": ""}
                others = [*messages[:number], blank, *messages[number + 1 :]]
                if self.try_render(others, tools) == text:
                    raise ValueError(
                        f"the model's chat template puts message {number + 1}, of the role "
                        f'"{message["role"]:.40}", nowhere in its text'
                    )
                cut |= any(field not in shown for field in fields)
        names = map(function_name, tools or [])
        return cut or any(isinstance(name, str) and squeeze(name) not in shown for name in names)

    def find_answers(
        self, messages: list[Message], tools: list[dict] | None, text: str
    ) -> tuple[list[tuple[int, int]], bool]:
        """Start and end of each answer, in characters, in a text that ends with one.

        The second result is whether these are all: where the whole does not begin with the text of
        its first messages, only the last answer is located.
        """
        spans, all_found = [], True
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                is_last = i + 1 == len(messages)
                through = text if is_last else self.try_render(messages[: i + 1], tools)
                start, end = self.find_start(messages[:i], tools, text), len(through)
                all_found &= text.startswith(through) and start < end
                spans.append((start, end))
        return (spans if all_found else spans[-1:]), all_found

    def find_start(self, before: list[Message], tools: list[dict] | None, text: str) -> int:
        """Where in a text the answer to the messages before it starts.

        After the generation prompt or, if it lacks that, where other answers make other texts.
        """
        opened = self.try_render(before, tools, add_generation_prompt=True)
        if opened and text.startswith(opened):
            return len(opened)
        others = [[*before, {"role": "assistant", "content": other}] for other in "ab"]
        rendered = [self.try_render(messages, tools) or text for messages in others]
        return len(os.path.commonprefix([text, *rendered]))


def strings_of(message: Message) -> list[str]:
    """What the text should show of a message, squeezed: content, reasoning, names of functions."""
    fields = ("reasoning_content", "reasoning", "thinking", "content")
    strings = [message.get(field) for field in fields]
    strings += map(function_name, message.get("tool_calls", []))
    return [squeeze(string) for string in strings if isinstance(string, str)]


def function_name(tool: dict[str, Any]) -> object:
    """The name in a tool or a tool call."""
    return (tool["function"] if isinstance(tool.get("function"), dict) else tool).get("name")


def squeeze(text: str) -> str:
    """A text without white space, which templates trim, and escapes, since some put it as JSON."""
    for escape in ("\\n", "\\r", "\\t", "\\"):
        text = text.replace(escape, "")
    return "".join(text.split())
