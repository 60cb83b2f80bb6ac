"""Texts far longer than --max-seq-length: their first tokens, exactly, and little memory for it."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import tiny
from conftest import ROOT, Run
from lora_finetune.texts import dataset, tokenizing

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

END = "<|im_end|>"
KOREAN = [
    json.loads(line)["text"]
    for line in (ROOT / "lora_finetune" / "data" / "valid.jsonl").read_text("utf-8").splitlines()
]
EVERYTHING = " ".join(KOREAN)


# --- Tokenizers ---------------------------------------------------------------------------------


def train(model: type, trainer: type, normalizer=None, pre_tokenizer=None, **options) -> Tokenizer:
    """A tokenizer of 900 tokens, learnt from Korean texts."""
    tokenizer = Tokenizer(model(**options))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    if model is not models.BPE:
        options = {"unk_token": "<unk>"} if model is models.Unigram else {}
    special = ["<unk>", "[UNK]", END]
    trained = trainer(vocab_size=900, show_progress=False, special_tokens=special, **options)
    tokenizer.train_from_iterator([text[:300] for text in KOREAN], trained)
    return tokenizer


def bytes_of(*before: pre_tokenizers.PreTokenizer, words: bool) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    return pre_tokenizers.Sequence([*before, byte_level])


def sentencepiece(trained_on: pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    """A BPE that takes a whole text for one word, as those of Llama 2 and Gemma do."""
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = train(
        models.BPE, trainers.BpeTrainer, prepend, trained_on, unk_token="<unk>", fuse_unk=True
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    return tokenizer


TOKENIZERS = {
    "bytes, as Qwen": lambda: train(
        models.BPE, trainers.BpeTrainer, normalizers.NFC(), bytes_of(words=True)
    ),
    "bytes with single digits, as SmolLM": lambda: train(
        models.BPE, trainers.BpeTrainer, None, bytes_of(pre_tokenizers.Digits(True), words=True)
    ),
    "bytes across words": lambda: train(
        models.BPE, trainers.BpeTrainer, None, bytes_of(words=False)
    ),
    "whole texts, as Llama 2": lambda: sentencepiece(pre_tokenizers.Metaspace()),
    "whole texts across words": lambda: sentencepiece(None),
    "Unigram": lambda: train(
        models.Unigram, trainers.UnigramTrainer, normalizers.NFKC(), pre_tokenizers.Metaspace()
    ),
    "WordPiece": lambda: train(
        models.WordPiece,
        trainers.WordPieceTrainer,
        normalizers.BertNormalizer(strip_accents=False),
        pre_tokenizers.BertPreTokenizer(),
        unk_token="[UNK]",
    ),
}


@cache
def build(name: str) -> TokenizerWrapper:
    if name == "a slow one":
        return TokenizerWrapper(ByT5Tokenizer())
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    return TokenizerWrapper(fast)


# --- The same tokens ----------------------------------------------------------------------------

PIECES = [
    *("a", "b", "Ab", "가", "나다", "각", "1", " ", "\n", ".", "、", "é", "ﬁ"),
    *(
        "\u0301",
        "\u0323",
        "\u200b",
        "\u200d",
        "👩‍👩‍👧",
        "🇰🇷",
        END,
        "<|im",
        "_",
        "\t",
        "가 나",
        "a a",
    ),
    *(unicodedata.normalize("NFD", "각"), EVERYTHING[:700], EVERYTHING[:700].replace(" ", "")),
]
LENGTHS = st.sampled_from([1, 2, 3, 20, 3001])
RUNS = st.tuples(st.sampled_from(PIECES), LENGTHS).map(lambda run: (run[0] * run[1])[:9000])
MIXTURES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=9).map("".join)
LONG = st.tuples(MIXTURES, LENGTHS).map(lambda run: (run[0] * run[1])[:25_000])
LONG_TEXTS = st.lists(RUNS | LONG, min_size=1, max_size=4).map("".join)


def tokenize(
    name: str, text: str, prompt: int, end: bool, max_length: int
) -> tuple[list[int], int, int]:
    """The tokens of a text, how many of them are targets after its prompt, and if it was cut."""
    texts = [dataset.Text(text, [(min(prompt, len(text)), len(text))])]
    found = tokenizing.tokenize(texts, build(name), end, max_length)
    num_targets = found.is_target.sum()
    assert found.is_target[len(found.tokens) - num_targets :].all()
    return found.tokens.tolist(), int(num_targets), found.num_truncated


@pytest.mark.parametrize("name", [*TOKENIZERS, "a slow one"])
def test_the_tokens_kept_of_a_long_text_are_those_of_the_whole_text(name: str) -> None:
    @settings(max_examples=60 if name in TOKENIZERS else 10, deadline=None)
    @given(LONG_TEXTS, st.integers(2, 12), st.booleans(), st.integers(0, 30_000))
    def holds(text: str, longest: int, end: bool, prompt: int) -> None:
        # Of more marks of the end at its end than are looked at, one would be right, and no text.
        assume(not text.endswith(END * 100))
        tokens, num_targets, _ = tokenize(name, text, prompt, end, 10**6)
        kept, num_kept, cut = tokenize(name, text, prompt, end, longest)
        assert kept == tokens[:longest]
        assert num_kept == max(0, num_targets - max(0, len(tokens) - longest))
        assert cut == (len(tokens) > longest)

    holds()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "a " * 50_000,
        "가" * 99_999,
        "x" + " " * 99_999 + "y",
        "\n" * 99_999,
        "e" + "\u0301" * 99_999,
        "👩‍👩‍👧‍👦" * 9999,
        "1" * 99_999,
        EVERYTHING.replace(" ", "") * 9,
        ("\u200b" * 9999 + "b a") * 9,
        "a" + END * 9999 + "<|im_en",
    ],
    ids=lambda text: ascii(text[:5]),
)
def test_a_text_of_one_long_run_has_the_tokens_of_the_whole_text(name: str, text: str) -> None:
    tokens, *_ = tokenize(name, text, 0, False, 10**6)
    assert tokenize(name, text, 0, False, 5)[0] == tokens[:5]


def test_many_ends_at_the_end_of_a_text_are_one_and_within_it_are_kept() -> None:
    a, end, name = *build("bytes, as Qwen").encode(f"a{END}"), "bytes, as Qwen"
    assert tokenize(name, "a" + END * 99, 0, True, 8) == ([a, end], 1, 0)
    assert tokenize(name, "a" + END * 99 + "a", 0, True, 8) == ([a, *[end] * 7], 7, 1)


# --- Little time --------------------------------------------------------------------------------


def test_the_answers_of_a_long_chat_are_marked_in_little_time() -> None:
    """A thousand of them, most of which are beyond what is kept."""
    turn = EVERYTHING[:300]
    answers = [(start + 100, start + 300) for start in range(0, 300_000, 300)]
    start = time.perf_counter()
    texts = [dataset.Text(turn * 1000, answers, True)]
    found = tokenizing.tokenize(texts, build("bytes, as Qwen"), False, 2048)
    assert time.perf_counter() - start < 3
    assert len(found.tokens) == 2048
    assert 0.6 < found.is_target.mean() < 0.7


# --- Little memory ------------------------------------------------------------------------------

# Runs a script, and prints at the end how many bytes its process took at most.
PEAK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("peak", peak if sys.platform == "darwin" else 1024 * peak)
"""


@pytest.fixture(scope="module")
def peak(run: Run, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """The most memory, in bytes, that a run over some texts takes, 64 tokens kept of each."""

    def peak(texts: list[str]) -> int:
        folder = tmp_path_factory.mktemp("long")
        tiny.write_jsonl(folder, "train", texts)
        tiny.write_jsonl(folder, "valid", ["a"])
        args = ["--model", model, "--data", folder, "--adapter-file", folder / "a.npz"]
        args += ["--train", "--iters", 1, "--lora-layers", 1, "--max-seq-length", 64]
        ended = run(*args, python=("-c", PEAK), cwd=ROOT)
        assert f"Training: {len(texts)} examples" in ended.stdout, ended.stderr
        return int(ended.stdout.split()[-1])

    return peak


@pytest.fixture(scope="module")
def usual_peak(peak: Callable[..., int]) -> int:
    return peak(["a" * 64] * 10)


@pytest.mark.parametrize(
    ("text", "number"),
    [(EVERYTHING, 1), (EVERYTHING.replace(" ", ""), 1), (EVERYTHING, 300)],
    ids=["words", "no spaces", "300 texts"],
)
def test_10_mb_of_text_take_a_few_times_10_mb_of_memory(
    peak: Callable[..., int], usual_peak: int, text: str, number: int
) -> None:
    length = 4_000_000 // number
    assert peak([(text * (1 + length // len(text)))[:length]] * number) - usual_peak < 50e6
