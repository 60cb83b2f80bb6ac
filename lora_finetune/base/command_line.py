"""The parser of the command lines of train_lora.py and prepare_lora_data.py, and its types."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lora_finetune.base.errors import first_line, one_line

ROOT = Path(__file__).resolve().parents[2]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all errors of these programs.

    The set `typed` among the arguments names those with a value that were typed, not defaults.
    On Windows there is only the error that says so.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=one_line_each, **options)
        if sys.platform == "win32":
            self.error("this does not run on Windows; run it in WSL2, its Linux (`wsl --install`)")
        self.register("action", None, StoreTyped)
        self.set_defaults(typed=frozenset())
        self.group = self

    def section(self, title: str) -> None:
        """Begin a section of flags, to which those that are added belong from now on."""
        self.group = self.add_argument_group(title)

    def add(self, names: str, type: Callable, default: object, help: str, **options) -> None:
        """Add a flag with a value; its help tells the default, if it has one."""
        help += "" if default is None else " (default: %(default)s)"
        if "choices" not in options:
            options.setdefault("metavar", "TEXT" if type is nonempty else "N")
        self.group.add_argument(*names.split(), type=type, default=default, help=help, **options)

    def switch(self, name: str, help: str) -> None:
        self.group.add_argument(name, action="store_true", help=help)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}\n")


def one_line_each(prog: str) -> argparse.HelpFormatter:
    """Help that has a line for each flag, where its text is short enough for one of 100 letters."""
    return argparse.HelpFormatter(prog, max_help_position=30, width=100)


class StoreTyped(argparse.Action):
    def __call__(self, parser, namespace, value, option_string=None) -> None:
        setattr(namespace, self.dest, value)
        namespace.typed |= {self.dest}


def nonempty(text: str) -> str:
    """An argparse type: any text but an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def nonnegative_number(text: str) -> float:
    """An argparse type: a finite real number that is not negative."""
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"must be a finite number, 0 or more, not {text}")
    return number


def scale_number(text: str) -> float:
    """An argparse type: a real number within what float32 can be scaled by."""
    number = float(text)
    if not 1e-4 <= number <= 1e4:
        raise argparse.ArgumentTypeError(f"must be from 0.0001 to 10000, not {text}")
    return number


for number_type in (nonnegative_number, scale_number):
    number_type.__name__ = "number"  # for argparse's "invalid … value"


def whole_number(least: int, also: int | None = None, below: float = 2**31) -> Callable[[str], int]:
    """An argparse type: an integer from `least` on and less than `below`, or `also`."""

    def parse(text: str) -> int:
        number = int(text)
        if not least <= number < below and number != also:
            other = "" if also is None else f" or {also}"
            most = f" and below {below}" if number >= below else ""
            raise argparse.ArgumentTypeError(f"must be at least {least}{most}{other}, not {text}")
        return number

    parse.__name__ = "whole number"  # for argparse's "invalid … value"
    return parse


def in_project(path: str) -> str:
    """A default path: one in this project, wherever the program is called from."""
    try:
        return os.path.relpath(ROOT / path)
    except FileNotFoundError:  # the working folder was deleted
        return str(ROOT / path)


def import_or_exit(module: str, *packages: str) -> None:
    """Import a module, and look for packages; what is not there or does not load is one line."""
    try:
        importlib.import_module(module)
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(name=package)
        return
    except ModuleNotFoundError as error:
        reason = (
            f"{error.name} is not installed for {sys.executable}; `make demo` installs all that is "
            "needed into .venv, and `source .venv/bin/activate` turns to that"
        )
    except ImportError as error:  # such as that of MLX for CUDA where there is no GPU
        reason = (
            f"{module} cannot be loaded ({first_line(error)}); see README.md for what to install "
            "on which machine"
        )
    print(f"error: {one_line(reason)}", file=sys.__stderr__)
    sys.exit(2)
