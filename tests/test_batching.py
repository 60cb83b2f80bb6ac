"""The datasets and batches, for any data that there might be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import models
from lora_finetune.texts import batching, dataset, tokenizing

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=300).map(np.array)
BATCH_SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**31 - 1)
TEXTS = st.lists(st.text(min_size=1).filter(str.strip), min_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> TokenizerWrapper:
    return models.load(str(model))[1]


def make_examples(lengths: np.ndarray) -> batching.Examples:
    """Examples of the given lengths that hold 1, 2, 3 and so on, so that each token is known."""
    tokens = np.arange(1, 1 + lengths.sum(), dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return batching.Examples(tokens, starts, tokens % 3 > 0)


def read_texts(file: Path) -> list[str]:
    return [row["text"] for _, row in dataset.read(file, mask_prompt=False).rows]


def tokenize(
    tokenizer: TokenizerWrapper, texts: list[str], end: bool, max_length: int = 9999
) -> batching.Examples:
    return tokenizing.tokenize(map(dataset.Text, texts), tokenizer, end, max_length)


# --- Reading ------------------------------------------------------------------------------------


@given(TEXTS, st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf"]), st.booleans(), st.booleans())
def test_any_text_is_read_as_it_was_written(
    folder: Path, texts: list[str], ascii_only: bool, mark: bytes, windows: bool, ended: bool
) -> None:
    file = folder / "train.jsonl"
    end = b"\r\n" if windows else b"\n"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only).encode() for text in texts]
    file.write_bytes(mark + end.join(lines) + (end if ended else b""))
    assert read_texts(file) == texts


@given(TEXTS)
def test_other_fields_and_blank_lines_are_passed_over(folder: Path, texts: list[str]) -> None:
    file = folder / "train.jsonl"
    entries = [json.dumps({"id": i, "text": text, "tags": []}) for i, text in enumerate(texts)]
    file.write_text("\n" + "\n\n  \n".join(entries) + "\n\n", encoding="utf-8")
    assert read_texts(file) == texts


@given(TEXTS, st.booleans())
def test_the_tokens_of_each_text_are_its_own_and_one_end(
    tokenizer: TokenizerWrapper, texts: list[str], end: bool
) -> None:
    examples = tokenize(tokenizer, texts, end)
    assert len(examples) == len(texts)
    for text, start, stop in zip(texts, examples.starts[:-1], examples.starts[1:], strict=True):
        expected = [*text.encode(), *([tokenizer.eos_token_id] if end else [])]
        assert examples.tokens[start:stop].tolist() == expected


@given(TEXTS, st.booleans(), st.integers(2, 20))
def test_long_texts_are_cut_and_counted_and_short_ones_left_alone(
    tokenizer: TokenizerWrapper, texts: list[str], end: bool, longest: int
) -> None:
    whole, kept = (tokenize(tokenizer, texts, end, m) for m in (9999, longest))
    assert whole.num_truncated == 0
    assert kept.num_truncated == sum(whole.lengths > longest)
    assert len(kept) == len(whole)
    for i, length in enumerate(whole.lengths):
        before = whole.tokens[whole.starts[i] :][: min(length, longest)]
        assert kept.tokens[kept.starts[i] : kept.starts[i + 1]].tolist() == before.tolist()


# --- Batches ------------------------------------------------------------------------------------


@given(LENGTHS, BATCH_SIZES, SEEDS)
def test_an_epoch_is_every_example_exactly_once(
    lengths: np.ndarray, batch_size: int, seed: int
) -> None:
    batches = batching.epoch_batches(lengths, batch_size, seed, 0)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))


@given(LENGTHS, BATCH_SIZES, SEEDS)
def test_all_batches_are_full_but_one(lengths: np.ndarray, batch_size: int, seed: int) -> None:
    batches = batching.epoch_batches(lengths, batch_size, seed, 0)
    short = [len(batch) for batch in batches if len(batch) != batch_size]
    assert len(batches) == math.ceil(len(lengths) / batch_size)
    assert short == ([len(lengths) % batch_size] if len(lengths) % batch_size else [])


@given(LENGTHS, BATCH_SIZES, SEEDS, st.integers(0, 20))
def test_training_can_start_at_any_iteration_of_a_run(
    lengths: np.ndarray, batch_size: int, seed: int, start: int
) -> None:
    """Its batches are those that the run would have come to, through the ends of epochs too."""
    examples = make_examples(lengths)
    whole = batching.training_batches(examples, batch_size, seed, 0)
    for _ in range(start):
        next(whole)
    part = batching.training_batches(examples, batch_size, seed, start)
    for _ in range(3):
        for expected, found in zip(*next(whole), *next(part), strict=True):
            assert np.array_equal(expected, found)


def test_another_seed_and_another_epoch_deal_other_batches() -> None:
    lengths = np.arange(1, 101)
    first = batching.training_batches(make_examples(lengths), 10, 1, 0)
    again = batching.training_batches(make_examples(lengths), 10, 1, 10)
    other = batching.training_batches(make_examples(lengths), 10, 2, 0)
    deals = [[next(batches)[0][1].tolist() for _ in range(10)] for batches in (first, again, other)]
    assert deals[0] != deals[1] != deals[2] != deals[0]


@given(LENGTHS, BATCH_SIZES, st.integers(1, 20) | st.just(-1))
def test_evaluation_sees_the_first_examples_once_each(
    lengths: np.ndarray, batch_size: int, number: int
) -> None:
    batches = batching.evaluation_batches(make_examples(lengths), batch_size, number)
    expected = len(lengths) if number == -1 else min(len(lengths), number * batch_size)
    assert sorted(np.concatenate(batches)) == list(range(expected))
    assert max(map(len, batches)) <= batch_size


@given(LENGTHS, st.data())
def test_a_batch_holds_its_texts_from_the_left_and_what_of_them_counts(
    lengths: np.ndarray, draw: st.DataObject
) -> None:
    examples = make_examples(lengths)
    rows = draw.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=20))
    tokens, is_target = map(np.array, examples.batch(np.array(rows)))
    assert (is_target == (tokens % 3 > 0)).all()
    assert tokens.shape[0] == len(rows)
    assert tokens.shape[1] >= max(lengths[rows])
    for row, number in zip(tokens, rows, strict=True):
        first = int(examples.starts[number]) + 1
        real = lengths[number]
        assert row[:real].tolist() == list(range(first, first + real))
        assert not row[real:].any()


@pytest.mark.parametrize(("device", "multiple", "share"), [(mx.cpu, 8, 16), (mx.gpu, 32, 4)])
def test_padding_adds_less_than_a_step_and_at_most_a_share(
    monkeypatch: pytest.MonkeyPatch, device: mx.DeviceType, multiple: int, share: int
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: device)
    padded = [batching.padded_length(length) for length in range(1, 5000)]
    assert padded == sorted(padded)
    for length, found in enumerate(padded, 1):
        assert found % multiple == 0
        assert 0 <= found - length < max(multiple, length / share)


@pytest.mark.parametrize(("device", "most"), [(mx.cpu, 96), (mx.gpu, 24)])
def test_bucketing_limits_the_number_of_widths(
    monkeypatch: pytest.MonkeyPatch, device: mx.DeviceType, most: int
) -> None:
    """Since the compiled step is made anew for each of them."""
    monkeypatch.setattr(mx, "default_device", lambda: device)
    assert len({batching.padded_length(length) for length in range(1, 2049)}) <= most
