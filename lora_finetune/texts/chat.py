"""Chats: messages in the forms that people have them in, and through a model's chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_finetune.base.errors import first_line, is_unicode

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, Any]

# --- Reading ------------------------------------------------------------------------------------

# Who speaks in ShareGPT's form, as roles; some exports have the roles themselves.
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
}
SHAREGPT_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}


def read_messages(entry: dict[str, Any]) -> list[Message]:
    """The messages of an object that has "messages" or "conversations", as templates take them.

    Each may be of the form {"role", "content"} or ShareGPT's {"from", "value"}. In what comes out
    a content is a string, the arguments of tool calls are objects, and nothing is null.

    Raises:
        ValueError: says what is wrong, and in which message.
    """
    key = "messages" if "messages" in entry else "conversations"
    found = entry[key]
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
    system = entry.get("system")  # beside the conversations in some exports
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def read_message(found: dict[str, Any]) -> Message:
    """A message as templates take it; raises ValueError that says what is wrong."""
    message = {key: value for key, value in found.items() if value is not None}
    if message.get("from") == "function_call":  # of LLaMA-Factory: a call, or a list of them
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
    if message.get("tool_calls"):
        message["tool_calls"] = read_tool_calls(message["tool_calls"])
        message.setdefault("content", "")
    else:
        message.pop("tool_calls", None)
    message["content"] = read_content(message.get("content"))
    return message


def read_content(content: object) -> str:
    """The content of a message; of a list of parts the text. Raises ValueError where it is none."""
    if isinstance(content, str):
        return content
    if content is None:
        raise ValueError("has no content")
    if not isinstance(content, list):
        raise ValueError(f"its content is {type_name(content)}, not a string")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a part of its content is of the type {kind!s:.40}, not text")
        if not isinstance(part.get("text"), str):
            raise ValueError("a part of its content has no text")
        texts.append(part["text"])
    return "".join(texts)


def read_tool_calls(calls: object) -> list[dict]:
    """Tool calls as `read_tool_call` has them; OpenAI's arguments are a string of JSON."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("its tool_calls are not a list of objects")
    return [read_tool_call(call) for call in calls]


def read_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with an object of arguments, which is empty where it has none."""
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
    """The tools of an object, a list or a string of JSON; None where there are none."""
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
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "null")


# --- Through the template -----------------------------------------------------------------------


class Template:
    """A model's chat template.

    Attributes:
        shown: (role, kinds of parts in the message, kind of a part) that it is known to show. That
            is found out by leaving such a part out, once.
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        self.tokenizer = tokenizer
        self.shown: set[tuple] = set()

    def render(self, messages: list[Message], tools: list[dict] | None, **options: bool) -> str:
        """The text of messages; raises ValueError where the template does not take them."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, **options
            )
        except Exception as error:  # a template may raise anything
            why = first_line(error)
            raise ValueError(f"the model's chat template does not take it: {why}") from None
        if not is_unicode(text):
            raise ValueError("the model's chat template makes an unpaired surrogate of it")
        return text

    def leaves_out(self, messages: list[Message], tools: list[dict] | None, text: str) -> bool:
        """Whether part of a message, or the tools, is missing in the text made of them.

        Strings are looked for without white space, which templates trim and change.

        Raises:
            ValueError: a message is nowhere in it; mostly the template does not know its role.
        """
        squeezed = squeeze(text)
        strings = [squeeze(s) for message in messages for _, some in parts(message) for s in some]
        all_whole = stand_in_order(squeezed, strings)  # a look that is quick, and mostly enough

        def is_whole(string: str) -> bool:
            needed = sum(s.count(squeeze(string)) for s in strings)
            return count_shown(squeezed, string) >= needed

        cut = False
        for number, message in enumerate(messages):
            kinds, shares = dict(parts(message)), set()
            for part, strings_of_part in kinds.items():
                key = message["role"], *kinds, part
                whole = all_whole or all(map(is_whole, strings_of_part))
                if not (whole and key in self.shown):
                    if not self.depends_on(messages, number, part, tools, text):
                        shares.add("nothing")
                        continue
                    self.shown.add(key)
                shares.add("all" if whole else "some")
            if shares == {"nothing"}:
                raise ValueError(
                    f"the model's chat template puts message {number + 1}, of the role "
                    f'"{message["role"]:.40}", nowhere in its text'
                )
            cut |= bool(shares - {"all"})
        if tools and ("tools",) not in self.shown:
            if self.render_or_none(messages, None) == text:
                return True
            self.shown.add(("tools",))
        return cut

    def depends_on(
        self, messages: list[Message], number: int, part: str, tools: list[dict] | None, text: str
    ) -> bool:
        """Whether the text of messages would be another without a part of one of them."""
        message = {key: value for key, value in messages[number].items() if key != part}
        message.setdefault("content", "")
        without = [*messages[:number], message, *messages[number + 1 :]]
        return self.render_or_none(without, tools) != text

    def render_or_none(
        self, messages: list[Message], tools: list[dict] | None, **options: bool
    ) -> str | None:
        try:
            return self.render(messages, tools, **options)
        except ValueError:
            return None

    def find_answers(
        self, messages: list[Message], tools: list[dict] | None, text: str
    ) -> tuple[list[tuple[int, int]], bool]:
        """Where the assistant's messages stand in a text, with what the template puts after them.

        An answer ends where the text of the messages up to it does; the last message is one. See
        `find_start` for where it starts.

        Returns:
            The start and the end of each answer, in characters, and whether they are all: where
            the text of the first messages is not the start of the whole, only the last is known.
        """
        spans, nested = [], True
        for i in answers_in(messages):
            through = self.render_or_none(messages[: i + 1], tools) if messages[i + 1 :] else text
            start, end = self.find_start(messages[:i], tools, text), len(through or "")
            nested &= is_start(through, text) and start < end
            spans.append((start, end))
        return (spans if nested else spans[-1:]), nested

    def find_start(self, before: list[Message], tools: list[dict] | None, text: str) -> int:
        """Where the answer to the messages before it starts in a text.

        That is behind the mark for an answer to come; where the text has another mark, or the
        template has none, it is where the text of any answer begins to differ.
        """
        marked = self.render_or_none(before, tools, add_generation_prompt=True)
        if is_start(marked, text):
            return len(marked)
        others = [[*before, {"role": "assistant", "content": other}] for other in "ab"]
        rendered = [self.render_or_none(messages, tools) or text for messages in others]
        return len(os.path.commonprefix([text, *rendered]))


def up_to_answer(messages: list[Message]) -> list[Message]:
    """The messages up to the last of the assistant; raises ValueError where there is none."""
    if not (answers := answers_in(messages)):
        raise ValueError('for --mask-prompt it needs a message of the role "assistant"')
    return messages[: answers[-1] + 1]


def answers_in(messages: list[Message]) -> list[int]:
    """Which of the messages are the assistant's."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def is_start(part: str | None, text: str) -> bool:
    return part is not None and text.startswith(part)


def parts(message: Message) -> Iterator[tuple[str, list[str]]]:
    """The parts of a message that a text of it should show, with strings that it should hold."""
    if message["content"].strip():
        yield "content", [message["content"]]
    for part in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(part), str) and message[part].strip():
            yield part, [message[part]]
    if calls := message.get("tool_calls"):
        yield "tool_calls", [string for call in calls for string in strings_of(call)]


def strings_of(call: dict[str, Any]) -> Iterator[str]:
    """The name of the function that a tool call is of, and the strings among its arguments."""
    function = call["function"] if isinstance(call.get("function"), dict) else call
    arguments = function.get("arguments")
    values = arguments.values() if isinstance(arguments, dict) else []
    strings = (value for value in (function.get("name"), *values) if isinstance(value, str))
    yield from filter(str.strip, strings)


def squeeze(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def stand_in_order(text: str, strings: list[str]) -> bool:
    """Whether a text holds some strings one after the other."""
    end = 0
    for string in strings:
        if (start := text.find(string, end)) < 0:
            return False
        end = start + len(string)
    return True


def count_shown(squeezed: str, string: str) -> int:
    """How often a string stands in a text without white space, as it is or as JSON has it."""
    as_json = json.dumps(string.strip(), ensure_ascii=False)[1:-1]
    return squeezed.replace(squeeze(as_json), squeeze(string)).count(squeeze(string))
