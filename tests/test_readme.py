"""What README.md says in English and in Korean: the same, and its commands work as typed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import templates
import tiny
import train_lora
from conftest import ROOT
from test_chat import write_tokenizer

import pytest

ENGLISH, KOREAN = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## 한국어\n")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [content for name, content in FENCED.findall(text) if name == language]


def prose(text: str) -> str:
    return FENCED.sub("", text)


def code(text: str) -> set[str]:
    """What stands in backticks."""
    return set(re.findall(r"`([^`]+)`", prose(text).replace("\n  ", " ")))


@pytest.mark.parametrize("language", ["bash", "sh", "json", ""])
def test_both_parts_have_the_same_commands_data_and_output(language: str) -> None:
    assert blocks(ENGLISH, language) == blocks(KOREAN, language) != []


def test_both_parts_name_the_same_flags_files_and_messages() -> None:
    assert code(ENGLISH) == code(KOREAN)


def test_both_parts_have_the_same_numbers() -> None:
    """Of digits; words such as "two" and "3분의 2" are left to the reader."""
    numbers = [set(re.findall(r"\d[\d.,]*\d|\d", prose(part))) for part in (ENGLISH, KOREAN)]
    assert numbers[0] - numbers[1] == set()
    assert numbers[1] - numbers[0] <= {"2", "3", "4", "11"}  # 3분의 2, 2분, 11월


def test_no_line_is_longer_than_100_letters() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("part", [ENGLISH, KOREAN], ids=["English", "Korean"])
def test_all_flags_are_there_with_their_defaults(part: str) -> None:
    text = " ".join(prose(part).split())
    for action in train_lora.build_parser()._actions:
        flag = action.option_strings[0]
        if flag in ("-h", "--help"):
            continue
        assert f"`{flag}`" in text
        if isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool):
            default = "2e-5" if action.default == 2e-5 else str(action.default)
            given = re.findall(rf"`{flag}` ?\(([^)]*)\)", text)
            assert any(f"`{default}`" in words for words in given), flag


def test_the_commands_work_as_typed_one_after_the_other(tmp_path: Path) -> None:
    """In a copy with tiny models and a tenth of the data, where two Macs are this machine."""
    project = tmp_path / "project"
    others = shutil.ignore_patterns(".*", "__pycache__", "SmolLM2*", "*.npz", "*.run")
    shutil.copytree(ROOT, project, ignore=others)
    (project / ".venv").symlink_to(sys.prefix)
    for file in (project / "data/korean_textbooks_qa").glob("*.jsonl"):
        file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:8]), "utf-8")
    size = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    demo = tiny.make_model(project / "lora_finetune" / "SmolLM2-135M-Instruct", **size)
    write_tokenizer(demo, templates.CHATML)
    hub = tiny.make_model(tmp_path / "hub", **size)
    here = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}
    (project / "hosts.json").write_text(json.dumps([here, here]))
    # The rest is of others, or takes long.
    [export] = re.findall(r"(?m)^python .*--export .*", "".join(blocks(ENGLISH, "sh")))
    script = "set -e\n" + "".join(blocks(ENGLISH, "bash")) + export
    script = script.replace("GuminiResearch/Gumini-1B-Base", str(hub))
    (project / "commands").write_text(script, encoding="utf-8")
    # Standard input stays open, as on a terminal: the launcher would spin on one that has ended.
    with subprocess.Popen(
        ["bash", "commands"], cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        printed = process.stdout.read().decode()
    assert process.returncode == 0, printed
    assert printed.count("\nIter 64: Answer: ") == 1
    assert printed.count("Saved adapter weights to lora_finetune/lora_adapters.npz") == 5
    assert "error:" not in printed
    assert (project / "answers.gguf").exists() and (project / "answers.Modelfile").exists()
    for name in ("demo.run/losses.png", "for-mlx-lm", "for-peft", "merged"):
        assert (project / "lora_finetune" / name).exists()


def test_the_script_that_compares_templates_with_llama_cpp_starts() -> None:
    assert "tests/bench/chat_templates.py" in ENGLISH
    command = [sys.executable, ROOT / "tests/bench/chat_templates.py", "--help"]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
