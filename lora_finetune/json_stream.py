"""JSON out of a stream, a value at a time, so that a list in it may be longer than the memory.

By the standard library's decoder, as JSON Lines are read: a streaming parser such as ijson refuses
the NaN and the long numbers that Python writes, and makes a question mark of half an emoji.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from lora_finetune.command_line import UserError
from lora_finetune.formats import TOO_MUCH, why_not_json

CHUNK = 2**18  # characters
LONGEST_WORD = len(r"\ud83e\udd6c")  # what an error may be in because the text ends within it
REST_OF_NUMBER = re.compile(r"[\d.eE+-]*")
WHITE_SPACE = re.compile(r"[ \t\n\r]*")
decode = json.JSONDecoder().raw_decode


class JsonStream:
    """JSON that is read from its start on; each method raises UserError that names file and line.

    Attributes:
        text: what was taken from the stream and is needed still, and what came just before.
        at: where in it the next value is looked for.
        line, column: where the text begins in the file, counted from 0.
    """

    def __init__(self, file: Path, stream: TextIO):
        self.file, self.stream = file, stream
        self.text, self.at, self.line, self.column = "", 0, 0, 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.at = WHITE_SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.fill():
                return self.text[self.at : self.at + 1]

    def fill(self) -> bool:
        """Take more text from the stream, at least as much as is still unread; whether any came."""
        more = self.stream.read(max(CHUNK, len(self.text) - self.at))
        if more:
            self.line, self.column = self.place(self.at)
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def place(self, at: int) -> tuple[int, int]:
        """The line and the column of a place in the text, counted from 0."""
        lines = self.text.count("\n", 0, at)
        if not lines:
            return self.line, self.column + at
        return self.line + lines, at - self.text.rindex("\n", 0, at) - 1

    def value(self) -> object:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - LONGEST_WORD or "Unterminated" in error.msg
                if not (cut and self.fill()):
                    self.fail_at(error)
            except (ValueError, RecursionError):
                self.fail(TOO_MUCH, self.at)
            else:
                if REST_OF_NUMBER.fullmatch(self.text, end) and self.fill():
                    continue  # a number that the text ends within, or right after
                self.at = end
                return value

    def take(self, mark: str) -> None:
        """Pass over a mark such as a comma, which has to come next."""
        if self.peek() != mark:
            what = f"Expecting '{mark}'" if mark else "Extra data"
            self.fail_at(json.JSONDecodeError(what, self.text, self.at))
        self.at += len(mark)

    def items(self) -> Iterator[object]:
        """The values of the list that comes next."""
        self.take("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def members(self) -> Iterator[str]:
        """The keys of the object that comes next; the value of each is to be read or skipped."""
        self.take("{")
        while self.peek() != "}":
            if self.peek() != '"':
                self.take('"')
            key = self.value()
            self.take(":")
            yield key
            if self.peek() != "}":
                self.take(",")
        self.take("}")

    def skip(self) -> str:
        """Pass over the next value, and keep no part of it; returns its first mark.

        Of a list that has an object in it, that is "[{".
        """
        opening = self.peek()
        if opening == "[":
            for item in self.items():
                opening += "{" if opening == "[" and isinstance(item, dict) else ""
        elif opening == "{":
            for _ in self.members():
                self.value()
        else:
            self.value()
        return opening

    def end(self) -> None:
        """Check that nothing more comes."""
        self.take("")

    def fail_at(self, error: json.JSONDecodeError) -> NoReturn:
        self.fail(why_not_json(error, self.place(error.pos)[1]), error.pos)

    def fail(self, what: str, at: int) -> NoReturn:
        raise UserError(f"{self.file}, line {self.place(at)[0] + 1}: {what}") from None
