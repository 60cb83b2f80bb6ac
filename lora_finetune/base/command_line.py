"""The parser of the command lines of train_lora.py and prepare_lora_data.py, and its types."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from lora_finetune.base.errors import one_line

ROOT = Path(__file__).resolve().parents[2]


class Parser(argparse.ArgumentParser):
    """An argument parser with errors in one line; `typed` names the flags whose value was typed."""

    def __init__(self, **options):
        layout = partial(argparse.HelpFormatter, max_help_position=30, width=100)
        super().__init__(allow_abbrev=False, formatter_class=layout, **options)
        self.register("action", None, StoreTyped)
        self.set_defaults(typed=frozenset())
        self.group = self

    def section(self, title: str) -> None:
        """Begin a section of flags in the help."""
        self.group = self.add_argument_group(title)

    def add(self, names: str, type: Callable, default: object, help: str, **options) -> None:
        """Add a flag with a value, whose help tells the default."""
        help += "" if default is None else " (default: %(default)s)"
        if "choices" not in options:
            options.setdefault("metavar", "TEXT" if type is nonempty else "N")
        self.group.add_argument(*names.split(), type=type, default=default, help=help, **options)

    def switch(self, name: str, help: str) -> None:
        self.group.add_argument(name, action="store_true", help=help)

    def parse_args(self, args: list[str] | None = None, namespace: object = None) -> object:
        return super().parse_args(self.expanded(sys.argv[1:] if args is None else args), namespace)

    def expanded(self, words: list[str], within: tuple[str, ...] = ()) -> list[str]:
        """The words of a command line, with those of a file in the place of each @FILE.

        Values of flags may begin with @ too, such as prompts, so argparse's own way does not do.
        """
        numbers = {name: action.nargs for action in self._actions for name in action.option_strings}
        found, num_values = [], 0
        for word in words:
            if num_values or not word.startswith("@"):
                found.append(word)
                of_flag = 1 if (number := numbers.get(word, 0)) is None else number
                num_values = num_values - 1 if num_values else of_flag
                continue
            if word in within:
                self.error(f"{word[1:]} names itself as a file of flags")
            try:
                text = Path(word[1:]).read_text(encoding="utf-8-sig")
                found += self.expanded(shlex.split(text, comments=True), (*within, word))
            except OSError as error:
                self.error(f"{word[1:]} cannot be read: {error.strerror}")
            except ValueError as error:
                self.error(f"{word[1:]} is no list of flags: {error}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}\n")


class StoreTyped(argparse.Action):
    def __call__(self, parser, namespace, value, option_string=None) -> None:
        setattr(namespace, self.dest, value)
        namespace.typed |= {self.dest}


def nonempty(text: str) -> str:
    """An argparse type: any text but an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def number(kind: type, least: float, below: float = math.inf, also: int | None = None) -> Callable:
    """An argparse type: a finite number from `least` on and less than `below`, or `also`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value < below and value != also:
            other = "" if also is None else f" or {also}"
            most = f" and below {below}" if value >= below else ""
            raise argparse.ArgumentTypeError(f"must be at least {least}{most}{other}, not {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # for "invalid … value"
    return parse


whole_number = partial(number, int, below=2**31)
nonnegative_number, positive_number = number(float, 0), number(float, 1e-9)
scale_number = number(float, 0.0001, below=10001)


def iterations_or_share(text: str) -> str:
    """An argparse type: a number of iterations ("100"), or a percentage of a run ("5%")."""
    is_share = text.endswith("%")
    value = float(text[:-1]) if is_share else int(text)
    if not 0 <= value <= (100 if is_share else 2**31 - 1):
        raise argparse.ArgumentTypeError("must be iterations, such as 100, or a share, such as 5%")
    return f"{value:g}%" if is_share else str(value)


iterations_or_share.__name__ = "number of iterations, or share"  # for "invalid … value"


def words_of(*known: str) -> Callable[[str], str]:
    """An argparse type: some of these words, with commas between."""

    def parse(text: str) -> str:
        for word in text.split(","):
            if word not in known:
                raise argparse.ArgumentTypeError(f"takes {', '.join(known)}, not {word!r}")
        return text

    return parse


def json_object(text: str) -> str:
    """An argparse type: the JSON text of an object, in one form whatever its spaces and order."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("is not a JSON object")
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


json_object.__name__ = "JSON object"  # for "invalid … value"


def in_project(path: str) -> str:
    """A default path: one in this project, wherever the program is called from."""
    return os.path.relpath(ROOT / path)
