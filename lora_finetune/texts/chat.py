"""Chats through a model's chat template, and where their messages are in its text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_finetune.base.errors import first_line
from lora_finetune.texts.messages import MARKS, REASONING, Message, function_of, with_keys

from transformers.utils import chat_template_utils

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Span = tuple[int, int]  # start and end, in characters


class Chat(NamedTuple):
    """The messages of a row, and what else it has for the template."""

    messages: list[Message]
    tools: list[dict] | None = None
    arguments: dict[str, Any] = {}  # of the template, such as enable_thinking

    def until(self, end: int) -> Chat:
        return self._replace(messages=self.messages[:end])

    def changed(self, number: int, message: Message) -> Chat:
        """The chat with another message in the place of one."""
        return self._replace(
            messages=[*self.messages[:number], message, *self.messages[number + 1 :]]
        )


class CallForm(NamedTuple):
    """How a template takes tool calls."""

    json_arguments: bool = False  # as JSON text, not as an object
    null_content: bool = False  # where there is none, which is else an empty string


@dataclass
class Template:
    """A model's chat template.

    Nothing is added to what rows and user give it: mlx-lm's wrapper sets enable_thinking, by the
    vocabulary (tokenizer_utils.py:395 of 0.32.2).
    """

    tokenizer: TokenizerWrapper
    arguments: dict[str, Any] = field(default_factory=dict)  # where a row has none of its own
    now: datetime | None = None  # the time that it may put into texts; None: the present
    call_form: CallForm | None = None  # how it takes tool calls, once a chat has shown it

    @property
    def has_date(self) -> bool:
        return "strftime_now" in str(self.tokenizer.chat_template)

    def render(self, chat: Chat, **options: bool) -> str:
        """The text of a chat; raises ValueError where the template does not take it."""
        if self.call_form is None and any("tool_calls" in message for message in chat.messages):
            self.call_form = self.find_call_form(chat)
        try:
            return self.apply(chat, self.call_form or CallForm(), options)
        except Exception as error:  # a template may raise anything
            raise ValueError(
                f"the model's chat template does not take it: {first_line(error)} "
                "(--chat-template-args can change what it takes)"
            ) from None

    def find_call_form(self, chat: Chat) -> CallForm | None:
        """The form in which a template shows the calls of a chat, tried with made-up arguments.

        Templates take the arguments as an object, or as JSON text, which they join to a string;
        some of DeepSeek's show calls only where the content is null. None if it shows none.
        """
        probe = {"probed": "probe"}
        for number, message in enumerate(chat.messages):
            if "tool_calls" in message:
                calls = [with_keys(call, arguments=probe) for call in message["tool_calls"]]
                chat = chat.changed(number, message | {"tool_calls": calls})
        for form in (CallForm(j, n) for n in (False, True) for j in (False, True)):
            with suppress(Exception):
                text = self.apply(chat, form, {})
                if "probed" in text and str(probe) not in text:
                    return form
        return None

    def apply(self, chat: Chat, form: CallForm, options: dict[str, bool]) -> str:
        messages = [for_template(message, form) for message in chat.messages]
        options = self.arguments | chat.arguments | options
        if in_python := self.tokenizer._chat_template:  # one of mlx-lm's own
            return in_python(messages, tools=chat.tools, **options)
        tokenizer = self.tokenizer._tokenizer
        with time_is(self.now):
            if not form.null_content:
                return tokenizer.apply_chat_template(
                    messages, tools=chat.tools, tokenize=False, **options
                )
            # apply_chat_template takes nulls away.
            template = tokenizer.get_chat_template(tools=chat.tools)
            options = tokenizer.special_tokens_map | options
            [text], _ = chat_template_utils.render_jinja_template(
                [messages], chat.tools, chat_template=template, **options
            )
            return text

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
            lost = self.lost_calls(chat, text, number)
            if lost or -1 in found.values():
                blank = {"role": message["role"], "content": ""}
                if self.try_render(chat.changed(number, blank)) == text:
                    raise ValueError(
                        f"the model's chat template puts message {number + 1}, of the role "
                        f'"{message["role"]:.40}", nowhere in its text'
                    )
                cut = [name for name, field in fields.items() if field not in shown]
                left_out += [f"the {name} of message {number + 1}" for name in cut + lost]
        names = [str(function_of(tool).get("name")) for tool in chat.tools or []]
        return left_out + [f"the tool {name}" for name in names if squeeze(name) not in shown]

    def lost_calls(self, chat: Chat, text: str, number: int) -> list[str]:
        """The tool calls of a message without which the text of its chat would be the same."""
        message = chat.messages[number]
        places = range(len(message.get("tool_calls", [])))
        others = [chat.changed(number, with_call(message, p, {"a": "other"})) for p in places]
        return [f"tool call {p + 1}" for p in places if self.try_render(others[p]) == text]

    # --- Where a message is in the text

    def find(self, chat: Chat, text: str, number: int) -> Span | None:
        """Where a message is in the text of its chat, with what closes it; None if that is unsure.

        An answer starts after the generation prompt, and ends where the text of the chat ends if no
        more follows. Templates that change earlier messages when more follow have no such places:
        then they are found by what changes with the message.
        """
        before = chat.until(number)
        opened = self.try_render(before, add_generation_prompt=True)
        prompt = self.generation_prompt(before, opened)
        start = self.find_start(chat, text, number, opened, prompt)
        end = None if start is None else self.find_end(chat, text, number, start, prompt)
        return None if end is None or end <= start else (start, end)

    def find_whole(self, chat: Chat, text: str, number: int) -> Span | None:
        """As `find`, and None where some of the message's content stands elsewhere."""
        span, message = self.find(chat, text, number), chat.messages[number]
        if span and message["content"].strip():
            others = [message | {"content": other} for other in "ab"]
            content = self.find_change(chat, text, number, others) or span
            span = span if span[0] <= content[0] <= content[1] <= span[1] else None
        return span

    def find_start(
        self, chat: Chat, text: str, number: int, opened: str, prompt: str
    ) -> int | None:
        """Where a message starts; `opened` is the text before it with the generation prompt."""
        message = chat.messages[number]
        if message["role"] != "assistant":
            prompt = opened = ""
        if number and opened and text.startswith(opened):
            return len(opened)
        thoughts = [name for name in REASONING if name in message]
        calls = message.get("tool_calls", [])
        plain = {k: v for k, v in message.items() if k not in (*thoughts, "tool_calls")}
        options = [[plain | {"content": other} for other in "ab"]]
        if thoughts:
            options.append([message | dict.fromkeys(["content", *thoughts], o) for o in "ab"])
        spans = (self.find_change(chat, text, number, others) for others in options)
        span = next(filter(None, spans), None)
        named = [message | {"tool_calls": [with_keys(c, name=o)]} for c in calls[:1] for o in "ab"]
        changed = span or self.find_change(chat, text, number, named)
        if changed and prompt and not text.endswith(prompt, 0, changed[0]):
            # A turn begins behind the prompt, with what the template adds to it.
            earlier = chat.messages[number - 1]
            others = [earlier | {"content": other} for other in "ab"]
            above = self.find_change(chat, text, number - 1, others) if number else (0, 0)
            at = text.find(prompt, above[1], changed[0]) if above else -1
            if at >= 0:
                return at + len(prompt)
            changed = span
        return changed and changed[0]

    def find_end(self, chat: Chat, text: str, number: int, start: int, prompt: str) -> int | None:
        """Where a message that starts there ends: behind what closes it.

        That is what the text has in common behind the message with the text that ends in it.
        """
        message, through = chat.messages[number], chat.until(number + 1)
        if number + 1 == len(chat.messages):
            return len(text)
        closed = self.without_prompt(through, prompt)
        if len(closed) > start and text.startswith(closed):
            return len(closed)
        options = [[message | {"content": other} for other in "ab"]]
        for place in range(len(message.get("tool_calls", []))):  # the last that is shown counts
            options.insert(0, [with_call(message, place, {"a": other}) for other in "ab"])
        for others in options:
            if span := self.find_change(chat, text, number, others):
                alone = self.find_change(through, closed, number, others)
                return span[1] + (num_common(text[span[1] :], closed[alone[1] :]) if alone else 0)
        return None

    def generation_prompt(self, chat: Chat, opened: str) -> str:
        """What the text of a chat has at its end where it is opened for an answer, "" if unsure.

        Some templates end a text without a generation prompt in the end-of-text token, or end its
        last answer in another way than earlier ones; so behind an answer, and at the beginning, it
        is what a question has.
        """
        if not chat.messages or chat.messages[-1]["role"] == "assistant":
            chat = chat._replace(messages=[{"role": "user", "content": "a"}])
            opened = self.try_render(chat, add_generation_prompt=True)
        before = self.try_render(chat)
        for end in ("", self.tokenizer.eos_token or ""):
            start = before.removesuffix(end)
            if start and opened.startswith(start):
                return opened[len(start) :]
        return ""

    def without_prompt(self, chat: Chat, prompt: str) -> str:
        """The text of a chat as if more followed, without the generation prompt at its end."""
        if prompt:
            opened = self.try_render(chat, add_generation_prompt=True)
            if opened.endswith(prompt):
                return opened.removesuffix(prompt)
        return self.try_render(chat)

    def find_change(self, chat: Chat, text: str, number: int, others: list[Message]) -> Span | None:
        """Where the text of a chat changes with others in the place of a message; None: nowhere."""
        start = same_end = len(text)
        for other in others:
            changed = self.try_render(chat.changed(number, other))
            if not changed:
                return None
            if changed != text:
                same = num_common(text, changed)
                start = min(start, same)
                same_end = min(same_end, num_common(text[same:][::-1], changed[same:][::-1]))
        return (start, len(text) - same_end) if start < len(text) else None


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


def for_template(message: Message, form: CallForm) -> Message:
    """A message without the marks that are not for templates, its calls in the given form."""
    found = {key: value for key, value in message.items() if key not in MARKS}
    if "tool_calls" in found and form.json_arguments:
        texts = [
            json.dumps(function_of(c)["arguments"], ensure_ascii=False) for c in found["tool_calls"]
        ]
        calls = zip(found["tool_calls"], texts, strict=True)
        found["tool_calls"] = [with_keys(call, arguments=text) for call, text in calls]
    if "tool_calls" in found and form.null_content and not found["content"]:
        found["content"] = None
    return found


def with_call(message: Message, place: int, arguments: object) -> Message:
    """A message with other arguments in one of its tool calls."""
    calls = list(message["tool_calls"])
    calls[place] = with_keys(calls[place], arguments=arguments)
    return message | {"tool_calls": calls}


def num_common(one: str, other: str) -> int:
    """The number of characters that two texts have in common at their start."""
    return len(os.path.commonprefix([one, other]))


def strings_of(message: Message) -> dict[str, str]:
    """What the text should show of a message, squeezed: content and reasoning."""
    fields = {name: message.get(name) for name in (*REASONING, "content")}
    return {name: squeeze(field) for name, field in fields.items() if isinstance(field, str)}


def squeeze(text: str) -> str:
    """A text without white space, which templates trim, and escapes, since some put it as JSON."""
    for escape in ("\\n", "\\r", "\\t", "\\"):
        text = text.replace(escape, "")
    return "".join(text.split())
