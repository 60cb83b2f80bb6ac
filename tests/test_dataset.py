"""The kinds of examples (text, prompt and completion, messages), and what of them is learnt."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import models
import tiny
from conftest import Run, one_error
from lora_finetune.run import checkpoint
from lora_finetune.texts import batching, dataset, tokenizing
from lora_finetune.texts.chat import template_of

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset
from tokenizers import Tokenizer

settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")

# ChatML, as Qwen has it, with the tools before all, and the tiny tokenizer's end of text.
TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool.function.name }}\n{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('an unknown role: ' + message.role) }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
END = "<|endoftext|>"

PAIR = {"prompt": "물은?", "completion": "H2O입니다."}
CHAT = {
    "messages": [
        {"role": "system", "content": "짧게."},
        {"role": "user", "content": "안녕?"},
        {"role": "assistant", "content": "네."},
        {"role": "user", "content": "물은?"},
        {"role": "assistant", "content": "H2O."},
    ]
}
TEXT = {"text": "### 질문:\n물은?\n\n### 답변:\nH2O입니다."}

Tokenized = Callable[..., batching.Examples]


def make_folder(model: Path, folder: Path, template: str | None = TEMPLATE) -> Path:
    """A copy of a model folder whose tokenizer has a chat template."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def chat_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(model, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def with_template(chat_model: Path) -> TokenizerWrapper:
    return models.load(str(chat_model))[1]


@pytest.fixture(scope="module")
def without_template(model: Path) -> TokenizerWrapper:
    return models.load(str(model))[1]


def write_entries(file: Path, *entries: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def tokenized(tmp_path: Path) -> Tokenized:
    """Entries as the program has them after reading and tokenizing."""

    def tokenized(
        tokenizer: TokenizerWrapper,
        *entries: dict,
        mask: bool = False,
        end: bool = False,
        longest=999,
    ) -> batching.Examples:
        file = write_entries(tmp_path / "a.jsonl", *entries)
        texts = dataset.render_rows(dataset.read(file, mask), template_of(tokenizer), mask)
        return tokenizing.tokenize(texts, tokenizer, end, longest)

    return tokenized


def parts(examples: batching.Examples, row: int = 0) -> tuple[str, str]:
    """What of an example is passed over, and what is learnt, as text; tokens are bytes here.

    All of it is learnt where the first token alone is not, which nothing can predict.
    """
    part = slice(*examples.starts[row : row + 2])
    tokens, learnt = examples.tokens[part].tolist(), examples.is_target[part].tolist()
    if all(learnt[1:]):
        learnt[0] = True
    words = [END.encode() if token == tiny.EOS else bytes([token]) for token in tokens]
    passed_over = [word for word, is_learnt in zip(words, learnt, strict=True) if not is_learnt]
    counted = [word for word, is_learnt in zip(words, learnt, strict=True) if is_learnt]
    return b"".join(passed_over).decode(), b"".join(counted).decode()


# --- Without a mask -----------------------------------------------------------------------------


def test_a_text_is_trained_on_as_it_is(
    tokenized: Tokenized, with_template: TokenizerWrapper, without_template: TokenizerWrapper
) -> None:
    for tokenizer in (with_template, without_template):
        assert parts(tokenized(tokenizer, TEXT)) == ("", TEXT["text"])


def test_messages_go_through_the_chat_template(
    tokenized: Tokenized, with_template: TokenizerWrapper
) -> None:
    expected = (
        f"<system>짧게.{END}\n<user>안녕?{END}\n<assistant>네.{END}\n"
        f"<user>물은?{END}\n<assistant>H2O.{END}\n"
    )
    assert parts(tokenized(with_template, CHAT)) == ("", expected)
    tools = {"tools": [{"name": "calculator"}]}
    assert parts(tokenized(with_template, CHAT | tools)) == ("", f"tool calculator\n{expected}")


def test_a_prompt_and_its_completion_are_two_messages(
    tokenized: Tokenized, with_template: TokenizerWrapper
) -> None:
    expected = f"<user>물은?{END}\n<assistant>H2O입니다.{END}\n"
    assert parts(tokenized(with_template, PAIR)) == ("", expected)


def test_without_a_template_the_completion_follows_its_prompt(
    tokenized: Tokenized, without_template: TokenizerWrapper
) -> None:
    assert parts(tokenized(without_template, PAIR)) == ("", "물은?H2O입니다.")


def test_of_several_kinds_in_an_object_the_first_counts_as_in_mlx_lm(
    tokenized: Tokenized, with_template: TokenizerWrapper
) -> None:
    pair, chat = tokenized(with_template, PAIR), tokenized(with_template, CHAT)
    assert parts(tokenized(with_template, TEXT | CHAT | PAIR)) == parts(pair)
    assert parts(tokenized(with_template, TEXT | CHAT)) == parts(chat)
    assert parts(tokenized(with_template, TEXT | {"prompt": "a"})) == ("", TEXT["text"])


@pytest.mark.parametrize("mask", [False, True])
def test_the_tokens_and_the_mask_are_those_of_mlx_lm(
    tokenized: Tokenized, with_template: TokenizerWrapper, mask: bool
) -> None:
    chat = {"messages": CHAT["messages"][:3]}  # with more answers theirs learns the last alone
    theirs = [
        ChatDataset([chat], with_template, mask_prompt=mask).process(chat),
        CompletionsDataset([PAIR], with_template, "prompt", "completion", mask).process(PAIR),
    ]
    for entry, (tokens, offset) in zip([chat, PAIR], theirs, strict=True):
        ours = tokenized(with_template, entry, mask=mask)
        assert ours.tokens.tolist() == tokens
        learnt = ours.is_target[1:].tolist()
        assert learnt == [False] * max(0, offset - 1) + [True] * (len(tokens) - max(1, offset))


# --- The end of text ----------------------------------------------------------------------------


@pytest.mark.parametrize("own_end", ["<|endoftext|>\n", "<|endoftext|>", "\n", ""])
def test_templated_text_ends_in_exactly_one_end_or_as_the_template_has_it(
    tokenized: Tokenized, model: Path, tmp_path: Path, own_end: str
) -> None:
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    folder = make_folder(model, tmp_path / "model", template + own_end + "{% endfor %}")
    tokenizer = models.load(str(folder))[1]
    first = f"<user>물은?{own_end}<assistant>H2O입니다."
    assert parts(tokenized(tokenizer, PAIR)) == ("", first + own_end)
    spaced = "" if END in own_end else own_end  # which is the template's own, so it stays
    assert parts(tokenized(tokenizer, PAIR, end=True)) == ("", f"{first}{spaced}{END}")


# --- The mask -----------------------------------------------------------------------------------


def test_the_loss_is_on_the_answer_only(
    tokenized: Tokenized, with_template: TokenizerWrapper, without_template: TokenizerWrapper
) -> None:
    """The end of it too, which has to be learnt."""
    masked = tokenized(without_template, TEXT, mask=True, end=True)
    assert parts(masked) == ("### 질문:\n물은?\n\n### 답변:\n", f"H2O입니다.{END}")
    masked = tokenized(without_template, PAIR, mask=True, end=True)
    assert parts(masked) == ("물은?", f"H2O입니다.{END}")
    masked = tokenized(with_template, PAIR, mask=True, end=True)
    assert parts(masked) == (f"<user>물은?{END}\n<assistant>", f"H2O입니다.{END}")
    prompt, answer = parts(tokenized(with_template, CHAT, mask=True, end=True))
    start = f"<system>짧게.{END}\n<user>안녕?{END}\n"
    assert prompt == f"{start}<assistant><user>물은?{END}\n<assistant>"
    assert answer == f"네.{END}\nH2O.{END}"


def test_of_several_answers_in_a_text_the_last_is_trained_on(
    tokenized: Tokenized, without_template: TokenizerWrapper
) -> None:
    text = "### 질문:\n가?\n\n### 답변:\n나.\n\n### 질문:\n다?\n\n### 답변:\n라.\n\n마."
    masked = tokenized(without_template, {"text": text}, mask=True)
    assert parts(masked) == (text[: text.index("라")], "라.\n\n마.")


def test_a_last_message_of_the_user_is_not_trained_on(
    tokenized: Tokenized, with_template: TokenizerWrapper
) -> None:
    masked = tokenized(with_template, {"messages": CHAT["messages"][:4]}, mask=True, end=True)
    assert parts(masked)[1] == f"네.{END}"


def test_an_answer_to_nothing_is_trained_on_without_its_mark(
    tokenized: Tokenized, with_template: TokenizerWrapper
) -> None:
    masked = tokenized(with_template, {"messages": CHAT["messages"][2:3]}, mask=True)
    assert parts(masked) == ("<assistant>", f"네.{END}\n")


def test_a_template_that_opens_the_answer_otherwise_masks_what_is_the_same(
    tokenized: Tokenized, model: Path, tmp_path: Path
) -> None:
    """Some put an empty thought behind the assistant's mark for generation alone."""
    template = TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    folder = make_folder(model, tmp_path / "model", template)
    masked = tokenized(models.load(str(folder))[1], PAIR, mask=True)
    assert parts(masked) == (f"<user>물은?{END}\n<assistant>", f"H2O입니다.{END}\n")


def test_a_token_of_both_prompt_and_answer_is_trained_on(
    tokenized: Tokenized, model: Path, tmp_path: Path
) -> None:
    folder = make_folder(model, tmp_path / "model", None)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["bc"] = 258
    tokenizer["model"]["merges"] = [["b", "c"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    entry = {"prompt": "ab", "completion": "cd"}
    masked = tokenized(models.load(str(folder))[1], entry, mask=True)
    assert masked.tokens.tolist() == [ord("a"), 258, ord("d")]
    assert masked.is_target.tolist() == [False, True, True]


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_prompt_and_answer_together_are_the_text(
    without_template: TokenizerWrapper, prompt: str, answer: str
) -> None:
    entry = {"prompt": prompt, "completion": answer}
    text = dataset.render(entry, None, mask_prompt=True)
    masked = tokenizing.tokenize([text], without_template, add_eos=False, max_length=9999)
    assert masked.tokens.tolist() == [*(prompt + answer).encode()]
    learnt = [False] * len(prompt.encode()) + [True] * len(answer.encode())
    assert masked.is_target.tolist() == learnt
    assert masked.num_targets.tolist() == [len(answer.encode())]


def test_a_run_with_the_mask_counts_the_tokens_of_answers_alone(
    call: Run, model: Path, tmp_path: Path
) -> None:
    for split in ("train", "valid", "test"):
        write_entries(tmp_path / f"{split}.jsonl", TEXT, {"text": TEXT["text"] + "a" * 40})
    args = ["--model", model, "--data", tmp_path, "--adapter-file", tmp_path / "a.npz"]
    args += ["--train", "--test", "--lora-layers", 1, "--mask-prompt"]
    ended = call(*args)
    assert (ended.returncode, ended.stderr) == (0, "")
    entry = json.loads((tmp_path / "a.run/log.jsonl").read_text().splitlines()[1])
    answers = 2 * (len("H2O입니다.".encode()) + 1) + 40
    assert entry["tokens_per_sec"] / entry["it_per_sec"] == pytest.approx(answers)


def test_answers_lost_by_a_cut_are_counted(call: Run, model: Path, tmp_path: Path) -> None:
    long = {"text": "### 질문:\n" + "a" * 99 + "\n### 답변:\n네."}
    for split in ("train", "valid"):
        write_entries(tmp_path / f"{split}.jsonl", TEXT, TEXT, long)
    args = ["--model", model, "--data", tmp_path, "--adapter-file", tmp_path / "a.npz"]
    args += ["--train", "--lora-layers", 1, "--mask-prompt", "--max-seq-length", 64]
    ended = call(*args)
    assert ended.returncode == 0
    for line, split in zip(ended.stderr.splitlines(), ("train", "valid"), strict=True):
        assert f"{split}.jsonl: 1 of 3 texts were cut" in line
        assert "1 of all texts have nothing left to learn from" in line


# --- What is told --------------------------------------------------------------------------------


def test_numbers_and_booleans_are_learnt_as_text_and_it_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    answers = [42, 3.5, True, "넷"]
    entries = [PAIR | {"completion": answer} for answer in answers]
    file = dataset.read(write_entries(tmp_path / "train.jsonl", *entries), False)
    assert [row["completion"] for _, row in file.rows] == ["42", "3.5", "true", "넷"]
    told = capsys.readouterr().err
    assert "3 texts, the first in line 1, have a number or a boolean" in told
    assert told.count("\n") == 1

    written = tmp_path / "written.jsonl"
    written.write_text('{"prompt": "?", "completion": 1.50}\n{"prompt": "?", "completion": 1e3}')
    assert [row["completion"] for _, row in dataset.read(written, False).rows] == ["1.50", "1e3"]

    said = [{"role": "user", "content": 1}, {"role": "assistant", "content": False}]
    entries = [{"messages": said}, {"prompt": said[:1], "completion": said[1:]}]
    entries += [{"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": False}]}]
    file = dataset.read(write_entries(tmp_path / "chats.jsonl", *entries), False)
    for _, row in file.rows:
        assert [message["content"] for message in row["messages"]] == ["1", "false"]


def test_decomposed_hangul_is_warned_of_with_its_count(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    apart = {"text": unicodedata.normalize("NFD", TEXT["text"])}
    dataset.read(write_entries(tmp_path / "train.jsonl", TEXT, apart, TEXT, apart), False)
    told = capsys.readouterr().err
    assert "2 texts, the first in line 2, have decomposed Hangul" in told
    assert "prepare_lora_data.py --normalize" in told and told.count("\n") == 1


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "mentions"),
    [
        ([TEXT, TEXT, CHAT], ["line 3", "messages", "line 1 has text"]),
        ([PAIR, TEXT], ["line 2", "text", "line 1 has prompt and completion"]),
        ([CHAT, CHAT | PAIR], ["line 2", "prompt and completion", "line 1 has messages"]),
        ([{"prompt": "a"}], ["line 1", '"completion"']),
        ([{"completion": "a"}], ["line 1", '"prompt"']),
        ([PAIR, PAIR | {"completion": " \n"}], ["line 2", '"completion" is not a text']),
        ([PAIR | {"prompt": None}], ["line 1", 'has no "text"']),
        ([PAIR | {"prompt": [3]}], ["line 1", '"prompt" is not a text, but [3]']),
        ([PAIR | {"prompt": float("nan")}], ["line 1", '"prompt" is not a text, but nan']),
        ([{"contents": [{"role": "user", "parts": [{"text": "a"}]}]}], ["Gemini", '"messages": [']),
        ([{"messages": "a"}], ["line 1", '"messages" are not']),
        ([{"messages": ["a"]}], ["line 1", '"messages" are not']),
        ([{"messages": []}], ["line 1", '"messages" are not a list of messages']),
        ([CHAT, {"messages": [{"role": "cook", "content": "a"}]}], ["line 2", "role: cook"]),
        ([{"messages": [{"content": "a"}]}], ["line 1", "message 1", "has no role"]),
    ],
)
def test_entries_that_cannot_be_trained_on_are_reported_with_their_line(
    call: Run, chat_model: Path, tmp_path: Path, entries: list[dict], mentions: list[str]
) -> None:
    write_entries(tmp_path / "valid.jsonl", TEXT)
    write_entries(tmp_path / "train.jsonl", *entries)
    args = ["--model", chat_model, "--data", tmp_path, "--adapter-file", tmp_path / "a.npz"]
    ended = call(*args, "--train", "--lora-layers", 1)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path / 'train.jsonl'}, line ")
    assert ended.stderr.count("\n") == 1
    assert all(words in ended.stderr for words in mentions)


def test_messages_without_a_chat_template_are_reported(
    call: Run, model: Path, tmp_path: Path
) -> None:
    for split in ("train", "valid"):
        write_entries(tmp_path / f"{split}.jsonl", CHAT)
    args = ["--model", model, "--data", tmp_path, "--adapter-file", tmp_path / "a.npz"]
    ended = call(*args, "--train", "--lora-layers", 1)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path / 'train.jsonl'}, line 1: ")
    assert "chat template" in ended.stderr


@pytest.mark.parametrize(
    "text", ["물은 H2O.", "### 질문:\n물은?\n\n### 답변:\n ", "### 답변:\n네."]
)
def test_a_text_without_an_answer_is_reported_before_the_model_is_loaded(
    call: Run, tmp_path: Path, text: str
) -> None:
    for split in ("train", "valid"):
        write_entries(tmp_path / f"{split}.jsonl", TEXT, {"text": text})
    args = ["--model", tmp_path, "--data", tmp_path, "--adapter-file", tmp_path / "a.npz"]
    ended = call(*args, "--train", "--mask-prompt")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path / 'train.jsonl'}, line 2: for --mask-prompt")


# --- Many texts ---------------------------------------------------------------------------------


def test_texts_beyond_a_batch_of_the_tokenizer_stay_in_order(
    without_template: TokenizerWrapper,
) -> None:
    words = [f"{i} {'가' * (i % 7)}" for i in range(tokenizing.CHUNK_CHARACTERS // 20)]
    found = tokenizing.tokenize(map(dataset.Text, words), without_template, False, 9999)
    assert found.tokens.tolist() == [*"".join(words).encode()]
    assert found.lengths.tolist() == [len(word.encode()) for word in words]
    assert (found.tokens.dtype, found.is_target.dtype) == (np.int32, bool)


def test_a_tokenizer_saved_with_a_cut_or_padding_does_neither(model: Path, tmp_path: Path) -> None:
    folder = make_folder(model, tmp_path / "model", None)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    texts = [dataset.Text("abcdefg"), dataset.Text("h")]
    found = tokenizing.tokenize(texts, models.load(str(folder))[1], False, 9999)
    assert found.tokens.tolist() == [*b"abcdefgh"]


def test_a_tokenizer_with_an_encoding_of_its_own_keeps_it(model: Path, tmp_path: Path) -> None:
    """mlx-lm's NewlineTokenizer writes <n> for a line end."""
    folder = make_folder(model, tmp_path / "model", None)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "NewlineTokenizer"}
    file.write_text(json.dumps(settings))
    tokenizer = models.load(str(folder))[1]
    found = tokenizing.tokenize([dataset.Text("a\nb")], tokenizer, False, 9999)
    assert found.tokens.tolist() == tokenizer.encode("a\nb") == [*b"a<n>b"]


# --- Without valid.jsonl ------------------------------------------------------------------------

HELD = "texts in train.jsonl, chosen by their hashes, are for validation, held out of training"


def test_without_a_validation_set_one_text_in_twenty_is_held_out(
    call: Run, model: Path, tmp_path: Path
) -> None:
    """The same ones whenever the run is resumed, and in whatever order they stand."""
    texts = [f"{i}는 수입니다." for i in range(60)]
    tiny.write_jsonl(tmp_path, "train", texts)
    args = ["--train", "--model", model, "--data", tmp_path, "--adapter-file", tmp_path / "a.npz"]
    ended = call(*args, "--iters", 1, "--lora-layers", 4)
    assert ended.stderr == f"hint: there is no {tmp_path / 'valid.jsonl'}, so 3 of the 60 {HELD}\n"
    assert "Training: 57 examples" in ended.stdout
    held = checkpoint.settings_of(tmp_path / "a.npz")["the texts held out"]
    assert len(held) == 3
    more = [*reversed(texts), *(f"{i}도 수입니다." for i in range(60))]
    tiny.write_jsonl(tmp_path, "train", more)
    ended = call(*args, "--iters", 2, "--resume-adapter-file", tmp_path / "a.npz")
    assert f"so 3 of the 120 {HELD}" in ended.stderr
    assert checkpoint.settings_of(tmp_path / "a.npz")["the texts held out"] == held
    tiny.write_jsonl(tmp_path, "valid", texts[:2])
    ended = call(*args, "--iters", 3, "--resume-adapter-file", tmp_path / "a.npz")
    assert "these have changed: the texts held out\n" in ended.stderr


@pytest.mark.parametrize(
    ("number", "copies", "held"),
    [(1, 1, 1), (2, 1, 1), (39, 1, 1), (40, 1, 2), (20000, 1, 500), (100, 20, 100), (1000, 3, 150)],
)
def test_at_least_one_and_at_most_500_are_held_out(
    tmp_path: Path, number: int, copies: int, held: int
) -> None:
    texts = [str(i) for i in range(number)] * copies
    tiny.write_jsonl(tmp_path, "train", texts)
    train, valid, hashes = dataset.hold_out(dataset.read(tmp_path / "train.jsonl", False), None)
    assert len(valid.rows) == held
    assert len(train.rows) == number * copies - (held if number > 1 else 0)
    assert len(hashes) == held / copies


def test_equal_texts_are_held_out_together(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path, "train", [str(i % 7) for i in range(140)])
    train, valid, _ = dataset.hold_out(dataset.read(tmp_path / "train.jsonl", False), None)
    assert len(valid.rows) == 20
    sides = [{row["text"] for _, row in file.rows} for file in (train, valid)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set("0123456")


def test_a_test_without_test_jsonl_is_an_error(call: Run, model: Path, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path, "train", ["물", "불"])
    args = ["--model", model, "--data", tmp_path, "--adapter-file", tmp_path / "a.npz"]
    one_error(call("--train", "--test", *args), "test.jsonl")


def test_where_what_is_held_out_is_cut_to_nothing_all_texts_validate(
    call: Run, model: Path, tmp_path: Path
) -> None:
    file, shorts = tmp_path / "train.jsonl", [{"prompt": p, "completion": "나"} for p in "가다"]
    for i in range(99):  # until the long one is held out
        write_entries(file, {"prompt": f"{i}" * 100, "completion": "나"}, *shorts)
        [(number, _)] = dataset.hold_out(dataset.read(file, True), None)[1].rows
        if number == 1:
            break
    args = ["--train", "--model", model, "--data", tmp_path, "--iters", 1, "--mask-prompt"]
    ended = call(*args, "--adapter-file", tmp_path / "a.npz", "--max-seq-length", 20)
    assert ended.returncode == 0, ended.stderr
    assert "has nothing to learn, so all is validated on" in ended.stderr
    assert "Val loss 0.000" not in ended.stdout
