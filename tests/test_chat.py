"""Chats: what of them is learnt, in all the forms that people have them in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import NamedTuple

import models
import templates
import tiny
import train_lora
from conftest import ROOT, Ended, Run, one_error
from lora_finetune.base.errors import UserError
from lora_finetune.run import checkpoint
from lora_finetune.run.config import read_config
from lora_finetune.run.run import open_run
from lora_finetune.texts import batching, chat, dataset, tokenizing
from lora_finetune.training.distributed import ALONE
from test_tokenizing import TOKENIZERS, build

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, processors

CASES = ROOT / "tests" / "cases"


def test_a_function_call_in_sharegpt_is_a_tool_call(learn: Learn) -> None:
    call = json.dumps({"name": "기온", "arguments": {"도시": "제주"}}, ensure_ascii=False)
    said = [("human", "제주는?"), ("function_call", call), ("observation", "21"), ("gpt", "21도.")]
    entry = {"conversations": [{"from": role, "value": text} for role, text in said]}
    [learnt] = learn(templates.LLAMA_3, entry, mask=True)
    assert learnt.counted == [
        '{"name": "기온", "parameters": {"도시": "제주"}}<|eot|>',
        "21도.<|eot|>",
    ]
    said = "{{ m.tool_calls[0].type if m.tool_calls else m.content }} "
    typed = f"{{% for m in messages %}}{said}{{% endfor %}}"
    assert learn(typed, entry)[0].text == "제주는? function 21 21도. "  # as DeepSeek's V3 wants it


def test_null_columns_beside_those_of_a_kind_do_not_matter(learn: Learn) -> None:
    nulls = {"messages": None, "conversations": None, "prompt": None, "tools": None}
    assert learn(templates.CHATML, {"text": "물은?", **nulls})[0].text == "물은?"


USER = {"role": "user", "content": "물은?"}
CASE_TEMPLATES = json.loads((CASES / "templates.json").read_text(encoding="utf-8"))
BOS = 258


def write_tokenizer(folder: Path, template: str | None, adds_bos: bool = False) -> Path:
    """Give a model folder a chat template, and the token <s>, put before each text or not."""
    file = str(folder / "tokenizer.json")
    backend = Tokenizer.from_file(file)
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    backend.save(file)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"chat_template": template, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A model folder with one of the chat templates."""

    def make_model(template: str | None, adds_bos: bool = False) -> Path:
        folder = tmp_path / "model"
        return write_tokenizer(
            folder if folder.exists() else tiny.make_model(folder), template, adds_bos
        )

    return make_model


class Learnt(NamedTuple):
    """The text of an example, and the parts of it that the loss counts."""

    text: str
    counted: list[str]


Learn = Callable[..., list[Learnt]]


@pytest.fixture
def learn(tmp_path: Path, make_model: MakeModel) -> Learn:
    """What is learnt of some entries, or of a file of them, with a chat template."""

    def learn(template: str, *entries: dict | Path, mask: bool = False) -> list[Learnt]:
        tokenizer = models.load(str(make_model(template)))[1]
        file = tmp_path / "train.jsonl"
        if isinstance(entries[0], Path):
            file.write_bytes(entries[0].read_bytes())
        else:
            file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        read = {"train": dataset.read(file, mask)}
        template = chat.template_of(tokenizer)
        examples = tokenizing.load(read, tokenizer, template, 300, False, mask, 9999)["train"]
        return [learnt_of(examples, row, tokenizer) for row in range(len(examples))]

    return learn


def learnt_of(examples: batching.Examples, row: int, tokenizer: TokenizerWrapper) -> Learnt:
    part = slice(*examples.starts[row : row + 2])
    tokens, marks = examples.tokens[part].tolist(), examples.is_target[part].tolist()
    counted, before = [], False
    for token, mark in zip(tokens, marks, strict=True):
        if mark and not before:
            counted.append([])
        if mark:
            counted[-1].append(token)
        before = mark
    return Learnt(tokenizer.decode(tokens), [tokenizer.decode(some) for some in counted])


def turns(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> dict:
    """A chat in which the roles take turns."""
    messages = [
        {"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)
    ]
    return {"messages": messages}


# --- The forms that messages have ---------------------------------------------------------------


def test_text_parts_of_a_content_are_joined(learn: Learn) -> None:
    first, second = learn(CASE_TEMPLATES["plain"], CASES / "messages-parts.jsonl")
    assert first.text == "[user] Which river runs through Seoul?\n[assistant] The Han river.\n"
    assert second.text == (
        "[user] 한글은 누가 만들었습니까?\n[assistant] 세종대왕이 만들었습니다.\n"
    )


def test_arguments_of_a_tool_call_in_a_string_are_an_object_to_the_template(learn: Learn) -> None:
    [learnt] = learn(CASE_TEMPLATES["tools"], CASES / "messages-tool-call.jsonl")
    assert learnt.text == (
        "<user>How warm is it in Jeju?</user><assistant>"
        '<call>temperature {"city": "Jeju", "unit": "celsius"}</call></assistant>'
    )


@pytest.mark.parametrize("arguments", ['{"도시": "제주"}', {"도시": "제주"}])
def test_tools_and_calls_are_learnt_as_a_string_or_as_objects(
    learn: Learn, arguments: object
) -> None:
    tool = {"type": "function", "function": {"name": "기온"}}
    call = {"function": {"name": "기온", "arguments": arguments}}
    entry = {
        "messages": [
            {"role": "user", "content": "제주는?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "21", "tool_calls": None},
        ],
        "tools": json.dumps([tool]) if isinstance(arguments, str) else [tool],
    }
    [learnt] = learn(templates.QWEN_2_5, entry)
    assert learnt.text == (
        "<|im_start|>system\nBe helpful.<|im_end|>\n"
        '<tool>{"type": "function", "function": {"name": "기온"}}</tool>\n'
        "<|im_start|>user\n제주는?<|im_end|>\n<|im_start|>assistant\n\n<tool_call>\n"
        '{"name": "기온", "arguments": {"도시": "제주"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n21<|im_end|>\n"
    )


@pytest.mark.parametrize("arguments", [{"arguments": a} for a in ("", " ", "{}", {}, None)] + [{}])
def test_a_tool_call_without_arguments_has_an_empty_object_of_them(
    learn: Learn, arguments: dict
) -> None:
    entry = turns("몇 시?", "")
    entry["messages"][1]["tool_calls"] = [{"function": {"name": "now", **arguments}}]
    [learnt] = learn(templates.QWEN_2_5, entry)
    assert '{"name": "now", "arguments": {}}' in learnt.text


@pytest.mark.parametrize("content", ["", None])
def test_a_function_call_of_earlier_exports_is_a_tool_call(
    learn: Learn, content: str | None
) -> None:
    call = {"name": "기온", "arguments": '{"도시": "제주"}'}
    said = {"role": "assistant", "content": content, "function_call": call}
    [learnt] = learn(templates.QWEN_2_5, {"messages": [USER, said]})
    assert '{"name": "기온", "arguments": {"도시": "제주"}}\n</tool_call>' in learnt.text


@pytest.mark.parametrize("system", ["message", "beside"])
def test_sharegpt_is_read_like_messages(learn: Learn, system: str) -> None:
    said = [("human", "물은?"), ("gpt", "H2O."), ("tool", "끝"), ("gpt", "네.")]
    if system == "message":
        said.insert(0, ("system", "짧게."))
    entry = {"conversations": [{"from": role, "value": text} for role, text in said]}
    entry |= {"system": "짧게."} if system == "beside" else {}
    [learnt] = learn(templates.CHATML, entry, mask=True)
    assert learnt.text == (
        "<|im_start|>system\n짧게.<|im_end|>\n<|im_start|>user\n물은?<|im_end|>\n"
        "<|im_start|>assistant\nH2O.<|im_end|>\n<|im_start|>tool\n끝<|im_end|>\n"
        "<|im_start|>assistant\n네.<|im_end|>\n"
    )
    assert learnt.counted == ["H2O.<|im_end|>\n", "네.<|im_end|>\n"]


@pytest.mark.parametrize(
    ("message", "mentions"),
    [
        ({"role": "user", "content": {"a": 1}}, "content is not a string, but {'a': 1}"),
        ({"role": "user", "content": {"text": "a"}}, "content is not a string, but {'text': 'a'}"),
        ({"role": "user", "content": None}, "has no content"),
        ({"role": "assistant"}, "has no content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "a"}]},
            "other than text: {'type': 'image_url'",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": 1}]},
            "other than text: {'type': 'text', 'text': 1}",
        ),
        ({"role": "user", "content": ["a"]}, "content is not a string, but ['a']"),
        ({"role": 3, "content": "a"}, "has no role"),
        ({"content": "a"}, "has no role"),
        ({"from": "bot", "value": "a"}, 'from "bot"'),
        ({"from": "human"}, "has no content"),
        ({"role": "assistant", "tool_calls": "a"}, "tool_calls are not a list"),
        ({"role": "assistant", "tool_calls": [{"arguments": "{"}]}, "not JSON"),
        ({"role": "assistant", "tool_calls": [{"arguments": "[]"}]}, "not an object"),
        ({"role": "assistant", "tool_calls": [{"function": "a"}]}, "not an object"),
        ({"from": "function_call", "value": "a"}, "not JSON"),
        ({"from": "function_call", "value": "[1]"}, "not an object"),
        ({"role": "assistant", "tool_calls": [{"arguments": [1]}]}, "not an object"),
        ({"role": "assistant", "tool_calls": [{"arguments": 1}]}, "not an object"),
    ],
)
def test_a_message_that_is_none_is_named_before_the_model_is_loaded(
    call: Run, tmp_path: Path, message: dict, mentions: str
) -> None:
    file = tmp_path / "train.jsonl"
    entries = [{"messages": [USER, USER]}, {"messages": [USER, message]}]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    ended = call("--model", tmp_path, "--data", tmp_path, "--train")
    one_error(ended, f"{file}, line 2: message 2 of its messages", mentions)


@pytest.mark.parametrize("tools", ["[", '"a"', [1], {"name": "a"}])
def test_tools_that_are_none_are_named(tmp_path: Path, call: Run, tools: object) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"messages": [USER], "tools": tools}) + "\n")
    one_error(call("--model", tmp_path, "--data", tmp_path, "--train"), "line 1", '"tools"')


# --- Nothing vanishes in silence ----------------------------------------------------------------


@pytest.fixture
def train_on(call: Run, make_model: MakeModel, tmp_path: Path) -> Callable[[str, str], Ended]:
    """A run that trains on a file of the cases, with one of their templates."""

    def train_on(case: str, template: str) -> Ended:
        for split in ("train", "valid"):
            (tmp_path / f"{split}.jsonl").write_bytes((CASES / case).read_bytes())
        args = ["--train", "--lora-layers", 1, "--batch-size", 2, "--iters", 1]
        args += ["--model", make_model(CASE_TEMPLATES[template]), "--data", tmp_path]
        return call(*args, "--adapter-file", tmp_path / "a.npz")

    return train_on


def test_a_message_that_the_template_shows_nowhere_is_an_error(
    train_on: Callable[[str, str], Ended], tmp_path: Path
) -> None:
    ended = train_on("messages-unknown-role.jsonl", "roles")
    error = one_error(ended, f"{tmp_path / 'train.jsonl'}, line 2", "message 2", '"bot"')
    assert "nowhere" in error
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("template", "role"),
    [(templates.ZEPHYR, "gpt"), (templates.ZEPHYR, "Assistant"), (templates.R1, "tool")],
)
@pytest.mark.parametrize(
    "said", ["물은?", "ser", "H2O입니다."], ids=["as before", "markup", "other"]
)
def test_a_role_that_the_template_is_silent_on_is_an_error_whatever_it_says(
    learn: Learn, template: str, role: str, said: str
) -> None:
    entry = {"messages": [USER, {"role": role, "content": said}]}
    with pytest.raises(dataset.UserError, match=f'line 2: .*message 2, of the role "{role}"'):
        learn(template, turns("물은?", "H2O."), entry)


def test_a_second_message_with_the_words_of_a_first_does_not_stand_for_it(learn: Learn) -> None:
    """Here the template shows a system message where it is the first alone."""
    template = (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    entry = turns("짧게", "물은?", "짧게", "H2O", roles=("system", "user", "system", "assistant"))
    with pytest.raises(dataset.UserError, match='line 1: .*message 3, of the role "system"'):
        learn(template, entry)


def test_reasoning_that_the_template_cuts_off_is_told_once(
    train_on: Callable[[str, str], Ended],
) -> None:
    ended = train_on("messages-reasoning.jsonl", "answer-only")
    assert ended.returncode == 0
    warnings = ended.stderr.splitlines()
    for line, split in zip(warnings, ("train", "valid"), strict=True):
        assert f"{split}.jsonl: " in line
        assert "cuts or drops a message in 1 of 2 texts, the first in line 1" in line


REASONED = "<think>\n12 * 8 = 96\n</think>\n\n96"
CALL = [{"function": {"name": "sum", "arguments": {"of": "twelve"}}}]


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (templates.R1, [USER, {"role": "assistant", "content": REASONED}]),
        (templates.QWEN_3, [*turns("a?", REASONED, "b?", "c")["messages"]]),
        (templates.CHATML, [USER, {"role": "assistant", "content": "a", "reasoning_content": "b"}]),
        (templates.CHATML, [USER, {"role": "assistant", "content": "a", "tool_calls": CALL}]),
        (
            templates.LLAMA_3,
            [USER, {"role": "assistant", "content": "네, 잠시만.", "tool_calls": CALL}],
        ),
    ],
    ids=["R1", "an earlier answer", "reasoning_content", "tool calls", "beside a tool call"],
)
def test_a_message_of_which_a_part_is_left_out_is_learnt_with_a_warning(
    learn: Learn, capsys: pytest.CaptureFixture, template: str, messages: list[dict]
) -> None:
    whole = {"messages": [USER, {"role": "assistant", "content": "네"}]}
    assert len(learn(template, whole, {"messages": messages})) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "cuts or drops a message in 1 of 2 texts, the first in line 2" in told


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_a_content_is_told_of_by_each_of_its_names(
    learn: Learn, capsys: pytest.CaptureFixture, name: str
) -> None:
    learn(templates.CHATML, {"messages": [USER, {"role": "assistant", "content": "a", name: "b"}]})
    assert "cuts or drops a message in 1 of 1 texts" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "told"), [("ChatML", 1), ("Qwen 2.5", 0)])
def test_tools_that_the_template_leaves_out_are_told_of(
    learn: Learn, capsys: pytest.CaptureFixture, name: str, told: int
) -> None:
    tool = {"type": "function", "function": {"name": "기온"}}
    learn(templates.ALL[name], turns("a?", "b") | {"tools": [tool]})
    assert capsys.readouterr().err.count("cuts or drops") == told


@pytest.mark.parametrize("name", templates.ALL)
def test_a_blank_message_is_no_loss(learn: Learn, capsys: pytest.CaptureFixture, name: str) -> None:
    learn(templates.ALL[name], turns(" \n", "네.", "", "b"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", templates.ALL)
def test_what_templates_trim_and_wrap_is_no_loss(
    learn: Learn, capsys: pytest.CaptureFixture, name: str
) -> None:
    learn(templates.ALL[name], turns(" 물은? \n", "\nH2O.\n\n1", "물은?", "H2O."))
    assert capsys.readouterr().err == ""


def test_what_a_tool_answers_may_be_shown_as_json(
    learn: Learn, capsys: pytest.CaptureFixture
) -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": CALL}
    entry = {"messages": [USER, calls, {"role": "tool", "content": '{"a":\n"b"}'}]}
    assert '"{\\"a\\":\\n\\"b\\"}"' in learn(templates.LLAMA_3, entry)[0].text
    assert capsys.readouterr().err == ""


def test_a_chat_of_thousands_of_messages_is_looked_through_in_little_time(learn: Learn) -> None:
    start = time.perf_counter()
    learn(templates.CHATML, turns(*(f"{i}번째 물음과 답입니다." for i in range(4000))))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["Llama 3", "Qwen 2.5"])
def test_what_is_said_and_is_an_argument_too_is_no_loss(
    learn: Learn, capsys: pytest.CaptureFixture, name: str
) -> None:
    """As it is in one place, and as JSON in another."""
    said = 'Find "한글"\nand\tmore'
    call = {"function": {"name": "find", "arguments": json.dumps({"query": said})}}
    entry = turns(said, "", said, said, roles=("user", "assistant", "tool", "assistant"))
    entry["messages"][1]["tool_calls"] = [call]
    learn(templates.ALL[name], entry)
    assert capsys.readouterr().err == ""


def test_reasoning_that_the_template_shows_in_its_own_lines_is_no_loss(
    learn: Learn, capsys: pytest.CaptureFixture
) -> None:
    [learnt] = learn(templates.QWEN_3, turns("a?", "<think>b</think>c"))
    assert "<think>\nb\n</think>\n\nc<|im_end|>" in learnt.text
    assert capsys.readouterr().err == ""


# --- The mask -----------------------------------------------------------------------------------


def test_the_mask_counts_the_answer_of_each_turn(learn: Learn) -> None:
    [learnt] = learn(CASE_TEMPLATES["roles"], CASES / "messages-many-turns.jsonl", mask=True)
    assert learnt.counted == ["Seoul</A>", "Tokyo</A>", "Beijing</A>"]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("ChatML", "<|im_end|>\n"),
        ("Llama 3", "<|eot|>"),
        ("Qwen 2.5", "<|im_end|>\n"),
        ("Gemma", "<end_of_turn>\n"),
        ("Zephyr", "</s>\n"),
        ("R1", "</s>"),
        ("Gemma 4", "<turn|>\n"),
    ],
)
def test_the_mask_ends_each_answer_as_the_template_does(learn: Learn, name: str, end: str) -> None:
    entry = turns("물은?", "H2O.", "불은?", "뜨겁다.", "네?")
    [learnt] = learn(templates.ALL[name], entry, mask=True)
    assert learnt.counted == [f"H2O.{end}", f"뜨겁다.{end}"]


@pytest.mark.parametrize("answer", ["<table>", "<think", "<|channel>no", "a", "b"])
@pytest.mark.parametrize(("name", "end"), [("R1", "</s>"), ("Gemma 4", "<turn|>\n")])
def test_an_answer_that_begins_as_the_mark_of_one_to_come_counts_whole(
    learn: Learn, name: str, end: str, answer: str
) -> None:
    [learnt] = learn(templates.ALL[name], turns("a?", answer, "b?", answer), mask=True)
    assert learnt.counted == [answer + end] * 2


def test_a_chat_may_begin_with_an_answer(learn: Learn) -> None:
    entry = turns("안녕?", "네?", "H2O.", roles=("assistant", "user"))
    [learnt] = learn(templates.QWEN_2_5, entry, mask=True)
    assert learnt.counted == ["안녕?<|im_end|>\n", "H2O.<|im_end|>\n"]


def test_answers_around_a_tool_call_all_count(learn: Learn) -> None:
    entry = turns("몇 도?", "", "21", "21도.", roles=("user", "assistant", "tool", "assistant"))
    entry["messages"][1]["tool_calls"] = CALL
    [learnt] = learn(templates.LLAMA_3, entry, mask=True)
    assert learnt.counted == [
        '{"name": "sum", "parameters": {"of": "twelve"}}<|eot|>',
        "21도.<|eot|>",
    ]


def test_all_answers_count_where_the_template_changes_earlier_ones(
    learn: Learn, capsys: pytest.CaptureFixture
) -> None:
    chats = [turns("a?", "b"), turns("c?", "d", "e?", "f")]
    first, second = learn(templates.QWEN_3, *chats, mask=True)
    last = "<think>\n\n</think>\n\n{}<|im_end|>\n"
    assert first.counted == [last.format("b")]
    assert second.counted == ["d<|im_end|>\n", last.format("f")]
    assert capsys.readouterr().err == ""


REFUSING = (
    "{% if messages | length > 2 and messages[1].content != 'b' %}{{ raise_exception('b!') }}"
    "{% endif %}{{ messages | length }}" + templates.CHATML
)


def test_where_no_place_is_sure_the_last_answer_alone_counts_and_that_is_told_once(
    learn: Learn, capsys: pytest.CaptureFixture
) -> None:
    chats = [turns("a?", "b"), turns("c?", "b", "e?", "f"), turns("g?", "b", "i?", "j")]
    counted = [learnt.counted for learnt in learn(REFUSING, *chats, mask=True)]
    assert counted == [[f"{said}<|im_end|>\n"] for said in "bfj"]
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "2 of 3 chats, the first in line 2" in told


def test_nothing_that_follows_the_last_answer_counts(learn: Learn) -> None:
    """Also where the template puts an answer in another way when more follows."""
    chats = [turns("a?", "b", "c?"), turns("a?", "b", "c?", "d", "e?")]
    counted = [learnt.counted for learnt in learn(templates.QWEN_3, *chats, mask=True)]
    last = "<think>\n\n</think>\n\n{}<|im_end|>\n"
    assert counted == [[last.format("b")], ["b<|im_end|>\n", last.format("d")]]


@pytest.mark.parametrize("mask", [True, False])
def test_a_last_message_that_the_template_shows_nowhere_is_an_error_with_the_mask_too(
    learn: Learn, mask: bool
) -> None:
    entry = turns("a?", "b", "c?", roles=("user", "assistant", "bot"))
    with pytest.raises(dataset.UserError, match='line 1: .*message 3, of the role "bot"'):
        learn(templates.ZEPHYR, entry, mask=mask)


def test_a_chat_without_an_answer_is_an_error_with_the_mask(learn: Learn) -> None:
    with pytest.raises(dataset.UserError, match='line 2: .*"assistant"'):
        learn(templates.CHATML, turns("a?", "b"), turns("a?"), mask=True)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_answer_counts_whatever_the_tokenizer(name: str) -> None:
    """As the tokens tell that the text has up to where each answer starts and ends."""
    text, answers = "", []
    for i in range(9):
        text += f"<U>물은 무엇 {i}? </U><A>"
        answers.append((len(text), len(text) + len(f" H2O입니다 ok{i}.")))
        text += f" H2O입니다 ok{i}.</A>\n"
    tokenizer = build(name)
    found = tokenizing.tokenize([dataset.Text(text, answers, True)], tokenizer, False, 9999)

    def number_before(place: int) -> int:
        [start] = tokenizing.encode(tokenizer, [text[:place]], True)
        return len(os.path.commonprefix([start.ids, found.tokens.tolist()]))

    expected = [i for span in answers for i in range(*map(number_before, span))]
    assert np.flatnonzero(found.is_target).tolist() == expected
    assert len(expected) > 20


# --- One beginning of text ----------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("written", ["", "<s>"])
def test_a_text_has_one_beginning_where_the_tokenizer_or_the_text_has_one(
    make_model: MakeModel, adds_bos: bool, written: str
) -> None:
    tokenizer = models.load(str(make_model(None, adds_bos)))[1]
    found = tokenizing.tokenize([dataset.Text(written + "ab")], tokenizer, False, 99)
    assert found.tokens.tolist() == [BOS] * bool(adds_bos or written) + [*b"ab"]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", templates.ALL)
def test_a_template_decides_alone_on_the_beginning_of_a_chat(
    make_model: MakeModel, name: str, adds_bos: bool
) -> None:
    tokenizer = models.load(str(make_model(templates.ALL[name], adds_bos)))[1]
    template = chat.Template(tokenizer)
    text = dataset.render(turns("a?", "b"), template, False)
    found = tokenizing.tokenize([text], tokenizer, False, 999).tokens.tolist()
    assert found.count(BOS) == templates.ALL[name].count("'<s>'")
    assert tokenizer.decode(found) == text.whole


# --- As they were meant -------------------------------------------------------------------------

TURNS = turns("하늘은?", "파랗다.", "바다는?", "푸르다.")
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("Qwen 3", "파랗다.<|im_end|>\n", f"{EMPTY_THOUGHT}푸르다.<|im_end|>\n"),
        ("Qwen 3.5", "파랗다.<|im_end|>\n", "\n</think>\n\n푸르다.<|im_end|>\n"),
        ("Gemma 4", "파랗다.<turn|>\n", "푸르다.<turn|>\n"),
        (
            "gpt-oss",
            "<|channel|>final<|message|>파랗다.<|end|>",
            "<|channel|>final<|message|>푸르다.<|return|>",
        ),
        ("Llama 4", "파랗다.<|eot|>", "푸르다.<|eot|>"),
        ("EXAONE 4", "파랗다.[|endofturn|]\n", "푸르다.[|endofturn|]\n"),
        ("R1", "파랗다.</s>", "푸르다.</s>"),
        ("DeepSeek V3", "파랗다.</s>", "푸르다.</s>"),
        ("Phi-3.5", "파랗다.<|end|>\n", "푸르다.<|end|>\n<|endoftext|>"),
    ],
)
def test_all_answers_count_each_with_what_closes_it(
    learn: Learn, capsys: pytest.CaptureFixture, name: str, first: str, last: str
) -> None:
    assert learn(templates.ALL[name], TURNS, mask=True)[0].counted == [first, last]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["Qwen 3", "Qwen 3.5", "gpt-oss", "EXAONE 4"])
def test_answers_that_call_a_tool_or_think_count_too(learn: Learn, name: str) -> None:
    call = {"function": {"name": "기온", "arguments": {"도시": "제주"}}}
    messages = [
        {"role": "user", "content": "제주는?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "21도."},
        {"role": "user", "content": "서울은?"},
        {"role": "assistant", "content": "모른다.", "reasoning_content": "글쎄"},
    ]
    [learnt] = learn(templates.ALL[name], {"messages": messages}, mask=True)
    called, said, last = learnt.counted
    assert "제주" in called
    assert "21도." in said
    assert "모른다." in last
    assert "글쎄" in last
    assert not any(asked in "".join(learnt.counted) for asked in ("제주는?", "서울은?"))


def agent(times: int, **thoughts: str) -> list[dict]:
    """Messages of two turns of calls, each call so many times, and an answer."""
    messages = [{"role": "user", "content": "제주는?"}]
    for name, city in (("f", "제주"), ("g", "서울")):
        call = {"function": {"name": name, "arguments": {"도시": city}}}
        messages.append(
            {"role": "assistant", "content": "", "tool_calls": [call] * times} | thoughts
        )
        messages.append({"role": "tool", "content": "21"})
    return [*messages, {"role": "assistant", "content": "21도."} | thoughts]


@pytest.mark.parametrize(
    ("name", "messages", "counted"),
    [
        (
            "gpt-oss",
            agent(2, thinking="글쎄"),
            [
                ' to=functions.f<|channel|>commentary json<|message|>{"도시": "제주"}<|call|>',
                ' to=functions.g<|channel|>commentary json<|message|>{"도시": "서울"}<|call|>',
                "<|channel|>analysis<|message|>글쎄<|end|><|start|>assistant<|channel|>final"
                "<|message|>21도.<|return|>",
            ],
        ),
        (
            "Gemma 4",
            agent(1),
            [
                '<|call>f{"도시": "제주"}<call|><turn|>\n',
                '<|call>g{"도시": "서울"}<call|><turn|>\n',
                "21도.<turn|>\n",
            ],
        ),
        (
            "gpt-oss",
            turns("a", "b", "c", roles=("assistant", "user"))["messages"],
            ["<|channel|>final<|message|>a<|end|>", "<|channel|>final<|message|>c<|return|>"],
        ),
        (
            "gpt-oss",
            turns("a", "b", "c", "d", "e", roles=("user", *["assistant"] * 2))["messages"],
            [f"<|channel|>final<|message|>{a}" for a in ("b<|end|>", "c<|end|>", "e<|return|>")],
        ),
    ],
    ids=["calls with thoughts", "calls", "an answer first", "two answers in turn"],
)
def test_each_turn_counts_from_its_opening_to_its_end(
    learn: Learn, name: str, messages: list[dict], counted: list[str]
) -> None:
    assert learn(templates.ALL[name], {"messages": messages}, mask=True)[0].counted == counted


@pytest.mark.parametrize("name", templates.ALL)
def test_a_message_of_weight_0_is_not_learnt(learn: Learn, name: str) -> None:
    case, template = CASES / "chat-weight.jsonl", templates.ALL[name]
    [answer] = learn(template, case, mask=True)[0].counted
    assert "맞은답2" in answer
    assert "다시" not in answer
    rest = "".join(learn(template, case)[0].counted)
    assert "틀린답3" not in rest
    assert all(said in rest for said in ("+1은?", "다시 보세요", "맞은답2"))


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}]
)
@pytest.mark.parametrize("mask", [True, False])
def test_each_mark_says_what_is_not_learnt(learn: Learn, mark: dict, mask: bool) -> None:
    chat = turns("a?", "b", "c?", "d")
    chat["messages"][1] |= mark
    chat["messages"][3] |= dict.fromkeys(mark, True)
    counted = learn(templates.CHATML, chat, mask=mask)[0].counted
    assert counted[-1].endswith("d<|im_end|>\n")
    assert "b" not in "".join(counted)


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"loss": [0]}])
def test_a_mark_of_another_value_is_an_error(tmp_path: Path, mark: dict) -> None:
    chat = turns("a?", "b")
    chat["messages"][1] |= mark
    (tmp_path / "train.jsonl").write_text(json.dumps(turns("a?", "b")) + "\n" + json.dumps(chat))
    with pytest.raises(UserError, match=f'line 2: message 2.*"{next(iter(mark))}"'):
        dataset.read(tmp_path / "train.jsonl", False)


@pytest.mark.parametrize("mask", [True, False])
def test_a_text_of_which_nothing_is_left_is_skipped_and_counted(
    learn: Learn, capsys: pytest.CaptureFixture, mask: bool
) -> None:
    nothing = turns("c?", "d")
    for message in nothing["messages"]:
        message["weight"] = 0
    assert len(learn(templates.CHATML, nothing, turns("a?", "b"), nothing, mask=mask)) == 1
    assert "2 texts, the first in line 1, have nothing to learn" in capsys.readouterr().err


ASKING = (
    "{{ 'none' if enable_thinking is not defined else enable_thinking }}: "
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_a_row_s_arguments_go_to_the_template_and_nothing_else_does(learn: Learn) -> None:
    first, second = learn(ASKING, CASES / "chat-ctk.jsonl")
    assert first.text == second.text == "False: 수도는?서울입니다."
    as_text = turns("a", "b") | {"chat_template_kwargs": '{"enable_thinking": true}'}
    assert [x.text for x in learn(ASKING, turns("a", "b"), as_text)] == ["none: ab", "True: ab"]


def test_arguments_typed_are_for_rows_without_and_kept_for_prompts(
    call: Run, make_model: MakeModel, tmp_path: Path
) -> None:
    model, adapter = make_model(ASKING), tmp_path / "a.npz"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(TURNS) + "\n")
    args = ["--model", model, "--data", tmp_path, "--adapter-file", adapter]
    typed = ["--chat-template-args", '{"enable_thinking":  false}']
    ended = call("--train", *args, "--iters", 1, *typed)
    assert ended.returncode == 0, ended.stderr
    config = read_config(train_lora.build_parser(), [*map(str, args), "--prompt", "a"])
    run = open_run(config, {}, ALONE)
    template = train_lora.read_template(run, {}, models.load(str(model))[1])
    assert template.render(chat.Chat([USER])) == "False: 물은?"
    asked = call(*args, "--prompt", "하늘은?", "--max-tokens", 1)
    assert asked.returncode == 0, asked.stderr


@pytest.mark.parametrize("typed", ["[1]", "{", "1"])
def test_arguments_that_are_no_object_are_an_error(call: Run, typed: str) -> None:
    one_error(call("--train", "--chat-template-args", typed), "--chat-template-args")


@pytest.mark.parametrize("case", ["chat-glaive.jsonl", "chat-legacyfn.jsonl"])
def test_bare_functions_are_tools_as_openai_has_them(learn: Learn, case: str) -> None:
    text = learn(templates.QWEN_2_5, CASES / case)[0].text
    assert '<tool>{"type": "function", "function": {"name": "get_rate", ' in text
    assert '{"name": "get_rate", "arguments": {"base": "USD"}}' in text
    assert '<|im_start|>user\n{"rate": 1400}<|im_end|>' in text  # the role is tool


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]"])
def test_no_tools_are_none(learn: Learn, tools: object) -> None:
    assert "tool" not in learn(templates.QWEN_2_5, turns("a", "b") | {"tools": tools})[0].text


SHOWING = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.arguments }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (templates.QWEN_2_5, '"arguments": {"city": "서울"}}'),
        (templates.DEEPSEEK_V3, 'get_weather\n```json\n{"city": "서울"}\n```'),
        (templates.QWEN_3_5, "<parameter=city>\n서울\n</parameter>"),
        (SHOWING, '{"city": "서울"}'),
    ],
)
def test_arguments_of_calls_go_in_as_the_template_takes_them(
    learn: Learn, template: str, shown: str
) -> None:
    for learnt in learn(template, CASES / "chat-toolstr.jsonl"):
        assert shown in learnt.text
        assert "\\" not in learnt.text


def test_an_assistant_s_turn_with_nothing_in_it_is_an_error(call: Run, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes((CASES / "chat-emptyans.jsonl").read_bytes())
    one_error(call("--train", "--data", tmp_path), "line 1", "message 2")


def test_prompt_and_completion_may_be_lists_of_messages(learn: Learn) -> None:
    for mask in (True, False):
        found = learn(templates.CHATML, CASES / "chat-trlpc.jsonl", mask=mask)
        chat = turns("하늘은 왜 파래?", "빛이 흩어져서요.")
        assert found == learn(templates.CHATML, chat, mask=mask) * 2


def test_the_mask_leaves_out_the_answers_in_a_prompt_of_messages(learn: Learn) -> None:
    """As TRL does, whose prompts may show how to answer."""
    messages = turns("a?", "b", "c?", "d")["messages"]
    row = {"prompt": messages[:3], "completion": messages[3:]}
    assert learn(templates.CHATML, row, mask=True)[0].counted == ["d<|im_end|>\n"]
    assert learn(templates.CHATML, row) == learn(templates.CHATML, turns("a?", "b", "c?", "d"))


def test_the_day_of_the_first_run_stands_in_the_texts_of_a_resumed_one(
    call: Run, make_model: MakeModel, tmp_path: Path
) -> None:
    model, adapter = make_model(templates.GPT_OSS), tmp_path / "a.npz"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(TURNS) + "\n")
    args = ["--train", "--model", model, "--data", tmp_path, "--adapter-file", adapter]
    assert call(*args, "--iters", 1).returncode == 0
    state = tmp_path / "a.run" / "state.npz"
    arrays = dict(np.load(state))
    notes = json.loads(arrays["notes"].tobytes())
    assert notes["settings"][train_lora.DAY] == date.today().isoformat()
    notes["settings"][train_lora.DAY] = "2020-01-02"
    np.savez(state, **arrays | {"notes": np.frombuffer(json.dumps(notes).encode(), np.uint8)})
    ended = call(*args, "--iters", 2, "--resume-adapter-file", adapter)
    assert ended.stderr == ""
    assert checkpoint.settings_of(adapter)[train_lora.DAY] == "2020-01-02"
    tokenizer = models.load(str(model))[1]
    then = chat.Template(tokenizer, now=datetime(2020, 1, 2)).render(chat.Chat([USER]))
    assert then.startswith("<|start|>system<|message|>Date: 2020-01-02<|end|>")
    assert f"{date.today()}" in chat.Template(tokenizer).render(chat.Chat([USER]))


@pytest.mark.parametrize("content", ["text", "list"])
def test_a_template_in_chat_template_json_alone_is_the_model_s(
    make_model: MakeModel, content: str
) -> None:
    model, found = make_model(None), templates.CHATML
    if content == "list":
        found = [{"name": "default", "template": templates.CHATML}]
    (model / "chat_template.json").write_text(json.dumps({"chat_template": found}))
    tokenizer = models.load(str(model))[1]
    assert tokenizer.has_chat_template
    text = chat.Template(tokenizer).render(chat.Chat([USER]))
    assert text == "<|im_start|>user\n물은?<|im_end|>\n"


def test_a_template_for_tools_is_for_rows_with_tools(make_model: MakeModel) -> None:
    model = make_model(None)
    (model / "chat_template.jinja").write_text(templates.CHATML)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(templates.QWEN_2_5)
    template = chat.Template(models.load(str(model))[1])
    tool = {"type": "function", "function": {"name": "a"}}
    assert template.render(chat.Chat([USER], [tool])).startswith("<|im_start|>system\nBe helpful.")
    assert template.render(chat.Chat([USER])) == "<|im_start|>user\n물은?<|im_end|>\n"


# As R1's distilled models: a call is shown only where the content is null.
R1_CALLS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'tool' %}<|output|>{{ m.content }}<|/output|>"
    "{% elif m.role == 'assistant' and m['content'] is none %}<|Assistant|>"
    "{% for call in m.tool_calls %}{{ call.function.name + ' ' + call.function.arguments }}"
    "{% endfor %}</s>{% else %}<|Assistant|>{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)

# As Gemma 4: a tool's answer stands in the turn of its call, thoughts in the last turn alone.
GEMMA_4_TOOLS = (
    "{% for m in messages %}{% if m.role != 'tool' %}{% set last = loop.last %}"
    "<|turn>{{ m.role }}\n{% if m.reasoning_content and last %}<|thought|>{{ m.reasoning_content }}"
    "<thought|>{% endif %}{% for call in m.tool_calls or [] %}<|call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}<call|>{% if last %}<|response>{% else %}"
    "<|response>{{ messages[loop.index0 + 2].content }}<response|>{% endif %}{% endfor %}"
    "{{ m.content }}{% if not m.tool_calls %}<turn|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|turn>assistant\n{% endif %}"
)


def called(content: str, **more: str) -> dict:
    """A chat with a tool call, and an answer after it."""
    call = {"id": "a1", "function": {"name": "get_weather", "arguments": {"city": "서울"}}}
    answers = {"role": "assistant", "content": "", "tool_calls": [call], **more}
    tool = {"role": "tool", "content": content, "tool_call_id": "a1"}
    return {"messages": [USER, answers, tool, {"role": "assistant", "content": "맑다."}]}


def test_calls_are_shown_where_the_template_wants_no_content_beside_them(learn: Learn) -> None:
    [learnt] = learn(R1_CALLS, called("맑음"), mask=True)
    assert learnt.counted == ['get_weather {"city": "서울"}</s>', "맑다.</s>"]


def test_a_chat_whose_calls_are_not_shown_decides_nothing_for_others(
    learn: Learn, capsys: pytest.CaptureFixture
) -> None:
    beside = called("맑음")
    beside["messages"][1]["content"] = "찾아볼게."
    first, second = learn(R1_CALLS, beside, called("맑음"), mask=True)
    assert first.counted == ["찾아볼게.</s>", "맑다.</s>"]
    assert second.counted == ['get_weather {"city": "서울"}</s>', "맑다.</s>"]
    assert "drops a message in 1 of 2 texts, the first in line 1" in capsys.readouterr().err


def test_a_call_that_the_template_leaves_out_is_told_of_though_its_name_is_there(
    learn: Learn, capsys: pytest.CaptureFixture
) -> None:
    chat = called("맑음") | {"tools": [{"name": "get_weather"}]}
    chat["messages"][1]["tool_calls"] *= 2
    learn(templates.GPT_OSS, chat)
    assert "drops a message in 1 of 1 texts" in capsys.readouterr().err


def test_what_a_chat_says_in_python_s_words_does_not_change_its_calls(learn: Learn) -> None:
    for learnt in learn(templates.QWEN_2_5, called("{'city': '서울'}: 맑음"), called("비")):
        assert '"arguments": {"city": "서울"}}' in learnt.text


def test_the_answer_of_a_tool_is_not_learnt_within_the_turn_of_its_call(learn: Learn) -> None:
    [learnt] = learn(GEMMA_4_TOOLS, called("맑음", reasoning_content="글쎄"), mask=True)
    said = "".join(learnt.counted)
    assert '<|call>get_weather{"city": "서울"}<call|>' in said
    assert "맑다.<turn|>" in said
    assert "맑음" not in said


def test_what_a_template_puts_behind_the_answer_to_a_call_is_told(
    learn: Learn, capsys: pytest.CaptureFixture
) -> None:
    """The last answer counts; not a part of the first one, in silence."""
    chat = called("맑음")
    chat["messages"][1]["content"] = "찾아볼게."
    [learnt] = learn(GEMMA_4_TOOLS, chat, mask=True)
    assert [said.endswith("맑다.<turn|>\n") for said in learnt.counted] == [True]
    assert "in 1 of 1 chats, the first in line 1, the places of some" in capsys.readouterr().err


def test_a_message_of_weight_0_of_which_some_stands_elsewhere_is_an_error(learn: Learn) -> None:
    chat = called("맑음", weight=0)
    chat["messages"][1]["content"] = "찾아볼게."
    assert "찾아볼게." not in "".join(learn(GEMMA_4_TOOLS, chat, mask=True)[0].counted)
    with pytest.raises(UserError, match="line 1: message 2 is not to be learnt"):
        learn(GEMMA_4_TOOLS, chat)


def test_arguments_that_all_rows_have_are_kept_for_prompts(
    call: Run, make_model: MakeModel, tmp_path: Path
) -> None:
    model, adapter = make_model(ASKING), tmp_path / "a.npz"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_bytes((CASES / "chat-ctk.jsonl").read_bytes())
    args = ["--model", model, "--data", tmp_path, "--adapter-file", adapter]
    assert call("--train", *args, "--iters", 1).returncode == 0
    config = read_config(train_lora.build_parser(), [*map(str, args), "--prompt", "a"])
    run = open_run(config, {}, ALONE)
    template = train_lora.read_template(run, {}, models.load(str(model))[1])
    assert template.render(chat.Chat([USER])) == "False: 물은?"
