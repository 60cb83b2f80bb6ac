"""Chats: messages, tools and the rest of a row in the forms that people have them in."""

from __future__ import annotations

import json
from numbers import Number
from typing import Any

Message = dict[str, Any]

# Who speaks in ShareGPT's form, as roles; some exports have the roles themselves.
SHAREGPT_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"
}  # fmt: skip

# Keys of messages that say whether one is learnt: OpenAI's, axolotl's and another; 0 and false say
# that it is not, 1 and true that it is.
MARKS = ("weight", "train", "loss")
REASONING = ("reasoning_content", "reasoning", "thinking")
CHATS = ("messages", "conversations")
TURNS = ("prompt", "completion")
BESIDE = ("tools", "chat_template_kwargs")  # what may stand beside messages
KWARGS = 'its "chat_template_kwargs"'

FORM = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


def advice_on_contents(row: dict[str, Any]) -> str:
    """What to do with a chat in Gemini's form, which is not read; "" for other rows."""
    return isinstance(row.get("contents"), list) * (
        f"; these are chats in Gemini's form: write each as {FORM}, with the text of its parts as "
        "content, and assistant for the role model"
    )


def spell_out(row: dict[str, Any]) -> list[str]:
    """Make numbers and booleans text where texts belong; returns the keys that had some."""
    places = [(row, key) for key in ("text", *TURNS)]
    for name in filter(lambda name: is_objects(row.get(name)), (*CHATS, *TURNS)):
        places += [(message, key) for message in row[name] for key in ("content", "value")]
    numbers = [(place, key) for place, key in places if is_number(place.get(key))]
    for place, key in numbers:
        place[key] = as_text(place[key])
    return [key for _, key in numbers]


def is_number(value: object) -> bool:
    """Whether a value is a number, which NaN is not, or a boolean."""
    return isinstance(value, Number) and value == value


class WrittenFloat(float):
    """A number that knows how it is written, such as 1.50."""

    def __new__(cls, written: str) -> WrittenFloat:
        number = super().__new__(cls, written)
        number.written = written
        return number


def as_text(number: object) -> str:
    """A number or a boolean as JSON has it, where it was read from that as it is written there."""
    text = str(getattr(number, "written", number))
    return text.lower() if isinstance(number, bool) else text


def as_chat(row: dict[str, Any], mask_prompt: bool = False) -> dict[str, Any]:
    """A row of messages where prompt and completion are lists of them, as TRL has it.

    With `mask_prompt`, the answers in the prompt are marked as not to be learnt.
    """
    turns = [row.get(name) for name in TURNS]
    if not all(messages and is_objects(messages) for messages in turns):
        return row
    prompt, completion = turns
    if mask_prompt:
        prompt = [m | {"train": False} if m.get("role") == "assistant" else m for m in prompt]
    return {k: v for k, v in row.items() if k not in TURNS} | {"messages": prompt + completion}


def read_messages(row: dict[str, Any]) -> list[Message]:
    """The messages of a row, as templates take them.

    They are in "messages" or "conversations"; each is {"role", "content"} or ShareGPT's {"from",
    "value"}. The result has strings as contents, objects as arguments of tool calls, and no null.
    ValueError says what is wrong where.
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
        calls = [{"type": "function", "function": call} for call in calls]
        message |= {"from": "gpt", "tool_calls": calls}
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

    OpenAI's earlier "functions" and LLaMA-Factory's tools are the functions themselves, and the
    tools of its newer interface have the function's keys beside their type.
    """
    for key in ("tools", "functions"):
        tools = row.get(key)
        if isinstance(tools, str):
            tools = parse(tools.strip() or "null", f'its "{key}"')
        if tools and not is_objects(tools):
            raise ValueError(f'its "{key}" are not a list of objects')
        if tools:
            return [
                tool
                if "function" in tool
                else {
                    "type": "function",
                    "function": {k: v for k, v in tool.items() if k != "type"},
                }
                for tool in tools
            ]
    return None


def read_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a row has for the chat template, an object or a string of JSON."""
    found = row.get("chat_template_kwargs")
    found = parse(found.strip() or "{}", KWARGS) if isinstance(found, str) else found
    if not isinstance(found or {}, dict):
        raise ValueError(f"{KWARGS} are not an object")
    return found or {}


def read_beside(row: dict[str, Any]) -> dict[str, Any]:
    """What a row has for the chat template beside its messages."""
    found = dict(zip(BESIDE, (read_tools(row), read_arguments(row)), strict=True))
    return {name: value for name, value in found.items() if value}


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


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """The function in a tool or a tool call; in some forms it is that itself."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


def with_keys(call: dict[str, Any], **keys: object) -> dict[str, Any]:
    """A tool call with other arguments, or another name."""
    if "function" in call:
        return call | {"function": with_keys(call["function"], **keys)}
    return call | keys
