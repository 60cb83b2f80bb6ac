"""--show-texts: what is learnt, before it is."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import templates
import tiny
from conftest import ROOT, Run, on_terminal
from test_chat import turns, write_tokenizer


def test_texts_are_shown_as_they_are_learnt_with_what_counts_marked(
    call: Run, tmp_path: Path
) -> None:
    """From a folder without weights."""
    model = write_tokenizer(tiny.make_model(tmp_path / "model"), templates.QWEN_3)
    (model / "model.safetensors").unlink()
    chat = turns("하늘은?", "파랗다.", "바다는?", "푸르다.")
    chat["messages"][1]["reasoning_content"] = "글쎄"
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(c) + "\n" for c in (chat, turns("a", "b"), turns("c", "d"))))
    shutil.copy(file, tmp_path / "valid.jsonl")
    ended = call("--show-texts", 2, "--mask-prompt", "--model", model, "--data", tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.split(f"--- {file}, line ")[1:]
    head, text = first.split("\n", 1)
    assert head.startswith("1: ")
    assert "the template leaves out the reasoning_content of message 2" in head
    assert text == (
        "<|im_start|>user\n하늘은?<|im_end|>\n<|im_start|>assistant\n⟦파랗다.<|im_end|>\n⟧"
        "<|im_start|>user\n바다는?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\n푸르다.<|im_end|>\n<|endoftext|>⟧\n"
    )
    assert "b<|im_end|>" in second and "d<|im_end|>" not in second


def test_texts_that_are_held_out_of_training_are_not_shown(
    call: Run, model: Path, tmp_path: Path
) -> None:
    tiny.write_jsonl(tmp_path, "train", [f"text {i}" for i in range(40)])
    ended = call("--show-texts", 40, "--model", model, "--data", tmp_path)
    assert "so 2 of the 40 texts in train.jsonl" in ended.stderr
    assert ended.stdout.count("---") == 38


def test_what_is_cut_is_told(call: Run, model: Path, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path, "train", ["0123456789"])
    ended = call("--show-texts", 1, "--model", model, "--data", tmp_path, "--max-seq-length", 4)
    assert "line 1: 4 tokens, 3 of them learnt; cut at --max-seq-length\n0⟦123⟧\n" in ended.stdout


def test_on_a_terminal_what_counts_is_in_colour(model: Path, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path, "train", ["012"])
    args = ["--show-texts", "1", "--model", model, "--data", tmp_path]
    status, shown = on_terminal(sys.executable, ROOT / "train_lora.py", *args)
    assert status == 0
    assert b"0\x1b[32m12<|endoftext|>\x1b[0m" in shown
