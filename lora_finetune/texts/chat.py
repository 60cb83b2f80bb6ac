"""Chats: messages in the forms that people have them in, and through a model's chat template."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lora_finetune.base.errors import first_line

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, Any]

# --- Reading ------------------------------------------------------------------------------------

# Who speaks in ShareGPT's form, as roles; some exports have the roles themselves.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
SHAREGPT_ROLES |= {"observation": "tool"}
SHAREGPT_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}


def read_messages(row: dict[str, Any]) -> list[Message]:
    """The messages of a row that has "messages" or "conversations", as templates take them.

    Each may be of the form {"role", "content"} or ShareGPT's {"from", "value"}. The result has
    strings as contents, objects as arguments of tool calls, and no null.

    Raises:
        ValueError: says what is wrong, and in which message.
    """
    key = "messages" if "messages" in row else "conversations"
    found = row[key]
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise ValueError(f'its "{key}" are not a list of objects')
    if not found:
        raise ValueError(f'its "{key}" is empty')
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
            known = ", ".join(SHAREGPT_ROLES)
            raise ValueError(f'is from "{speaker:.40}", which is none of {known}')
        message["role"] = SHAREGPT_ROLES[speaker]
        if "value" in message:
            message.setdefault("content", message.pop("value"))
    if not isinstance(message.get("role"), str):
        raise ValueError("has no role" if "role" not in message else "its role is not a string")
    if call := message.pop("function_call", None):  # OpenAI's earlier form of a single call
        message.setdefault("tool_calls", [{"type": "function", "function": call}])
    if calls := message.pop("tool_calls", None):
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
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
    if not isinstance(content, list):
        raise ValueError(f"its content is {type_name(content)}, not a string")
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else item
        if not isinstance(item, dict) or kind != "text":
            raise ValueError(f"an item of its content is of the type {kind!s:.40}, not text")
        if not isinstance(item.get("text"), str):
            raise ValueError("an item of its content has no text")
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
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError('its "tools" are not a list of objects')
    return tools or None


def parse(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what}: a string that is not JSON") from None


def type_name(value: object) -> str:
    """The JSON type of a value, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "null")


# --- Through the template -----------------------------------------------------------------------


class Template:
    """A model's chat template."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self.tokenizer = tokenizer

    def render(self, messages: list[Message], tools: list[dict] | None, **options: bool) -> str:
        """The text of messages; raises ValueError where the template does not take them."""
        apply = self.tokenizer.apply_chat_template
        try:
            return apply(messages, tools=tools, tokenize=False, **options)
        except Exception as error:  # a template may raise anything
            why = first_line(error)
            raise ValueError(f"the model's chat template does not take it: {why}") from None

    def render_or_none(
        self, messages: list[Message], tools: list[dict] | None, **options: bool
    ) -> str | None:
        with suppress(ValueError):
            return self.render(messages, tools, **options)

    def leaves_out(self, messages: list[Message], tools: list[dict] | None, text: str) -> bool:
        """Whether the text made of messages lacks a field of one, some of a field, or a tool.

        Fields are looked for in turn, without white space, which templates trim.

        Raises:
            ValueError: the text is the same without a message; mostly the template does not know
                its role.
        """
        shown, end, cut = squeeze(text), 0, False
        for number, message in enumerate(messages):
            fields = strings_of(message)
            places = [end_of(field, shown, end) for field in fields]
            if -1 in places:
                blank = {"role": message["role"], "content": ""}
                others = [*messages[:number], blank, *messages[number + 1 :]]
                if self.render_or_none(others, tools) == text:
                    raise ValueError(
                        f"the model's chat template puts message {number + 1}, of the role "
                        f'"{message["role"]:.40}", nowhere in its text'
                    )
                cut |= any(end_of(field, shown) < 0 for field in fields)
            end = max([end, *places])
        names = [name for name in map(function_name, tools or []) if isinstance(name, str)]
        return cut or any(end_of(name, shown) < 0 for name in names)

    def find_answers(
        self, messages: list[Message], tools: list[dict] | None, text: str
    ) -> tuple[list[tuple[int, int]], bool]:
        """Locate the assistant's messages in a text, each with what the template puts after it.

        An answer ends where the text of the messages up to it does; the last message is one.

        Returns:
            Start and end of each answer, in characters, and whether these are all: where the whole
            does not begin with the text of its first messages, only the last answer is located.
        """
        spans, all_found = [], True
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                is_last = i + 1 == len(messages)
                through = text if is_last else self.render_or_none(messages[: i + 1], tools)
                start, end = self.find_start(messages[:i], tools, text), len(through or "")
                all_found &= is_start(through, text) and start < end
                spans.append((start, end))
        return (spans if all_found else spans[-1:]), all_found

    def find_start(self, before: list[Message], tools: list[dict] | None, text: str) -> int:
        """Where in a text the answer to the messages before it starts.

        That is after the generation prompt; where the text has none, it is where texts with other
        answers begin to differ from it.
        """
        opened = self.render_or_none(before, tools, add_generation_prompt=True)
        if is_start(opened, text):
            return len(opened)
        others = [[*before, {"role": "assistant", "content": other}] for other in "ab"]
        rendered = [self.render_or_none(messages, tools) or text for messages in others]
        return len(os.path.commonprefix([text, *rendered]))


def is_start(start: str | None, text: str) -> bool:
    return start is not None and text.startswith(start)


def strings_of(message: Message) -> list[str]:
    """The strings that a message's text should show: content, reasoning, names of functions."""
    fields = ("reasoning_content", "reasoning", "thinking", "content")
    strings = [message.get(field) for field in fields]
    strings += map(function_name, message.get("tool_calls", []))
    return [string for string in strings if isinstance(string, str) and string.strip()]


def function_name(tool: dict[str, Any]) -> object:
    """The name in a tool or a tool call."""
    return (tool["function"] if isinstance(tool.get("function"), dict) else tool).get("name")


def squeeze(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def end_of(string: str, squeezed: str, start: int = 0) -> int:
    """Where a string, as it is or as JSON has it, first ends in a squeezed text; -1: nowhere."""
    as_json = json.dumps(string.strip(), ensure_ascii=False)[1:-1]
    forms = {squeeze(string), squeeze(as_json)}
    ends = [at + len(form) for form in forms if (at := squeezed.find(form, start)) >= 0]
    return min(ends, default=-1)
