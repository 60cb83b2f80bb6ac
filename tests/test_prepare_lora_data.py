"""prepare_lora_data.py: questions and answers of any kind become the three sets, or one error."""

from __future__ import annotations

import csv
import json
import re
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import prepare_lora_data
from background import run_script
from conftest import ROOT, Ended, Run, listing, one_error
from lora_finetune.texts import dataset
from lora_finetune.texts.sources import find_files

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

Fails = Callable[..., str]
Sets = dict[str, list[str]]
Pairs = list[tuple[str | None, str | None]]

SCRIPT = ROOT / "prepare_lora_data.py"
SPLITS = ("train", "valid", "test")
WIDE = ["--valid-fraction", "0.3", "--test-fraction", "0.3"]  # so that a few rows fill every set
FILLERS = [(f"질문 {i}?", f"답 {i}.") for i in range(40)]


datasets.disable_progress_bars()


def properties(examples: int) -> settings:
    """As many examples as given; each makes the same files anew, so one folder does for all."""
    shared = [HealthCheck.function_scoped_fixture]
    return settings(deadline=None, max_examples=examples, suppress_health_check=shared)


@pytest.fixture
def prepare(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process, which has `datasets` already."""

    def prepare(source: Path, output: Path, *args: object) -> Ended:
        argv = [SCRIPT, "--source", source, "--output", output, *WIDE, *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        status = run_script(str(SCRIPT))
        return Ended(argv, status, *(out.decode() for out in capfdbinary.readouterr()))

    return prepare


@pytest.fixture
def makes(prepare: Run, tmp_path: Path) -> Callable[..., Sets]:
    """What the command line makes of a source, without any error or warning but of columns."""

    def makes(source: Path, *args: object) -> Sets:
        ended = prepare(source, tmp_path / "made", *args)
        assert (ended.returncode, other_warnings(ended)) == (0, [])
        return read_sets(tmp_path / "made")

    return makes


@pytest.fixture
def fails(prepare: Run, tmp_path: Path) -> Fails:
    """Run the command line, and check that it fails as it should and leaves the old sets alone."""
    output = tmp_path / "old"
    write_old_sets(output)

    def fails(source: Path, *args: object, mentions: tuple[str, ...] = ()) -> str:
        before = listing(tmp_path)
        error = one_error(prepare(source, output, *args), *mentions)
        assert listing(tmp_path) == before
        return error

    return fails


def write_old_sets(folder: Path) -> None:
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.jsonl").write_text('{"text": "old"}\n')


def read_sets(folder: Path) -> Sets:
    """The texts of the three sets, each in order."""
    made = read_bytes(folder)
    assert made.keys() == {f"{split}.jsonl" for split in SPLITS}
    return {split: read_texts(made[f"{split}.jsonl"]) for split in SPLITS}


def read_texts(content: bytes) -> list[str]:
    """The texts of a JSON Lines file, which has nothing else in it."""
    assert content.endswith(b"\n")
    entries = [json.loads(line.decode()) for line in content.split(b"\n")[:-1]]
    assert all(entry.keys() == {"text"} for entry in entries)
    return [entry["text"] for entry in entries]


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def unordered(sets: Sets) -> Sets:
    return {split: sorted(texts) for split, texts in sets.items()}


def all_of(sets: Sets) -> list[str]:
    return [text for texts in sets.values() for text in texts]


LEFT_OUT = ": columns that are left out: "


def other_warnings(ended: Ended) -> list[str]:
    """What a run warned of besides left-out columns and Hangul's form, which most sources have."""
    usual = (LEFT_OUT, "decomposed Hangul")
    return [line for line in ended.stderr.splitlines() if not any(what in line for what in usual)]


def text_of(question: str, answer: str) -> str:
    return f"### 질문:\n{question}\n\n### 답변:\n{answer}"


def counts_of(ended: Ended) -> dict[str, int]:
    """The counts that a run printed."""
    pattern = (
        r"Read (?P<rows>\d+) examples of .+: dropped (?P<empty>\d+) with an empty side, "
        r"(?P<duplicate>\d+) exact duplicates, (?P<elsewhere>\d+) whose question is in another "
        r"set\.\n(?:What .+\n)?(Wrote|Would write) to .+: (?P<train>\d+) train, "
        r"(?P<valid>\d+) valid, (?P<test>\d+) test\."
    )
    found = re.match(pattern, ended.stdout)
    assert found, ended.stdout
    return {name: int(number) for name, number in found.groupdict().items()}


# --- Writing sources ----------------------------------------------------------------------------


def table_of(pairs: Pairs) -> pa.Table:
    """Questions and answers, between columns that do not matter."""
    questions, answers = zip(*pairs, strict=True)
    columns = {
        "id": range(len(pairs)),
        "question": pa.array(questions, pa.string()),
        "answer": pa.array(answers, pa.string()),
        "note": pa.nulls(len(pairs), pa.string()),
    }
    return pa.table(columns)


def write_parquet(file: Path, table: pa.Table) -> None:
    pq.write_table(table, file)


def write_arrow(file: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def write_arrow_file(file: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(file, table.schema) as stream:
        stream.write_table(table)


def write_jsonl(file: Path, table: pa.Table) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()]
    file.write_text("".join(lines), encoding="utf-8", newline="\n")


def write_json(file: Path, table: pa.Table) -> None:
    file.write_text(json.dumps(table.to_pylist()), encoding="utf-8")


def write_csv(file: Path, table: pa.Table, encoding: str = "utf-8") -> None:
    with file.open("w", encoding=encoding, newline="") as stream:
        writer = csv.writer(stream)  # with the line ends of Windows
        writer.writerow(table.column_names)
        writer.writerows(row.values() for row in table.to_pylist())


WRITERS = {
    "parquet": write_parquet,
    "arrow": write_arrow,
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
}


def write(folder: Path, name: str, pairs: Pairs) -> Path:
    """A file of questions and answers in the format that its suffix says."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[file.suffix[1:].lower()](file, table_of(pairs))
    return file


def save(folder: Path, **splits: Pairs) -> Path:
    """A DatasetDict, as the `datasets` library saves it."""
    saved = {name: datasets.Dataset(table_of(pairs)) for name, pairs in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(folder)
    return folder


# --- Any rows that there might be ---------------------------------------------------------------

# In a pair a heading is an error.
WITHOUT_HEADINGS = st.text().filter(lambda text: not dataset.HEADINGS.search(text))
TEXTS = WITHOUT_HEADINGS.map(str.strip).filter(bool)
SIDES = st.none() | st.sampled_from(["", " \n", "\u3000", "가", " 가", "가\t", "나"])
SIDES |= WITHOUT_HEADINGS


@properties(50)
@given(st.lists(st.tuples(SIDES, SIDES), max_size=20))
def test_every_row_is_in_one_set_or_counted_as_dropped(
    prepare: Run, tmp_path: Path, pairs: Pairs
) -> None:
    pairs = [*pairs, *FILLERS]
    ended = prepare(write(tmp_path, "a.parquet", pairs), tmp_path / "out")
    trimmed = [((question or "").strip(), (answer or "").strip()) for question, answer in pairs]
    kept = [pair for pair in trimmed if all(pair)]
    sets = read_sets(tmp_path / "out")
    assert Counter(all_of(sets)) == Counter({text_of(*pair) for pair in kept})
    assert counts_of(ended) == {
        "rows": len(pairs),
        "empty": len(pairs) - len(kept),
        "duplicate": len(kept) - len(set(kept)),
        "elsewhere": 0,
        **{split: len(texts) for split, texts in sets.items()},
    }


@pytest.mark.parametrize("ready", [False, True])
@properties(50)
@given(st.lists(TEXTS | st.text("가각한글éñÅ", min_size=1), max_size=20))
def test_a_question_is_in_one_set_whatever_its_answers_and_its_unicode_form(
    makes: Callable[..., Sets], tmp_path: Path, ready: bool, questions: list[str]
) -> None:
    """With columns of questions and answers, and with a column of the whole texts."""
    pairs = [
        (unicodedata.normalize(form, question), f"{form} {number}")
        for question in [*questions, *(question for question, _ in FILLERS)]
        for form in ("NFC", "NFD")
        for number in range(2)
    ]
    if ready:
        write_parquet(tmp_path / "a.parquet", pa.table({"text": [normal(*pair) for pair in pairs]}))
    else:
        write(tmp_path, "a.parquet", pairs)
    owners = {}
    for split, texts in makes(tmp_path / "a.parquet").items():
        for text in texts:
            question = unicodedata.normalize("NFC", text).split("\n\n### 답변:\n")[0]
            assert owners.setdefault(question, split) == split
    assert len(owners) >= len(FILLERS)


def normal(question: str, answer: str) -> str:
    """A text in the Unicode form that the answer names, its headings too."""
    return unicodedata.normalize(answer[:3], text_of(question, answer))


@properties(10)
@given(st.integers(0, 2**70), st.integers(0, 2**70))
def test_a_seed_makes_the_same_bytes_again_and_another_seed_other_sets(
    prepare: Run, tmp_path: Path, seed: int, other: int
) -> None:
    assume(seed != other)
    source = write(tmp_path, "a.parquet", FILLERS)
    made = []
    for number in (seed, seed, other):
        prepare(source, tmp_path / "out", "--seed", number)
        made.append(read_bytes(tmp_path / "out"))
    assert made[0] == made[1]
    assert made[0] != made[2]


@properties(50)
@given(st.lists(st.tuples(TEXTS, TEXTS)), st.lists(st.tuples(TEXTS, TEXTS)), st.randoms())
def test_rows_that_come_later_move_no_question_to_another_set(
    makes: Callable[..., Sets], tmp_path: Path, pairs: Pairs, more: Pairs, random: st.randoms
) -> None:
    before = makes(write(tmp_path, "a.parquet", [*pairs, *FILLERS]))
    shuffled = [*pairs, *more, *FILLERS]
    random.shuffle(shuffled)
    after = makes(write(tmp_path, "a.parquet", shuffled))
    for split in SPLITS:
        assert set(before[split]) <= set(after[split])


@pytest.mark.parametrize("suffix", WRITERS)
@properties(25)
@given(st.lists(TEXTS, max_size=20, unique=True))
def test_a_ready_text_comes_back_as_it_was_written(
    makes: Callable[..., Sets], tmp_path: Path, suffix: str, texts: list[str]
) -> None:
    texts = [*texts, *(text_of(*pair) for pair in FILLERS)]
    WRITERS[suffix](tmp_path / f"a.{suffix}", pa.table({"text": texts}))
    made = makes(tmp_path / f"a.{suffix}")
    assert Counter(all_of(made)) == Counter(texts)
    for found in made.values():
        assert found == [text for text in texts if text in found]


# --- The format ---------------------------------------------------------------------------------


def test_a_text_is_the_question_and_the_answer_below_their_headings(
    makes: Callable[..., Sets], tmp_path: Path
) -> None:
    made = makes(
        write(tmp_path, "a.jsonl", [(" 왜 그럴까? \n", "\u3000첫째 줄.\n둘째 줄.\t"), *FILLERS])
    )
    assert "### 질문:\n왜 그럴까?\n\n### 답변:\n첫째 줄.\n둘째 줄." in all_of(made)


def test_the_files_are_utf_8_without_escapes(prepare: Run, tmp_path: Path) -> None:
    pair = ('"한글" \\ é', "🥬🌶️ \u2028 \ufeff\u3000끝")
    prepare(write(tmp_path, "a.json", [pair, *FILLERS]), tmp_path / "out")
    written = b"".join(read_bytes(tmp_path / "out").values())
    line = '{"text": "### 질문:\\n\\"한글\\" \\\\ é\\n\\n### 답변:\\n🥬🌶️ \u2028 \ufeff\u3000끝"}\n'
    assert line.encode() in written
    assert b"\\u" not in written
    assert b"\r" not in written


@pytest.mark.parametrize("empty", [None, "", "  ", "\n\t", "\u3000\u00a0"])
def test_rows_without_a_question_or_an_answer_are_dropped(
    prepare: Run, tmp_path: Path, empty: str | None
) -> None:
    pairs = [("a", empty), (empty, "b"), (empty, empty), *FILLERS]
    ended = prepare(write(tmp_path, "a.parquet", pairs), tmp_path / "out")
    assert counts_of(ended)["empty"] == 3
    expected = {text_of(*pair) for pair in FILLERS}
    assert set(all_of(read_sets(tmp_path / "out"))) == expected


def test_what_is_the_same_after_trimming_is_taken_once(prepare: Run, tmp_path: Path) -> None:
    pairs = [*FILLERS, *((f" {question}\n", f"{answer} ") for question, answer in FILLERS)]
    ended = prepare(write(tmp_path, "a.csv", pairs), tmp_path / "out")
    assert counts_of(ended)["duplicate"] == len(FILLERS)
    assert sorted(all_of(read_sets(tmp_path / "out"))) == sorted(text_of(*p) for p in FILLERS)


def test_a_limit_counts_what_is_taken(prepare: Run, tmp_path: Path) -> None:
    pairs = [FILLERS[0], FILLERS[0], ("", "b"), *FILLERS]
    source = write(tmp_path, "a.jsonl", pairs)
    ended = prepare(source, tmp_path / "out", "--limit", 30)
    expected = {text_of(*pair) for pair in FILLERS[:30]}
    assert set(all_of(read_sets(tmp_path / "out"))) == expected
    assert counts_of(ended)["rows"] == 33
    ended = prepare(source, tmp_path / "out", "--limit", 1000)
    assert len(all_of(read_sets(tmp_path / "out"))) == len(FILLERS)


def test_other_columns_can_be_named(makes: Callable[..., Sets], tmp_path: Path) -> None:
    table = table_of(FILLERS).rename_columns(["answer", "물음", "대답", "text"])
    write_jsonl(tmp_path / "a.jsonl", table)
    made = makes(tmp_path / "a.jsonl", "--question-column", "물음", "--answer-column", "대답")
    assert made == makes(write(tmp_path, "b.jsonl", FILLERS))


def test_ready_texts_are_split_by_their_question(
    makes: Callable[..., Sets], tmp_path: Path
) -> None:
    """And so as the same questions are where they have a column."""
    texts = [f" {text_of(*pair)}\n" for pair in FILLERS]
    write_parquet(tmp_path / "text.parquet", pa.table({"text": texts}))
    assert makes(tmp_path / "text.parquet") == makes(write(tmp_path, "a.parquet", FILLERS))


# --- What is recognized -------------------------------------------------------------------------


@pytest.fixture
def takes(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[list[str], str]]:
    """The lines that are made of a source, a text bare, and what is said of it."""

    def takes(source: Path, *flags: object) -> tuple[list[str], str]:
        args = prepare_lora_data.parse_arguments([str(flag) for flag in flags])
        notes = {}
        examples = [
            example
            for file in find_files(source)
            for example in prepare_lora_data.read_examples(file, args, notes)
        ]
        prepare_lora_data.say(notes)
        lines = [json.loads(line or "null") for _, line in examples]
        return [line and line.get("text", line) for line in lines], capsys.readouterr().err

    return takes


Takes = Callable[..., tuple[list[str], str]]


def write_text(file: Path, text: str, encoding: str = "utf-8") -> Path:
    file.write_bytes(text.encode(encoding))
    return file


def write_lines(file: Path, *rows: dict) -> Path:
    return write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def test_of_too_few_rows_a_dry_run_shows_what_was_read_before_it_ends_in_the_error(
    prepare: Run, tmp_path: Path
) -> None:
    ended = prepare(ROOT / "tests/cases/nested-rows.json", tmp_path, "--dry-run")
    assert "### 질문:\n바닷물은 왜 짭니까?\n\n### 답변:\n강물이" in ended.stdout
    one_error(ended, "leaves nothing for")


def test_alpaca_is_taken_as_it_is_the_input_below_the_instruction(takes: Takes) -> None:
    assert takes(ROOT / "tests/cases/alpaca.json") == (
        [
            "### 질문:\nTranslate into Korean.\n\nThe sea is deep.\n\n### 답변:\n바다는 깊다.",
            "### 질문:\nTranslate into Korean.\n\nThe mountain is high.\n\n### 답변:\n산은 높다.",
            "### 질문:\nName a planet.\n\n### 답변:\nSaturn",
            "### 질문:\n한국의 수도는 어디입니까?\n\n### 답변:\n서울입니다.",
        ],
        "",
    )


def test_an_object_whose_one_list_of_objects_has_the_rows_is_taken_for_them(takes: Takes) -> None:
    assert takes(ROOT / "tests/cases/nested-rows.json") == (
        [
            "### 질문:\n바닷물은 왜 짭니까?\n\n"
            "### 답변:\n강물이 땅의 염류를 녹여 바다로 나르기 때문입니다.",
            "### 질문:\n무지개는 왜 생깁니까?\n\n"
            "### 답변:\n빛이 물방울 속에서 굴절되고 반사되기 때문입니다.",
        ],
        "",
    )


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    "names", [("question", "answer"), ("instruction", "output"), ("prompt", "completion")]
)
def test_usual_columns_are_recognized_in_every_format(
    takes: Takes, tmp_path: Path, suffix: str, names: tuple[str, str]
) -> None:
    table = pa.table({names[0]: ["하늘은?", None], names[1]: ["파랗다.", "?"]})
    WRITERS[suffix](tmp_path / f"a.{suffix}", table)
    assert takes(tmp_path / f"a.{suffix}") == (
        ["### 질문:\n하늘은?\n\n### 답변:\n파랗다.", None],
        "",
    )


def test_of_several_pairs_the_first_is_taken_and_the_others_are_said(
    takes: Takes, tmp_path: Path
) -> None:
    row = {
        "id": 1,
        "text": "t",
        "prompt": "p",
        "completion": "c",
        "output": "o",
        "instruction": "i",
    }
    file = write_lines(tmp_path / "a.jsonl", row)
    said = f"warning: {file}: columns that are left out: id, text, prompt, completion"
    said += "; --question-column and --answer-column name others\n"
    assert takes(file) == (["### 질문:\ni\n\n### 답변:\no"], said)
    named = ("--question-column", "prompt", "--answer-column", "completion")
    said = f"warning: {file}: columns that are left out: id, text, output, instruction\n"
    assert takes(file, *named) == (["### 질문:\np\n\n### 답변:\nc"], said)


@pytest.mark.parametrize("before", [1, 999, 1000])
def test_json_rows_of_several_kinds_are_taken_each_as_its_own(
    takes: Takes, tmp_path: Path, before: int
) -> None:
    """As where files were put together; however many rows are read at a time."""
    rows = [{"question": f"{number}", "answer": "가"} for number in range(before)]
    others = [{"instruction": "i", "output": "o"}, {"question": "답이 없다"}, {"text": "t"}]
    made, said = takes(write_lines(tmp_path / "a.jsonl", *rows, *others))
    assert made[before:] == ["### 질문:\ni\n\n### 답변:\no", None, "t"]
    assert None not in made[:before]
    assert said == ""


@pytest.mark.parametrize("before", [1, 999, 1000])
def test_json_rows_that_lack_a_side_are_dropped_wherever_they_are(
    takes: Takes, tmp_path: Path, before: int
) -> None:
    rows = [{"question": f"{number}", "answer": "가"} for number in range(before)]
    made, _ = takes(write_lines(tmp_path / "a.jsonl", *rows, {"question": "나"}, {"answer": "다"}))
    assert made[before:] == [None, None]


def test_columns_that_are_left_out_are_said_once_for_files_that_are_alike(
    prepare: Run, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for number in range(3):
        write(source, f"{number}.jsonl", FILLERS[number * 10 : number * 10 + 10])
    said = f"warning: {source}/0.jsonl and 2 more: columns that are left out: id, note\n"
    assert prepare(source, tmp_path / "out").stderr == said
    write_lines(source / "x.jsonl", {"instruction": "i", "output": "o", "source": "s"})
    write_lines(source / "y.jsonl", {"text": "t"})
    assert prepare(source, tmp_path / "out2").stderr.splitlines() == [
        f"warning: {source}/0.jsonl and 2 more: columns that are left out: id, note",
        f"warning: {source}/x.jsonl: columns that are left out: source",
    ]
    assert len(all_of(read_sets(tmp_path / "out2"))) == 32


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_context_stands_before_the_question(takes: Takes, tmp_path: Path, suffix: str) -> None:
    table = pa.table(
        {
            "question": ["누가?", "언제?"],
            "answer": ["나.", "지금."],
            "지문": [" 글\n둘째 줄 ", None],
        }
    )
    WRITERS[suffix](tmp_path / f"a.{suffix}", table)
    assert takes(tmp_path / f"a.{suffix}", "--context-column", "지문") == (
        [
            "### 질문:\n글\n둘째 줄\n\n누가?\n\n### 답변:\n나.",
            "### 질문:\n언제?\n\n### 답변:\n지금.",
        ],
        "",
    )


def test_a_context_goes_with_alpaca_and_columns_named_by_hand(takes: Takes, tmp_path: Path) -> None:
    row = {"c": "배경", "instruction": "써라.", "input": "가", "output": "나"}
    file = write_lines(tmp_path / "a.jsonl", row)
    made = ["### 질문:\n배경\n\n써라.\n\n가\n\n### 답변:\n나"]
    assert takes(file, "--context-column", "c") == (made, "")
    named = ("--question-column", "instruction", "--answer-column", "input")
    made = ["### 질문:\n나\n\n써라.\n\n### 답변:\n가"]
    said = f"warning: {file}: columns that are left out: c\n"
    assert takes(file, *named, "--context-column", "output") == (made, said)
    file = write_lines(tmp_path / "b.jsonl", {"c": "배경", "질문": "왜?", "답변": "그냥."})
    made = ["### 질문:\n배경\n\n왜?\n\n### 답변:\n그냥."]
    assert takes(file, "--context-column", "c") == (made, "")


def test_a_context_column_that_cannot_be_used_is_reported(fails: Fails, tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", FILLERS)
    fails(source, "--context-column", "passage", mentions=("a.jsonl", "passage", "id, question"))
    for row in ({"text": "가"}, {"messages": [{"role": "user", "content": "가"}]}):
        source = write_lines(tmp_path / "b.jsonl", row, row)
        fails(source, "--context-column", "text", mentions=("b.jsonl", "--context-column", *row))


# --- Numbers and booleans -----------------------------------------------------------------------

NUMBERS = [("1 + 1?", 2), ("반은?", 0.5), ("원주율?", 3.14), (5, 10**20), ("크다?", None)]
OTHERS = [("맞다?", True), ("틀리다?", False), ("말?", "글")]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_numbers_and_booleans_are_written_as_json_has_them_and_said_once(
    takes: Takes, tmp_path: Path, suffix: str
) -> None:
    rows = [{"question": q, "answer": a} for q, a in [*NUMBERS, *OTHERS]]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]"
    file = write_text(tmp_path / f"a.{suffix}", text)
    made = [
        text_of("1 + 1?", "2"),
        text_of("반은?", "0.5"),
        text_of("원주율?", "3.14"),
        text_of("5", "100000000000000000000"),
        None,
        text_of("맞다?", "true"),
        text_of("틀리다?", "false"),
        text_of("말?", "글"),
    ]
    said = f"warning: {file}: numbers and booleans in the column"
    assert takes(file) == (
        made,
        f"{said} answer are written as text: 6 in all\n"
        f"{said} question are written as text: 1 in all\n",
    )


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(("answers", "texts"), [
    ([7, None], ["7"]), ([True, False], ["true", "false"]), ([2.5, float("nan")], ["2.5"]),
    ([Decimal("3.10"), None], ["3.10"]),
])  # fmt: skip
def test_columns_of_numbers_and_booleans_are_written_as_text(
    takes: Takes, tmp_path: Path, suffix: str, answers: list, texts: list[str]
) -> None:
    """Where there is none, as NaN says too, there is no answer."""
    WRITERS[suffix](
        tmp_path / f"a.{suffix}", pa.table({"question": ["가", "나"], "answer": answers})
    )
    made, said = takes(tmp_path / f"a.{suffix}")
    assert made[: len(texts)] == [text_of(*pair) for pair in zip("가나", texts, strict=False)]
    assert made[len(texts) :] == [None] * (2 - len(texts))
    assert f"in the column answer are written as text: {len(texts)} in all" in said


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_numbers_stay_as_they_are_written(takes: Takes, tmp_path: Path, suffix: str) -> None:
    rows = ['{"question": "값?", "answer": 1.50}', '{"question": "수?", "answer": 1e3}']
    texts = {"json": f"[{','.join(rows)}]", "jsonl": "\n".join(rows)}
    texts["csv"] = "question,answer\n값?,1.50\n수?,1e3\n"
    made, _ = takes(write_text(tmp_path / f"a.{suffix}", texts[suffix]))
    assert made == [text_of("값?", "1.50"), text_of("수?", "1e3")]


def test_numbers_in_several_files_are_said_in_one_line(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for part in range(2):
        rows = [{"question": f"{part} + {i}?", "answer": part + i} for i in range(20)]
        write_lines(tmp_path / "a" / f"{part}.jsonl", *rows)
    ended = prepare(tmp_path / "a", tmp_path / "out")
    what = "numbers and booleans in the column answer are written as text: 40 in all"
    assert ended.stderr == f"warning: {tmp_path}/a/0.jsonl and 1 more: {what}\n"


def test_numbers_in_squad_are_counted_once_each(takes: Takes, tmp_path: Path) -> None:
    passage = {"context": 12, "qas": [{"question": "몇?", "answers": [{"text": 12}]}]}
    file = write_text(tmp_path / "a.json", json.dumps({"data": [{"paragraphs": [passage]}]}))
    made, said = takes(file)
    assert made == [text_of("12\n\n몇?", "12")]
    assert said.count(": 1 in all") == 2


# --- Decomposed Hangul --------------------------------------------------------------------------

REMARK = "examples with decomposed Hangul, of six to nine times the tokens; --normalize composes it"


def test_decomposed_hangul_is_counted_and_written_as_it_is_or_composed(
    takes: Takes, tmp_path: Path
) -> None:
    """A line end is not what a mark combines with, though in JSON it is written \\n."""
    apart = "\u1100\u1161\u11a8"
    rows = [(f"{apart}?", "나"), ("다?", "\u1105\u1161"), ("마?", "바\n\u0303 e\u0301")]
    file = write_lines(tmp_path / "a.jsonl", *({"question": q, "answer": a} for q, a in rows))
    said = f"warning: {file}: {REMARK}: 2 in all\n"
    assert takes(file) == ([text_of(*pair) for pair in rows], said)
    made = [text_of("각?", "나"), text_of("다?", "라"), text_of("마?", "바\n\u0303 é")]
    assert takes(file, "--normalize") == (made, "")


def test_the_strings_of_a_chat_are_composed_at_any_depth(takes: Takes, tmp_path: Path) -> None:
    chat = {"messages": chat_with_call("환율", {"돈": ["원"], "n": 1})}
    apart = json.loads(unicodedata.normalize("NFD", json.dumps(chat, ensure_ascii=False)))
    file = write_lines(tmp_path / "a.jsonl", apart)
    said = f"warning: {file}: {REMARK}: 1 in all\n"
    assert takes(file, "--keep-chats") == ([apart], said)
    assert takes(file, "--keep-chats", "--normalize") == ([chat], "")


def test_what_is_the_same_once_composed_is_taken_once(prepare: Run, tmp_path: Path) -> None:
    apart = [tuple(unicodedata.normalize("NFD", side) for side in pair) for pair in FILLERS]
    source = write(tmp_path, "a.csv", [*FILLERS, *apart])
    assert counts_of(prepare(source, tmp_path / "out"))["duplicate"] == 0
    ended = prepare(source, tmp_path / "out", "--normalize")
    assert counts_of(ended)["duplicate"] == 40
    assert sorted(all_of(read_sets(tmp_path / "out"))) == sorted(text_of(*p) for p in FILLERS)


# --- One object a file, and dialogues -----------------------------------------------------------


def indented(file: Path, content: object, encoding: str = "utf-8") -> Path:
    file.parent.mkdir(exist_ok=True)
    return write_text(file, json.dumps(content, ensure_ascii=False, indent=1), encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
def test_a_folder_of_files_with_one_object_each_gives_a_row_for_each(
    takes: Takes, tmp_path: Path, encoding: str
) -> None:
    for i in range(3):
        row = {"id": i, "question": f"질문 {i}은?", "answer": f"답 {i}입니다."}
        indented(tmp_path / "a" / f"00{i}.json", row, encoding)
    made, said = takes(tmp_path / "a")
    assert made == [text_of(f"질문 {i}은?", f"답 {i}입니다.") for i in range(3)]
    assert f"{tmp_path}/a/000.json and 2 more: columns that are left out: id\n" in said


def said_by(speaker: str, words: str) -> list[dict]:
    """A dialogue of three utterances, by two speakers."""
    turns = [("가", "어디 가세요?"), ("나", "제주에 갑니다."), ("가", "언제 가세요?")]
    return [{speaker: who, words: text} for who, text in turns]


BODY = {"header": {}, "body": {"dialogue": said_by("participantID", "utterance")}}
MODU = {
    "id": "SD1",
    "metadata": {"speaker": [{"id": "1", "sex": "남"}, {"id": "2", "sex": "여"}]},
    "utterance": [
        {"id": "SD1.1", "form": "어디 가?", "original_form": "어, 어디 가?", "speaker_id": "1"},
        {"id": "SD1.2", "form": "제주에.", "original_form": "제주에.", "speaker_id": "2"},
    ],
}
LINES = {"lines": [{"text": "네.", "speaker": {"id": "1"}}]}
DIALOGUES = {
    "of texts": ({"info": {"topic": "여행"}, "utterances": said_by("speaker", "text")}, "speaker"),
    "of texts under other names": ({"info": {}, "대화": said_by("이", "text")}, "이"),
    "under no usual name": ({"info": {"topic": "여행"}, "대화": said_by("누가", "말")}, "누가"),
    "in lists": ({"version": "1", "data": [BODY]}, "participantID"),
    "with several forms": ({"document": [MODU]}, "speaker_id"),
    "with objects for speakers": ({"info": [{"annotations": LINES}]}, "speaker"),
    "row by row": (said_by("화자", "text"), "화자"),
}


@pytest.mark.parametrize("how", DIALOGUES)
@pytest.mark.parametrize("flags", [(), ("--keep-chats",)])
def test_dialogues_of_utterances_are_reported_as_such_and_what_to_write(
    fails: Fails, tmp_path: Path, how: str, flags: tuple[str, ...]
) -> None:
    """None is taken for a text of its own."""
    content, speaker = DIALOGUES[how]
    for i in range(2):
        indented(tmp_path / "a" / f"{i}.json", content)
    by = f"by {speaker} these are utterances of dialogues"
    fails(tmp_path / "a", *flags, mentions=("0.json", by, 'write each dialogue as {"messages": '))


def test_texts_and_questions_in_an_object_are_no_dialogues(takes: Takes, tmp_path: Path) -> None:
    texts = [{"id": i, "text": f"글 {i}.", "date": f"2026-01-0{i}"} for i in range(1, 6)]
    file = indented(tmp_path / "a.json", {"info": {"v": 1}, "data": texts})
    assert takes(file)[0] == [f"글 {i}." for i in range(1, 6)]
    asked = [{"question": f"{i}?", "answer": "답 하나", "speaker": "가나"[i % 2]} for i in range(5)]
    file = indented(tmp_path / "a.json", {"info": {"v": 1}, "data": asked})
    assert takes(file)[0] == [text_of(f"{i}?", "답 하나") for i in range(5)]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("flags", [(), ("--keep-chats",)])
def test_chats_in_geminis_form_are_reported_with_what_to_write(
    fails: Fails, tmp_path: Path, suffix: str, flags: tuple[str, ...]
) -> None:
    turns = [("user", "수도는?"), ("model", "서울")]
    row = {"contents": [{"role": role, "parts": [{"text": text}]} for role, text in turns]}
    if suffix == "json":
        indented(tmp_path / "a.json", row)
    else:
        WRITERS[suffix](tmp_path / f"a.{suffix}", pa.Table.from_pylist([row]))
    advice = ("in Gemini's form: write each as", "messages", "assistant for the role model")
    fails(tmp_path / f"a.{suffix}", *flags, mentions=advice)


# --- SQuAD's form -------------------------------------------------------------------------------

KORQUAD = {
    "version": "KorQuAD_v1.0_dev",
    "data": [
        {
            "title": "한강",
            "paragraphs": [
                {
                    "context": "한강은 서울을 흐른다.\n길이는 494 km이다.",
                    "qas": [
                        {"id": "1", "question": "어디를 흐르나?", "answers": [
                            {"text": "서울", "answer_start": 4}, {"text": "서울을"}
                        ]},
                        {"id": "2", "question": "깊이는?", "answers": []},
                    ],
                },
                {"context": "강은 서해로 간다.", "qas": [
                    {"question": "어디로 가나?", "answers": [{"text": "서해"}]},
                    {"question": "왜 가나?", "answers": [{"text": "서"}], "is_impossible": True},
                ]},
            ],
        },
        {"title": "빈 글", "paragraphs": []},
    ],
}  # fmt: skip
FROM_KORQUAD = [
    "### 질문:\n한강은 서울을 흐른다.\n길이는 494 km이다.\n\n어디를 흐르나?\n\n### 답변:\n서울",
    None,
    "### 질문:\n강은 서해로 간다.\n\n어디로 가나?\n\n### 답변:\n서해",
    None,
    None,
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_squad_gives_each_question_below_its_context(
    takes: Takes, tmp_path: Path, suffix: str, indent: int | None
) -> None:
    """In one line and over many."""
    text = json.dumps(KORQUAD, ensure_ascii=False, indent=indent)
    file = write_text(tmp_path / f"a.{suffix}", text)
    said = f"warning: {file}: columns that are left out: title\n"
    assert takes(file) == (FROM_KORQUAD, said)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl", "json"])
def test_squad_is_recognized_without_the_object_around_it(
    takes: Takes, tmp_path: Path, suffix: str
) -> None:
    WRITERS[suffix](tmp_path / f"a.{suffix}", pa.Table.from_pylist(KORQUAD["data"]))
    made, _ = takes(tmp_path / f"a.{suffix}")
    assert made == FROM_KORQUAD


@pytest.mark.parametrize("answer", [
    {"answers": [{"text": "나"}]}, {"answers": {"text": "나", "answer_start": 3}},
    {"answers": {"text": ["나", "너"]}}, {"answer": {"text": "나"}}, {"answer": " 나 "},
])  # fmt: skip
@pytest.mark.parametrize("level", ["paragraphs", "data"])
def test_variants_of_squad_are_taken(
    takes: Takes, tmp_path: Path, level: str, answer: dict
) -> None:
    """AI-Hub has an answer as an object or a string, KorQuAD 2.0 no paragraphs."""
    passage = {"context": "글", "doc_id": 7, "qas": [{"question": "누가?", **answer}]}
    rows = [passage] if level == "data" else [{"title": "제목", "paragraphs": [passage]}]
    file = write_text(tmp_path / "a.json", json.dumps({"Dataset": {"a": 1}, "data": rows}))
    assert takes(file)[0] == ["### 질문:\n글\n\n누가?\n\n### 답변:\n나"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl", "json"])
def test_squad_in_columns_is_taken_with_their_names(
    takes: Takes, tmp_path: Path, suffix: str
) -> None:
    """As the Hugging Face hub has it: a row for each question."""
    answers = [
        {"text": ["서울", "서울을"], "answer_start": [4, 4]},
        {"text": [], "answer_start": []},
    ]
    columns = {"context": ["한강은", "강은"], "question": ["어디?", "왜?"], "answers": answers}
    WRITERS[suffix](tmp_path / f"a.{suffix}", pa.table(columns))
    named = ("--answer-column", "answers", "--context-column", "context")
    made = ["### 질문:\n한강은\n\n어디?\n\n### 답변:\n서울", None]
    assert takes(tmp_path / f"a.{suffix}", *named) == (made, "")


def other_passage(folder: Path) -> Path:
    passage = {"지문": "글", "qas": [{"question": "누가?", "answer": "나"}]}
    return write_text(folder / "a.json", json.dumps({"data": [{"paragraphs": [passage]}]}))


def test_a_passage_may_have_another_name(takes: Takes, tmp_path: Path) -> None:
    file = other_passage(tmp_path)
    made = ["### 질문:\n글\n\n누가?\n\n### 답변:\n나"]
    assert takes(file, "--context-column", "지문") == (made, "")
    said = "questions without a context, which --context-column can name"
    made = ["### 질문:\n누가?\n\n### 답변:\n나"]
    assert takes(file) == (made, f"warning: {file}: {said}\n")


def test_a_passage_of_no_such_name_is_reported(fails: Fails, tmp_path: Path) -> None:
    mentions = ("a.json", "no 글 for --context-column", "지문")
    fails(other_passage(tmp_path), "--context-column", "글", mentions=mentions)


def test_questions_about_one_passage_go_into_one_set(prepare: Run, tmp_path: Path) -> None:
    qas = [{"question": f"질문 {i}?", "answers": [{"text": f"답 {i}."}]} for i in range(5)]
    passages = [{"context": f"글 {i}.", "qas": qas} for i in range(40)]
    file = write_text(tmp_path / "a.json", json.dumps({"data": [{"paragraphs": passages}]}))
    ended = prepare(file, tmp_path / "out")
    assert ended.stdout.startswith(f"Read 200 examples of {file}: dropped 0 with")
    sets = read_sets(tmp_path / "out")
    found = {split: {text.split("\n")[1] for text in texts} for split, texts in sets.items()}
    assert sum(map(len, found.values())) == 40
    assert all(len(sets[split]) == 5 * len(found[split]) for split in SPLITS)


# --- Chats --------------------------------------------------------------------------------------


def message(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def shared(speaker: str, value: object) -> dict:
    return {"from": speaker, "value": value}


CHATS = {
    "messages": {"messages": [
        message("system", "짧게."), message("user", " 수도는?"), message("assistant", "서울 "),
        message("tool", "맑음"), message("user", [{"type": "text", "text": "인구는?"}]),
        message("assistant", "천만"), message("assistant", "쯤"), message("user", "고마워"),
    ]},
    "ShareGPT": {"system": "짧게.", "conversations": [
        shared("human", " 수도는?"), shared("gpt", "서울 "), shared("observation", "맑음"),
        shared("human", "인구는?"), shared("gpt", "천만"), shared("gpt", "쯤"),
        shared("human", "고마워"),
    ]},
}  # fmt: skip
KEPT = {"messages": [
    message("system", "짧게."), message("user", " 수도는?"), message("assistant", "서울 "),
    message("tool", "맑음"), message("user", "인구는?"), message("assistant", "천만"),
    message("assistant", "쯤"), message("user", "고마워"),
]}  # fmt: skip


@pytest.mark.parametrize("form", CHATS)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_each_question_of_a_chat_goes_with_the_answer_directly_after_it(
    takes: Takes, tmp_path: Path, suffix: str, form: str
) -> None:
    lines = [json.dumps(CHATS[form]), json.dumps({"messages": [message("user", "네?")]})]
    text = "\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]"
    file = write_text(tmp_path / f"a.{suffix}", text)
    assert takes(file) == (
        ["### 질문:\n수도는?\n\n### 답변:\n서울", "### 질문:\n인구는?\n\n### 답변:\n천만", None],
        f"warning: {file}: messages of chats that are no question with the answer directly after "
        "it are left out; --keep-chats keeps them\n",
    )


@pytest.mark.parametrize("form", CHATS)
def test_chats_can_be_kept_as_messages(takes: Takes, tmp_path: Path, form: str) -> None:
    tools = [{"name": "날씨"}]
    rows = (
        {"id": 3, **CHATS[form], "tools": json.dumps(tools)},
        {**CHATS[form], "tools": []},
        *({"messages": [message(role, "가")]} for role in ("user", "assistant")),
        {"messages": []},
    )
    file = write_lines(tmp_path / "a.jsonl", *rows)
    said = f"warning: {file}: columns that are left out: id\n"
    made = [KEPT | {"tools": [{"type": "function", "function": tools[0]}]}, KEPT, None, None, None]
    assert takes(file, "--keep-chats") == (made, said)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_chats_come_from_columns_of_lists_too(takes: Takes, tmp_path: Path, suffix: str) -> None:
    """With nulls, and with times, which JSON has no form for."""
    time = datetime(2026, 5, 1, 12, 30)
    messages = [message("user", "하나?"), {**message("assistant", "둘."), "at": time}]
    table = pa.table({"messages": [messages, None], "conversations": pa.nulls(2)})
    WRITERS[suffix](tmp_path / f"a.{suffix}", table)
    file = tmp_path / f"a.{suffix}"
    assert takes(file) == (["### 질문:\n하나?\n\n### 답변:\n둘.", None], "")
    kept = [messages[0], {**messages[1], "at": "2026-05-01 12:30:00"}]
    assert takes(file, "--keep-chats") == ([{"messages": kept}, None], "")


def store(folder: Path, form: str, rows: datasets.Dataset) -> Path:
    """Rows as `datasets` writes them."""
    if form == "parquet":
        rows.to_parquet(folder / "a.parquet")
        return folder / "a.parquet"
    rows.save_to_disk(folder / "saved")
    return folder / "saved"


def load(file: Path) -> datasets.Dataset:
    cache = str(file.parent / "cache")
    return datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)


TRL = [
    {"prompt": [message("user", "하늘은 왜 파래?")],
     "completion": [message("assistant", "빛이 흩어져서요.")]},
    {"prompt": [message("system", "짧게."), message("user", "하나?"), message("assistant", "둘"),
                message("user", "셋?")],
     "completion": [message("assistant", "넷"), message("user", "다섯?"),
                    message("assistant", "여섯")]},
]  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "arrow", "saved"])
def test_prompts_and_completions_that_are_lists_of_messages_make_chats(
    takes: Takes, tmp_path: Path, form: str
) -> None:
    """TRL's own form."""
    if form == "saved":
        source = store(tmp_path, form, datasets.Dataset.from_list(TRL))
    else:
        source = tmp_path / f"a.{form}"
        WRITERS[form](source, pa.Table.from_pylist(TRL))
    kept = [
        {"messages": TRL[0]["prompt"] + TRL[0]["completion"]},
        {"messages": [
            message("system", "짧게."), message("user", "하나?"), message("assistant", "둘"),
            message("user", "셋?"), message("assistant", "넷"), message("user", "다섯?"),
            message("assistant", "여섯"),
        ]},
    ]  # fmt: skip
    assert takes(source, "--keep-chats") == (kept, "")
    pairs = [
        ("하늘은 왜 파래?", "빛이 흩어져서요."),
        ("하나?", "둘"),
        ("셋?", "넷"),
        ("다섯?", "여섯"),
    ]
    assert takes(source)[0] == [text_of(*pair) for pair in pairs]


def test_prompts_as_messages_and_as_texts_may_be_in_one_file(takes: Takes, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "가?", "completion": "나"}, TRL[0])
    made = [text_of("가?", "나"), text_of("하늘은 왜 파래?", "빛이 흩어져서요.")]
    assert takes(file) == (made, "")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_chats_that_are_kept_keep_what_is_for_training_and_the_template(
    takes: Takes, tmp_path: Path, form: str
) -> None:
    marked = [
        {"messages": [message("user", "가?"), {**message("assistant", "나"), mark: value},
                      message("user", "다?"), message("assistant", "라")],
         "functions": [{"name": "환율", "parameters": {"type": "object"}}],
         "chat_template_kwargs": {"enable_thinking": False}}
        for mark, value in (("weight", 0), ("train", False), ("loss", False))
    ]  # fmt: skip
    WRITERS[form](tmp_path / f"a.{form}", pa.Table.from_pylist(marked))
    if form == "jsonl":
        write_lines(tmp_path / "a.jsonl", *marked)
    for row in marked:
        row["tools"] = [{"type": "function", "function": row.pop("functions")[0]}]
    assert takes(tmp_path / f"a.{form}", "--keep-chats") == (marked, "")
    assert takes(tmp_path / f"a.{form}")[0] == [text_of("다?", "라")] * 3


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_contents_that_are_numbers_are_written_as_text(
    takes: Takes, tmp_path: Path, form: str
) -> None:
    """So `datasets` decodes a text such as 42 where other contents are lists."""
    parts = [{"type": "text", "text": "6 × 7은?"}]
    rows = [{"messages": [message("user", parts), message("assistant", "42")]}] * 3
    source = write_lines(tmp_path / "a.jsonl", *rows)
    if form == "parquet":
        source = store(tmp_path, form, load(source))
    else:
        source.write_text(source.read_text("utf-8").replace('"42"', "42"), "utf-8")
    said = "numbers and booleans in the column content are written as text: 3 in all"
    kept = {"messages": [message("user", "6 × 7은?"), message("assistant", "42")]}
    assert takes(source, "--keep-chats") == ([kept] * 3, f"warning: {source}: {said}\n")
    assert takes(source)[0] == [text_of("6 × 7은?", "42")] * 3


MIXED = [  # contents of two types in one column, which datasets stores as JSON text
    {"messages": [
        message("user", [{"type": "text", "text": f"질문 {i}"}] if i % 2 else f"질문 {i}"),
        {**message("assistant", f'답 "{i}"'), "tool_calls": None},
    ]}
    for i in range(8)
]  # fmt: skip


@pytest.mark.parametrize("form", ["saved", "dict", "a.parquet", "a.arrow"])
def test_columns_that_datasets_stores_as_json_come_decoded(
    takes: Takes, tmp_path: Path, form: str
) -> None:
    """By `datasets` itself; read as they are stored they would be "\\uc9c8…" with its quotes."""
    file = write_lines(tmp_path / "mixed.jsonl", *MIXED)
    loaded = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert "Json" in str(loaded.features)
    source = tmp_path / form
    if form == "a.parquet":
        loaded.to_parquet(source)
    elif form == "dict":
        datasets.DatasetDict({"train": loaded}).save_to_disk(source)
    else:
        loaded.save_to_disk(tmp_path / "saved")
        if form == "a.arrow":
            next((tmp_path / "saved").glob("*.arrow")).rename(source)
    kept = [
        {"messages": [message("user", f"질문 {i}"), message("assistant", f'답 "{i}"')]}
        for i in range(8)
    ]
    assert takes(source, "--keep-chats") == (kept, "")
    pairs = [text_of(f"질문 {i}", f'답 "{i}"') for i in range(8)]
    assert takes(source) == takes(file) == (pairs, "")


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_json_is_decoded_in_a_column_a_list_and_a_struct(
    takes: Takes, tmp_path: Path, form: str
) -> None:
    rows = [
        {"question": "하나?", "answers": [{"text": "\\ 첫째"}]},
        {"question": {"text": "둘?"}, "answers": [{"text": ["둘째"]}]},
    ]
    stored = load(write_lines(tmp_path / "a.jsonl", *rows))
    assert stored.features["question"] == datasets.Json()
    assert stored.features["answers"] == datasets.List({"text": datasets.Json()})
    made, _ = takes(store(tmp_path, form, stored), "--answer-column", "answers")
    assert made == [text_of("하나?", "\\ 첫째"), text_of("둘?", "둘째")]


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_chats_with_a_key_that_some_messages_lack_are_kept_as_they_were(
    takes: Takes, tmp_path: Path, form: str
) -> None:
    """`datasets` stores each message as JSON text, with its own null, but none of other rows."""
    call = {"function": {"name": "환율", "arguments": {"base": "USD", "to": None}}}
    rows = [
        {"messages": [message("user", "하나?"), message("assistant", "둘")]},
        {"messages": [message("user", "셋?"), {**message("assistant", ""), "tool_calls": [call]}]},
    ]
    stored = load(write_lines(tmp_path / "a.jsonl", *rows))
    assert stored.features["messages"] == datasets.List(datasets.Json())
    assert takes(store(tmp_path, form, stored), "--keep-chats") == (rows, "")


def tool(name: str, properties: dict, **more: object) -> dict:
    parameters = {"type": "object", "properties": properties, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def chat_with_call(name: str, arguments: dict) -> list[dict]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [message("user", f"{name}?"), {**message("assistant", ""), "tool_calls": [call]}]


CALLS = [
    {
        "messages": chat_with_call("환율", {"base": "USD", "days": [1, None, 3]}),
        "tools": [tool("환율", {"base": {"type": "string"}}, required=["base"])],
    },
    {
        "messages": chat_with_call("날씨", {"city": "서울"}),
        "tools": [tool("날씨", {"city": {"type": "string", "enum": ["서울", "부산"]}})],
    },
    {"messages": chat_with_call("시각", {}), "tools": [tool("시각", {})]},
    {"messages": [message("user", "가?"), message("assistant", "나")]},
]


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_nulls_that_arrow_adds_for_the_keys_of_other_rows_are_taken_out(
    takes: Takes, tmp_path: Path, form: str
) -> None:
    """At any depth; an empty object stays one, and so does a null among the values of a list."""
    stored = datasets.Dataset.from_list(CALLS)
    assert stored[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]["base"] is None
    assert takes(store(tmp_path, form, stored), "--keep-chats") == (CALLS, "")


def test_a_parquet_file_of_tools_has_no_nulls_that_its_rows_did_not_have(takes: Takes) -> None:
    made, said = takes(ROOT / "tests/cases/tools-with-nulls.parquet", "--keep-chats")
    assert (len(made), said) == (30, "")
    schema = {"base": {"type": "string", "description": "통화"}}
    parameters = {"type": "object", "properties": schema, "required": ["base"]}
    function = {"name": "rate", "description": "환율", "parameters": parameters}
    call = {"type": "function", "function": {"name": "rate", "arguments": {"base": "USD0"}}}
    assert made[0] == {
        "messages": [
            message("user", "질문 0"),
            {**message("assistant", ""), "tool_calls": [call]},
            message("tool", "값"),
            message("assistant", "답 0"),
        ],
        "tools": [{"type": "function", "function": function}],
    }


def test_a_null_that_stands_in_json_lines_stays(takes: Takes, tmp_path: Path) -> None:
    row = {"messages": chat_with_call("환율", {"base": None}), "tools": [tool("환율", {"a": None})]}
    assert takes(write_lines(tmp_path / "a.jsonl", row), "--keep-chats") == ([row], "")


def test_answers_of_squad_that_are_null_are_none(takes: Takes, tmp_path: Path) -> None:
    answers = [{"text": ["나"], "answer_start": [1]}, {"text": None, "answer_start": None}, None]
    table = pa.table({"question": ["가", "다", "라"], "answers": answers})
    write_parquet(tmp_path / "a.parquet", table)
    made = takes(tmp_path / "a.parquet", "--answer-column", "answers")
    assert made == ([text_of("가", "나"), None, None], "")


def test_chats_that_are_kept_are_split_by_their_first_question_and_taken_once(
    prepare: Run, tmp_path: Path
) -> None:
    def chat(question: str, answer: str) -> dict:
        return {"messages": [message("system", "s"), message("user", question),
                             message("assistant", answer), message("user", "또?")]}  # fmt: skip

    forms = ("NFC", "NFD")
    chats = [chat(unicodedata.normalize(f, f"질문 {i}?"), f) for i in range(40) for f in forms]
    file = write_lines(tmp_path / "a.jsonl", *chats, *chats[:7])
    ended = prepare(file, tmp_path / "out", "--keep-chats")
    assert (ended.returncode, other_warnings(ended)) == (0, [])
    assert counts_of(ended)["duplicate"] == 7
    owners = {}
    assert len(dataset.read(tmp_path / "out" / "train.jsonl", mask_prompt=True).rows) > 1
    for name, content in read_bytes(tmp_path / "out").items():
        for line in content.decode().splitlines():
            asked = unicodedata.normalize("NFC", json.loads(line)["messages"][1]["content"])
            owners.setdefault(asked, []).append(name)
    assert all(len(names) == 2 and len(set(names)) == 1 for names in owners.values())
    plain = write(tmp_path, "b.jsonl", [(f"질문 {i}?", "답.") for i in range(40)])
    prepare(plain, tmp_path / "plain")
    for split, texts in read_sets(tmp_path / "plain").items():
        assert all(owners[text.split("\n")[1]][0] == f"{split}.jsonl" for text in texts)


def test_the_questions_of_one_chat_go_into_one_set(
    makes: Callable[..., Sets], tmp_path: Path
) -> None:
    chats = [
        {"messages": [message(role, f"{i} {turn} {role}") for turn in range(4)
                      for role in ("user", "assistant")]}
        for i in range(40)
    ]  # fmt: skip
    sets = makes(write_lines(tmp_path / "a.jsonl", *chats))
    found = {split: {text.split()[2] for text in texts} for split, texts in sets.items()}
    assert sum(map(len, found.values())) == 40
    assert all(len(sets[split]) == 4 * len(found[split]) for split in SPLITS)


def test_a_question_that_comes_in_many_chats_is_in_one_set_still(
    prepare: Run, tmp_path: Path
) -> None:
    chats = [
        {"messages": [message("user", f"질문 {i}?"), message("assistant", "답."),
                      message("user", "계속해."), message("assistant", f"계속 {i}.")]}
        for i in range(40)
    ]  # fmt: skip
    ended = prepare(write_lines(tmp_path / "a.jsonl", *chats), tmp_path / "out")
    sets = read_sets(tmp_path / "out")
    having = [split for split in SPLITS if any("계속해." in text for text in sets[split])]
    assert len(having) == 1
    dropped = re.search(r"(\d+) whose question is in another set", ended.stdout)
    assert int(dropped[1]) == 80 - len(all_of(sets)) > 0


def test_the_splits_of_chats_can_be_kept(prepare: Run, tmp_path: Path) -> None:
    def chats(name: str, number: int) -> datasets.Dataset:
        return datasets.Dataset.from_list([
            {"id": i, "conversations": [shared("human", f"{name} {i}?"), shared("gpt", "답.")]}
            for i in range(number)
        ])  # fmt: skip

    splits = {"train": chats("train", 6), "dev": chats("valid", 2), "test": chats("test", 3)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for flags in ([], ["--keep-chats"]):
        ended = prepare(tmp_path / "saved", tmp_path / "out", "--keep-splits", *flags)
        said = (
            f"warning: {tmp_path}/saved/test/data-00000-of-00001.arrow and 2 more: columns that "
            "are left out: id\n"
        )
        assert (ended.returncode, ended.stderr) == (0, said)
        for split, number in (("train", 6), ("valid", 2), ("test", 3)):
            lines = (tmp_path / "out" / f"{split}.jsonl").read_text("utf-8").splitlines()
            assert [f"{split} {i}?" in line for i, line in enumerate(lines)] == [True] * number


def test_a_dry_run_shows_the_chats_that_are_kept(prepare: Run, tmp_path: Path) -> None:
    chats = [
        {"messages": [message("user", f"질문 {i}?"), message("assistant", "답.")]}
        for i in range(40)
    ]
    file = write_lines(tmp_path / "a.jsonl", *chats)
    ended = prepare(file, tmp_path / "out", "--keep-chats", "--dry-run")
    for chat in chats[:3]:
        assert f"\n---\n{json.dumps(chat, ensure_ascii=False)}\n" in ended.stdout


BAD_CHATS = {
    "a speaker that nobody knows": ([shared("bing", "가")], "bing"),
    "an image": ([message("user", [{"type": "image_url"}])], "image_url"),
    "no list": ("가", "not a list of messages"),
    "no content": ([{"role": "user"}], "has no content"),
    "half an emoji": (
        [message("user", "\ud83e"), message("assistant", "나")], "an unpaired surrogate"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD_CHATS)
@pytest.mark.parametrize("flags", [(), ("--keep-chats",)])
def test_a_chat_that_cannot_be_read_is_reported_with_its_row(
    fails: Fails, tmp_path: Path, how: str, flags: tuple[str, ...]
) -> None:
    chat, reason = BAD_CHATS[how]
    good = [
        {"messages": [message("user", f"{i}?"), message("assistant", "답.")]} for i in range(1500)
    ]
    rows = "".join(json.dumps(row) + "\n" for row in (*good, {"messages": chat}))
    (tmp_path / "a.jsonl").write_text(rows)
    fails(tmp_path / "a.jsonl", *flags, mentions=("a.jsonl, row 1501", reason))


def test_chats_cannot_be_kept_where_there_are_none(fails: Fails, tmp_path: Path) -> None:
    source = write(tmp_path, "b/b.jsonl", FILLERS)
    fails(source, "--keep-chats", mentions=("b.jsonl", "--keep-chats", "id, question, answer"))
    chat = [message("user", "하나?"), message("assistant", "둘.")]
    write_lines(tmp_path / "b/a.jsonl", {"messages": chat})
    fails(tmp_path / "b", "--keep-chats", mentions=("b.jsonl", "--keep-chats"))
    for flag in ("--question-column", "--answer-column", "--context-column"):
        fails(source, "--keep-chats", flag, "x", mentions=("--keep-chats",))


# --- CSV and JSON as they come ------------------------------------------------------------------

SPREADSHEET = [
    ["질문", "답", "비고"],
    ["쉼표, 쌍반점; 그리고\t탭?", '"인용"하고\n줄을 바꾼다.', "1,5"],
    ["똠방각하는?", "펲시콜라.", ""],  # which EUC-KR lacks
    ["", "질문이 없다", "x"],
    ["007", "NA", "y"],
]
FROM_SPREADSHEET = [
    '### 질문:\n쉼표, 쌍반점; 그리고\t탭?\n\n### 답변:\n"인용"하고\n줄을 바꾼다.',
    "### 질문:\n똠방각하는?\n\n### 답변:\n펲시콜라.",
    None,
    "### 질문:\n007\n\n### 답변:\nNA",
]
NAMED = ("--question-column", "질문", "--answer-column", "답", "--context-column", "비고")


@pytest.mark.parametrize(
    ("name", "separator", "encoding", "guess"),
    [
        ("a.csv", ",", "utf-8", ""),
        ("a.csv", ",", "utf-8-sig", ""),
        ("a.csv", ";", "utf-8", "read with semicolons between the values"),
        ("a.csv", "\t", "utf-8-sig", "read with tabs between the values"),
        ("a.csv", "|", "utf-8", "read with bars between the values"),
        ("a.csv", ",", "cp949", "read as cp949"),
        ("a.csv", ";", "cp949", "read as cp949\nread with semicolons between the values"),
        ("a.csv", ",", "utf-16", ""),
        ("a.CSV", "\t", "utf-16", "read with tabs between the values"),
        ("a.tsv", "\t", "utf-16", ""),
        ("a.tsv", "\t", "utf-8", ""),
        ("a.TSV", "\t", "cp949", "read as cp949"),
        ("a.tsv", ",", "utf-8", "read with commas between the values"),
    ],
)
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_a_csv_file_is_read_with_any_separator_and_encoding_that_excel_writes(
    takes: Takes, tmp_path: Path, name: str, separator: str, encoding: str, guess: str, end: str
) -> None:
    with (tmp_path / name).open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream, delimiter=separator, lineterminator=end).writerows(SPREADSHEET)
    said = "".join(f"hint: {tmp_path / name}: {line}\n" for line in guess.splitlines())
    made = FROM_SPREADSHEET.copy()
    made[0] = made[0].replace("질문:\n", "질문:\n1,5\n\n")
    made[3] = made[3].replace("질문:\n", "질문:\ny\n\n")
    assert takes(tmp_path / name, *NAMED) == (made, said)


def test_how_files_are_read_is_said_once_for_those_that_are_alike(
    prepare: Run, tmp_path: Path
) -> None:
    text = "".join(f"{question};{answer}\n" for question, answer in FILLERS)
    (tmp_path / "a").mkdir()
    for name in ("1.csv", "2.csv", "3.csv"):
        write_text(tmp_path / "a" / name, "question;answer\n" + text, "cp949")
    first = f"hint: {tmp_path / 'a/1.csv'} and 2 more:"
    said = f"{first} read as cp949\n{first} read with semicolons between the values\n"
    assert prepare(tmp_path / "a", tmp_path / "out").stderr == said


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "^"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_first_line_that_names_the_separator_is_obeyed(
    takes: Takes, tmp_path: Path, name: str, encoding: str, separator: str
) -> None:
    """As Excel has it, also where the names have more of another."""
    names = separator.join(["question", "answer", '",,;;||\t\t"'])
    lines = [f"sep={separator}", names, f"가{separator}나{separator}"]
    file = write_text(tmp_path / name, "\r\n".join(lines), encoding)
    made, said = takes(file)
    assert made == [text_of("가", "나")]
    assert "between the values" not in said


@pytest.mark.parametrize("line", ["sep=\\t", '"sep=\t"', "SEP=\t"])
def test_the_line_that_names_the_separator_may_be_written_by_hand(
    takes: Takes, tmp_path: Path, line: str
) -> None:
    file = write_text(tmp_path / "a.csv", f"{line}\nquestion\tanswer\n가\t나, 다\n")
    assert takes(file) == ([text_of("가", "나, 다")], "")


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_read_in_either_byte_order(takes: Takes, tmp_path: Path, order: str) -> None:
    file = write_text(tmp_path / "a.csv", "\ufeffquestion,answer\n가,나\n", order)
    assert takes(file) == (["### 질문:\n가\n\n### 답변:\n나"], "")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp949"])
def test_json_is_read_in_the_same_encodings(
    takes: Takes, tmp_path: Path, encoding: str, suffix: str, nested: bool
) -> None:
    """In lines with \u2028 and the like inside, which end none."""
    rows = [{"question": "갸\x85?" if encoding != "cp949" else "갸?", "answer": "\u2025나"}] * 2
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = f"[{','.join(lines)}]" if suffix == "json" else "\r\n".join(lines)
    text = f'{{"v": 1, "data": [{",".join(lines)}]}}' if nested else text
    file = write_text(tmp_path / f"a.{suffix}", text, encoding)
    said = f"hint: {file}: read as cp949\n" if encoding == "cp949" else ""
    assert takes(file) == ([f"### 질문:\n{rows[0]['question']}\n\n### 답변:\n\u2025나"] * 2, said)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
@pytest.mark.parametrize("damage", [b"\xff", "가".encode("cp949")])
def test_a_file_that_is_in_no_one_encoding_is_reported(
    fails: Fails, tmp_path: Path, suffix: str, damage: bytes
) -> None:
    """UTF-8, but for a byte or two near its end."""
    line = '"가","나"\n' if suffix == "csv" else '{"question": "가", "answer": "나"}\n'
    text = {"csv": "question,answer\n", "json": '{"data": [', "jsonl": ""}[suffix] + line
    text += f",{line}" * 50_000 + "]}" if suffix == "json" else line * 50_000
    content = text.encode()
    at = content.rindex("나".encode())
    (tmp_path / f"a.{suffix}").write_bytes(content[:at] + damage + content[at + 3 :])
    fails(tmp_path / f"a.{suffix}", mentions=(f"a.{suffix}", "not UTF-8", "save"))


def test_half_a_character_at_the_end_of_utf_16_is_reported(fails: Fails, tmp_path: Path) -> None:
    for suffix, text in (("csv", "question,answer\n가,나"), ("json", '[{"text": "가"}]')):
        (tmp_path / f"a.{suffix}").write_bytes(text.encode("utf-16") + b"\n")
        fails(tmp_path / f"a.{suffix}", mentions=(f"a.{suffix}",))


@pytest.mark.parametrize("text", ["question;answer\n", "question\tanswer", "question,answer\r\n"])
def test_a_csv_file_of_names_alone_is_read(fails: Fails, tmp_path: Path, text: str) -> None:
    fails(write_text(tmp_path / "a.csv", text), mentions=("a.csv", "leaves nothing for train"))


def test_a_csv_file_with_one_column_has_no_separator(takes: Takes, tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.csv", 'text\n"a; b, c"\n"d; e, f"\n')
    assert takes(file) == (["a; b, c", "d; e, f"], "")


VALUES = {  # of other columns; json takes them, and writes most of them
    "NaN": "NaN",
    "infinity": "-Infinity",
    "a long number": "1" * 4000,
    "a large number": "1e999",
    "the same key twice": '1, "note": 2',
    "half an emoji": '"\\ud83e"',
    "objects": '[{"a": [{"b": {}}]}, []]',
}


@pytest.mark.parametrize("how", VALUES)
@pytest.mark.parametrize(
    "form", ["[{}]", '{{"data": [{}]}}', '{{\n "v": NaN,\n "data" : [\n{}\n]\n}}\n', "{}"]
)
def test_json_may_hold_what_python_writes(
    takes: Takes, tmp_path: Path, form: str, how: str
) -> None:
    row = f'{{"note": {VALUES[how]}, "question": "가\\ud83e\\udd6c", "answer": "나"}}'
    file = write_text(tmp_path / "a.json", form.format(row))
    assert takes(file)[0] == ["### 질문:\n가🥬\n\n### 답변:\n나"]


BAD_JSON = {
    "a control character": ('[\n{"question": "a\tb"}]', "Invalid control character at: line 2"),
    "no comma": ('[{"a": 1}\n\n {"a": 2}]', "Expecting ',' delimiter: line 3 column 2"),
    "an end too early": ('{"data": [\n{"a": 1}', "Expecting ',' delimiter: line 2 column 9"),
    "half a row": ('[{"a": 1},\n {"a": "b', "Unterminated string starting at: line 2"),
    "half a word": ('[{"a": nul', "Expecting value: line 1 column 8"),
    "more after it": ('[{"text": "a"}]\n{}', "Extra data: line 2 column 1"),
    "more after an object": (
        '{"data": [{"text": "a"}]}\n]',
        "line 2: is not JSON: Expecting value",
    ),
    "no key": ('{1: [{"text": "a"}]}', "Expecting property name enclosed in double quotes: line 1"),
    "no colon": ('{"data" [{"text": "a"}]}', "Expecting ':' delimiter: line 1"),
    "UTF-16 without its mark": ("{\0}\0", "Expecting property name"),
    "a surrogate": ('[{"text": "\\ud83e"}]', "row 1: holds half a character, an unpaired"),
    "too long a number": (f'[{{"text": {"1" * 5000}}}]', "Exceeds the limit (4300 digits)"),
    "too deep": ('{"a": 1, "data": ' + "[" * 100_000, "maximum recursion depth exceeded"),
    "rows that are none": ("[1, 2]", "something other than objects with named values"),
    "some that are none": ('{"data": [{"text": "a"}, 2]}', "it has data, of which"),
    "several lists": (
        '{"train": [{"text": "a"}], "n": [1], "test": [{"text": "b"}]}',
        "has no columns question and answer; it has train, n, test, of which",
    ),
    "nothing": ("{}", "has no columns question and answer; it has nothing, of which"),
}


@pytest.mark.parametrize("how", BAD_JSON)
def test_json_that_cannot_be_taken_is_reported_with_its_line(
    fails: Fails, tmp_path: Path, how: str
) -> None:
    content, reason = BAD_JSON[how]
    (tmp_path / "a.json").write_text(content)
    fails(tmp_path / "a.json", mentions=("a.json", reason))


@pytest.mark.parametrize(
    "row",
    [
        {"evidence": [{"a": 1}], "question": "가", "answer": "나"},
        {"question": "가", "evidence": [{"a": 1}], "answer": "나"},
        {"messages": [message("user", "가"), message("assistant", "나")]},
        {"qas": [{"question": "가", "answer": "나"}]},
    ],
)
@pytest.mark.parametrize("number", [1, 3])
def test_an_object_with_columns_that_are_known_is_a_row_whatever_lists_it_has(
    takes: Takes, tmp_path: Path, row: dict, number: int
) -> None:
    file = write_lines(tmp_path / "a.json", *[row] * number)
    assert takes(file)[0] == ["### 질문:\n가\n\n### 답변:\n나"] * number


def test_an_object_with_columns_named_by_hand_is_a_row(takes: Takes, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.json", {"근거": [{"a": 1}], "물음": "가", "대답": "나"})
    named = ("--question-column", "물음", "--answer-column", "대답")
    assert takes(file, *named)[0] == ["### 질문:\n가\n\n### 답변:\n나"]


@pytest.mark.parametrize("encoding", ["utf-8", "cp949"])
def test_json_lines_are_read_a_part_at_a_time(tmp_path: Path, encoding: str) -> None:
    """Of 10 MB never more than 3 MB are in memory."""
    answer = "물은 산소와 수소로 이루어져 있다. " * 20
    rows = 10_000_000 // len(answer.encode(encoding))
    with (tmp_path / "a.json").open("w", encoding=encoding) as stream:
        for number in range(rows):
            stream.write(f'{{"question": "질문 {number}?", "answer": "{answer}"}}\n')
    args = prepare_lora_data.parse_arguments([])
    examples = prepare_lora_data.read_examples(tmp_path / "a.json", args, {})
    tracemalloc.start()
    try:
        assert sum(1 for _ in examples) == rows
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("column", ["raw_html", "context"])
def test_long_articles_are_read_a_few_at_a_time(tmp_path: Path, column: str) -> None:
    """As in KorQuAD 2.0; of 60 MB never more than half are in memory."""
    with (tmp_path / "a.json").open("w") as stream:
        for number in range(300):
            article = {column: "글" * 100_000, "qas": [{"question": f"{number}?", "answer": "나"}]}
            stream.write(json.dumps(article, ensure_ascii=False) + "\n")
    args = prepare_lora_data.parse_arguments([])
    examples = prepare_lora_data.read_examples(tmp_path / "a.json", args, {})
    tracemalloc.start()
    try:
        assert sum(1 for _ in examples) == 300
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


# --- The sources --------------------------------------------------------------------------------

ROWS = [
    *[("007", "NA"), ("None", "null"), ("nan", "1.50"), ("true", "2024-01-01"), ("N/A", "-")],
    ('"인용", 쉼표; 그리고 \\n', "첫째 줄\n\n셋째 줄, '끝'"),
    ("  앞뒤  ", "\t빈칸\u3000"),
    ("김치 🥬", "고추 🌶️"),
    ("", "질문이 없다"),
    ("답이 없다", " "),
    *[("같은 질문?", "첫째 답."), ("같은 질문?", "둘째 답."), ("같은 질문?", "첫째 답.")],
    *FILLERS,
]
PARTS = {  # of a folder: file, first row, last row
    "0.parquet": (0, 10),
    "b/1.ARROW": (10, 20),
    "b/c d/2.JsonL": (20, 30),
    "b/c d/[3]*?.json": (30, 40),
    "한글/4.CSV": (40, None),
}


def saved(folder: Path, **options: object) -> Path:
    datasets.Dataset(table_of(ROWS)).save_to_disk(folder, **options)
    return folder


def saved_among_other_files(folder: Path) -> Path:
    saved(folder, num_shards=3)
    assert len(list(folder.glob("*.arrow"))) == 3
    write(folder, "cache-4f3a.arrow", [("캐시?", "아니요.")])
    write(folder, "data-00003-of-00004.arrow", [("예전 조각?", "아니요.")])
    write(folder, "other.jsonl", [("다른 파일?", "아니요.")])
    return folder


def parquet(folder: Path, convert: Callable[[pa.ChunkedArray], object]) -> Path:
    table = table_of(ROWS)
    columns = {name: convert(table[name]) for name in ("question", "answer")}
    write_parquet(folder / "a.parquet", pa.table(columns))
    return folder / "a.parquet"


def pandas_parquet(folder: Path) -> Path:
    table_of(ROWS).to_pandas().to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def pandas_csv(folder: Path) -> Path:
    table_of(ROWS).to_pandas().to_csv(folder / "a.csv")
    return folder / "a.csv"


def arrow_file(folder: Path) -> Path:
    write_arrow_file(folder / "a.arrow", table_of(ROWS))
    return folder / "a.arrow"


def marked_csv(folder: Path) -> Path:
    write_csv(folder / "a.csv", table_of(ROWS), "utf-8-sig")
    return folder / "a.csv"


def windows_jsonl(folder: Path) -> Path:
    lines = write(folder, "a.jsonl", ROWS).read_bytes().splitlines()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n  \r\n".join(lines))
    return folder / "a.jsonl"


def indented_json(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(table_of(ROWS).to_pylist(), indent=2))
    return folder / "a.json"


def parts(folder: Path) -> Path:
    for name, (start, stop) in PARTS.items():
        write(folder, name, ROWS[start:stop])
    (folder / "README.md").write_text("# questions, answers\n")
    (folder / "b/dataset_info.json").write_text('{"features": {}}')
    (folder / "b/x.jsonl").mkdir()
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "a saved Dataset": lambda folder: saved(folder / "saved"),
    "shards among other files": saved_among_other_files,
    "Parquet": lambda folder: write(folder, "a.parquet", ROWS),
    "Parquet of dictionaries": lambda folder: parquet(folder, pa.ChunkedArray.dictionary_encode),
    "Parquet of large strings": lambda folder: parquet(
        folder, lambda column: column.cast(pa.large_string())
    ),
    "Parquet by pandas": pandas_parquet,
    "Arrow stream": lambda folder: write(folder, "a.arrow", ROWS),
    "Arrow file": arrow_file,
    "JSON Lines": lambda folder: write(folder, "a.jsonl", ROWS),
    "JSON Lines by Windows": windows_jsonl,
    "JSON": lambda folder: write(folder, "a.json", ROWS),
    "indented JSON": indented_json,
    "CSV": lambda folder: write(folder, "a.csv", ROWS),
    "CSV with a byte-order mark": marked_csv,
    "CSV by pandas": pandas_csv,
    "CSV with a suffix in capitals": lambda folder: write(folder, "A.CSV", ROWS),
    "a folder of all": parts,
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_every_kind_of_source_gives_the_same_examples(
    makes: Callable[..., Sets], tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    (tmp_path / "source").mkdir()
    made = unordered(makes(make(tmp_path / "source")))
    assert made == unordered(makes(write(tmp_path, "same.jsonl", ROWS)))
    trimmed = {(question.strip(), answer.strip()) for question, answer in ROWS}
    assert sorted(all_of(made)) == sorted(text_of(*pair) for pair in trimmed if all(pair))


@pytest.mark.parametrize(
    "name", ["with a space", "한글", "[brackets]", "a*b?", "{a,b}", ".x", "#%20"]
)
@pytest.mark.parametrize("make", [saved, parts])
def test_a_folder_may_have_any_name(
    makes: Callable[..., Sets], tmp_path: Path, name: str, make: Callable[[Path], Path]
) -> None:
    write(tmp_path, "a bc/x.jsonl", [("이웃?", "아니요.")])  # matches a*b? as a pattern does
    expected = unordered(makes(write(tmp_path, "same.jsonl", ROWS)))
    assert unordered(makes(make(tmp_path / name))) == expected


def test_a_relative_source_is_one_below_the_working_folder(
    makes: Callable[..., Sets], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = makes(write(tmp_path, "a b/a.csv", ROWS))
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    assert makes(Path("../a b")) == expected
    assert makes(Path("../a b/a.csv")) == expected


def test_a_csv_column_of_numbers_is_text_as_it_is_written(
    makes: Callable[..., Sets], tmp_path: Path
) -> None:
    pairs = [(f"{number:03}", f"{number}.50") for number in range(40)]
    made = makes(write(tmp_path, "a.csv", pairs))
    assert sorted(all_of(made)) == sorted(text_of(*pair) for pair in pairs)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_json_column_of_dates_is_text(
    makes: Callable[..., Sets], tmp_path: Path, suffix: str
) -> None:
    pairs = [
        (f"{question} 언제?", f"2024-05-{10 + i % 20}") for i, (question, _) in enumerate(FILLERS)
    ]
    made = makes(write(tmp_path, f"a.{suffix}", pairs))
    assert sorted(all_of(made)) == sorted(text_of(*pair) for pair in pairs)


LATER = {  # what the entries of a long file hold at first, and what further on
    "words after numbers": ({"id": 1}, {"id": "하나"}),
    "words after nothing": ({"note": None}, {"note": "하나"}),
    "a new column": ({}, {"note": "하나"}),
}


@pytest.mark.parametrize("how", LATER)
def test_a_long_json_lines_file_may_hold_other_things_in_other_columns_further_on(
    makes: Callable[..., Sets], tmp_path: Path, how: str
) -> None:
    rows = [{"question": f"질문 {i}?", "answer": "답." * 4000} for i in range(600)]
    lines = [json.dumps({**row, **LATER[how][i > 550]}) for i, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert len(all_of(makes(tmp_path / "a.jsonl"))) == len(rows)


def test_a_long_csv_file_may_hold_other_things_in_other_columns_further_on(
    makes: Callable[..., Sets], tmp_path: Path
) -> None:
    """Numbers and then words, say, in a column that does not matter; past what is read at once."""
    lines = [f"{i if i < 10_500 else 'x'},질문 {i}?,답 {i}.\n" for i in range(11_000)]
    (tmp_path / "a.csv").write_text("id,question,answer\n" + "".join(lines))
    assert len(all_of(makes(tmp_path / "a.csv"))) == 11_000


# --- The splits of a DatasetDict ----------------------------------------------------------------


def test_splits_are_pooled_with_a_warning(
    prepare: Run, makes: Callable[..., Sets], tmp_path: Path
) -> None:
    source = save(tmp_path / "saved", train=ROWS[:30], test=ROWS[30:])
    ended = prepare(source, tmp_path / "out")
    assert ended.returncode == 0
    (warning,) = other_warnings(ended)
    assert warning.startswith("warning: ")
    for mention in ("train", "test", "--keep-splits"):
        assert mention in warning
    expected = makes(write(tmp_path, "same.jsonl", ROWS))
    assert unordered(read_sets(tmp_path / "out")) == unordered(expected)


def test_a_single_split_is_read_without_a_warning(
    makes: Callable[..., Sets], tmp_path: Path
) -> None:
    source = save(tmp_path / "saved", train=ROWS)
    assert makes(source) == makes(write(tmp_path, "same.jsonl", ROWS))


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_splits_can_be_kept(makes: Callable[..., Sets], tmp_path: Path, name: str) -> None:
    own = {"train": FILLERS[:20], name: FILLERS[20:28], "test": FILLERS[28:]}
    made = makes(save(tmp_path / "saved", **own), "--keep-splits")
    expected = {split: [text_of(*pair) for pair in pairs] for split, pairs in own.items()}
    assert list(made.values()) == list(expected.values())


@pytest.mark.parametrize(("lacking", "kept"), [("valid", "test"), ("test", "validation")])
def test_a_split_that_is_lacking_is_drawn_from_train(
    makes: Callable[..., Sets], tmp_path: Path, lacking: str, kept: str
) -> None:
    source = save(tmp_path / "saved", **{"train": FILLERS[:30], kept: FILLERS[30:]})
    made = makes(source, "--keep-splits")
    assert made[SPLITS[1] if lacking == "test" else "test"] == [text_of(*p) for p in FILLERS[30:]]
    drawn = [text_of(*pair) for pair in FILLERS[:30]]
    assert sorted(made["train"] + made[lacking]) == sorted(drawn)


def test_of_a_question_in_two_splits_training_loses_its_own(prepare: Run, tmp_path: Path) -> None:
    """Whatever the answer and the Unicode form; counted apart from what is the same in both."""
    both = FILLERS[:5]
    other = [(unicodedata.normalize("NFD", question), "다른 답.") for question, _ in both]
    own = {"train": [*both, *other, *FILLERS[10:]], "validation": FILLERS[5:10], "test": both}
    ended = prepare(save(tmp_path / "saved", **own), tmp_path / "out", "--keep-splits")
    assert read_sets(tmp_path / "out") == {
        "train": [text_of(*pair) for pair in FILLERS[10:]],
        "valid": [text_of(*pair) for pair in FILLERS[5:10]],
        "test": [text_of(*pair) for pair in both],
    }
    counts = counts_of(ended)
    assert (counts["duplicate"], counts["elsewhere"], counts["rows"]) == (5, 5, 50)


def test_a_limit_is_one_for_each_split_that_is_kept(
    makes: Callable[..., Sets], tmp_path: Path
) -> None:
    own = {"train": FILLERS[:20], "validation": FILLERS[20:28], "test": FILLERS[28:]}
    made = makes(save(tmp_path / "saved", **own), "--keep-splits", "--limit", 5)
    expected = {"train": FILLERS[:5], "valid": FILLERS[20:25], "test": FILLERS[28:33]}
    assert made == {split: [text_of(*p) for p in pairs] for split, pairs in expected.items()}


def test_a_source_whose_splits_cannot_be_kept_is_reported(fails: Fails, tmp_path: Path) -> None:
    pairs = write(tmp_path, "a/a.jsonl", FILLERS)
    fails(pairs, "--keep-splits", mentions=("--keep-splits", "DatasetDict"))
    fails(pairs.parent, "--keep-splits", mentions=("--keep-splits", "DatasetDict"))
    fails(saved(tmp_path / "saved"), "--keep-splits", mentions=("--keep-splits", "DatasetDict"))
    source = save(tmp_path / "dict", train=FILLERS, extra=FILLERS)
    fails(source, "--keep-splits", mentions=("extra", "--keep-splits", "validation"))


# --- The output ---------------------------------------------------------------------------------


def test_a_dry_run_prints_the_counts_and_three_examples_and_writes_nothing(
    prepare: Run, tmp_path: Path
) -> None:
    source = write(tmp_path, "a.jsonl", ROWS)
    write_old_sets(tmp_path / "old")
    before = listing(tmp_path)
    dry = prepare(source, tmp_path / "new/deep", "--dry-run")
    assert prepare(source, tmp_path / "old", "--dry-run").returncode == dry.returncode == 0
    assert listing(tmp_path) == before
    for pair in ROWS[:3]:
        assert f"\n---\n{text_of(*pair)}\n" in dry.stdout
    assert dry.stdout.count("### 질문:") == 3
    assert counts_of(dry) == counts_of(prepare(source, tmp_path / "new/deep"))
    assert read_sets(tmp_path / "new/deep")


def test_the_old_sets_are_replaced_as_a_whole(prepare: Run, tmp_path: Path) -> None:
    write_old_sets(tmp_path / "old")
    source = write(tmp_path, "a.jsonl", FILLERS)
    for output in (tmp_path / "old", tmp_path / "new"):
        assert prepare(source, output).returncode == 0
    assert read_bytes(tmp_path / "old") == read_bytes(tmp_path / "new")


def test_what_a_folder_held_is_kept_where_it_changes(prepare: Run, tmp_path: Path) -> None:
    output, source = tmp_path / "out", write(tmp_path, "a.jsonl", FILLERS)
    said = prepare(source, output).stderr
    first = read_bytes(output)
    assert prepare(source, output).stderr == said  # the same again
    for number in (1, 2):
        ended = prepare(source, output, "--seed", number)
        kept = tmp_path / f"out.previous-{number}"
        assert f"What {output} held before is kept in {kept}.\n" in ended.stdout
    assert read_bytes(tmp_path / "out.previous-1") == first
    assert not (tmp_path / "out.previous-3").exists()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_share_of_0_makes_no_such_set_and_leaves_no_old_one(
    prepare: Run, tmp_path: Path, split: str
) -> None:
    output, source = tmp_path / "out", write(tmp_path, "a.jsonl", FILLERS)
    prepare(source, output)
    ended = prepare(source, output, f"--{split}-fraction", 0)
    assert ended.returncode == 0, ended.stderr
    assert split not in ended.stdout.splitlines()[-1].partition(":")[2]
    assert not (output / f"{split}.jsonl").exists()
    assert (tmp_path / f"out.previous-1/{split}.jsonl").exists()


DECOMPOSED = unicodedata.normalize("NFD", "질문,답변")


@pytest.mark.parametrize(
    "columns",
    [
        *("질문,답변", "질의,응답", "문제,정답", "문항,해설", "질문 내용,답변 내용"),
        *("Question,Answer", "prompt,response", "instruction,response", " 질문 , 답변", DECOMPOSED),
    ],
)
def test_usual_names_of_columns_are_known_without_flags(
    takes: Takes, tmp_path: Path, columns: str
) -> None:
    file = write_text(tmp_path / "a.csv", f"번호,{columns}\n1,물은?,H2O\n")
    said = f"warning: {file}: columns that are left out: 번호\n"
    assert takes(file) == (["### 질문:\n물은?\n\n### 답변:\nH2O"], said)


def test_chats_are_written_from_any_source(prepare: Run, tmp_path: Path) -> None:
    """Questions and answers, turns of chats, and texts that have both below headings."""
    rows = [
        {"question": "물은?", "answer": "H2O"},
        {"instruction": "고쳐라", "input": "물", "output": "불"},
        {"messages": turns("안녕?", "네.", "왜?", "그냥.")},
        {"text": "### 질문:\n달은?\n\n### 답변:\n돈다.\n\n### 질문:\n왜?\n\n### 답변:\n그래서."},
    ]
    chats = [("물은?", "H2O"), ("고쳐라\n\n물", "불"), ("안녕?", "네."), ("왜?", "그냥.")]
    chats += [("달은?", "돈다.", "왜?", "그래서.")]
    none = ("--valid-fraction", 0, "--test-fraction", 0)
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    ended = prepare(tmp_path, tmp_path / "out", "--form", "messages", *none)
    assert ended.returncode == 0, ended.stderr
    made = (tmp_path / "out/train.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["messages"] for line in made] == [turns(*chat) for chat in chats]

    for text in ("그냥 글", "### 답변:\n돈다.\n### 질문:\n달은?"):
        (tmp_path / "0.jsonl").write_text(json.dumps({"text": text}) + "\n", "utf-8")
        ended = prepare(tmp_path, tmp_path / "out", "--form", "messages", *none)
        one_error(ended, "0.jsonl, row 1: is no text of questions and answers in turns")


def test_a_cell_may_have_a_heading_in_a_chat_but_not_below_headings(
    prepare: Run, tmp_path: Path
) -> None:
    chat = turns("물은?", "H2O\n### 답변:\n물")
    rows = [{"question": "물은?", "answer": "H2O\n### 답변:\n물"}, {"messages": chat}]
    none = ("--valid-fraction", 0, "--test-fraction", 0)
    for row in rows:
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        error = one_error(prepare(tmp_path / "a.jsonl", tmp_path / "out", *none))
        assert "row 1: has ### 답변: in a question or an answer; --form messages takes" in error
        ended = prepare(tmp_path / "a.jsonl", tmp_path / "out", "--form", "messages", *none)
        assert ended.returncode == 0
        made = (tmp_path / "out/train.jsonl").read_text("utf-8")
        assert json.loads(made) == {"messages": chat}


def test_of_columns_that_could_both_be_meant_the_other_is_told(
    takes: Takes, tmp_path: Path
) -> None:
    file = write_text(tmp_path / "a.csv", "Question,Answer,question\n산은?,산,물은?\n")
    flags = "--question-column and --answer-column name others"
    said = f"warning: {file}: columns that are left out: Question; {flags}\n"
    assert takes(file) == (["### 질문:\n물은?\n\n### 답변:\n산"], said)


def turns(*contents: str) -> list[dict]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_error_in_the_last_file_leaves_the_old_sets_as_they_were(
    fails: Fails, tmp_path: Path, suffix: str
) -> None:
    write(tmp_path, "a/a.jsonl", [(f"질문 {i}?", "답." * 100) for i in range(2000)])
    (tmp_path / f"a/z.{suffix}").write_bytes(b'question,answer\n"a')
    fails(tmp_path / "a", mentions=(f"z.{suffix}",))


def test_a_full_disk_leaves_the_old_sets_as_they_were(fails: Fails, tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", [(f"질문 {i}?", "답." * 100) for i in range(200)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        fails(source, mentions=("old",))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def long_source(tmp_path: Path) -> Path:
    """A small file of so many rows that reading it takes a minute."""
    rows = 4_000_000
    same = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), ["가"])
    write_parquet(tmp_path / "long.parquet", pa.table({"question": same, "answer": same}))
    return tmp_path / "long.parquet"


def stop(source: Path, output: Path, number: signal.Signals) -> Ended:
    """Send a signal to a run when it has begun to write."""
    with subprocess.Popen(
        [sys.executable, SCRIPT, "--source", source, "--output", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not (output / "test.jsonl.part").exists():
            time.sleep(0.01)
        process.send_signal(number)
        outputs = process.communicate(timeout=60)
    return Ended(process.args, process.returncode, *outputs)


def test_an_interrupted_run_leaves_the_old_sets_as_they_were(
    tmp_path: Path, long_source: Path
) -> None:
    write_old_sets(tmp_path / "old")
    before = listing(tmp_path)
    ended = stop(long_source, tmp_path / "old", signal.SIGINT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_gets_a_signal_to_end_leaves_the_old_sets_alone(
    tmp_path: Path, long_source: Path, number: signal.Signals
) -> None:
    write_old_sets(tmp_path / "old")
    before = listing(tmp_path / "old")
    ended = stop(long_source, tmp_path / "old", number)
    assert ended.returncode == 128 + number
    assert ended.stderr == "interrupted: nothing was written\n"
    assert listing(tmp_path / "old") == before


def test_a_killed_run_leaves_the_old_sets_and_the_next_one_cleans_up(
    prepare: Run, tmp_path: Path, long_source: Path
) -> None:
    write_old_sets(tmp_path / "old")
    before = read_bytes(tmp_path / "old")
    ended = stop(long_source, tmp_path / "old", signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL
    assert before.items() <= read_bytes(tmp_path / "old").items()
    assert prepare(write(tmp_path, "a.jsonl", FILLERS), tmp_path / "old").returncode == 0
    assert len(all_of(read_sets(tmp_path / "old"))) == len(FILLERS)


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing", "missing/a.parquet", "a.jsonl/below"])
def test_a_missing_source_is_reported_and_where_to_get_the_real_one(
    fails: Fails, tmp_path: Path, name: str
) -> None:
    write(tmp_path, "a.jsonl", FILLERS)
    mentions = (name, "downloaded by you", "maywell/korean_textbooks", "--source")
    fails(tmp_path / name, mentions=mentions)


def test_a_source_without_data_is_reported_and_what_can_be_read(
    fails: Fails, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    fails(tmp_path / "a", mentions=(str(tmp_path / "a"), *(f".{suffix}" for suffix in WRITERS)))
    for name in ("a.txt", "dataset_info.json", "a.jsonl.gz"):
        (tmp_path / "a" / name).write_text("{}")
    fails(tmp_path / "a", mentions=(str(tmp_path / "a"),))
    for name in ("a.txt", "a.jsonl.gz"):
        fails(tmp_path / "a" / name, mentions=(name, *(f".{suffix}" for suffix in WRITERS)))


@pytest.mark.parametrize("suffix", WRITERS)
def test_columns_that_are_missing_are_reported_with_those_there_are(
    fails: Fails, tmp_path: Path, suffix: str
) -> None:
    table = table_of(FILLERS).rename_columns(["id", "ask", "reply", "note"])
    WRITERS[suffix](tmp_path / f"a.{suffix}", table)
    there = ("id, ask, reply, note", "--question-column", "--answer-column")
    fails(tmp_path / f"a.{suffix}", mentions=("question", "answer", *there))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "PK\x03\x04\x14", "looks like a zip archive or an Excel file: unpack it, or"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer to the"),
        ("a.arrow", "<!DOCTYPE html>", "looks like a web page: download the file itself"),
        ("a.json", json.dumps({"data": {"question": "q"}}), "it has data, of which"),
        ("a.json", json.dumps({"question": "q"}, indent=1), "it has question, of which"),
        (
            "a.json",
            json.dumps({f"key {i}": {"question": "q", "answer": "a"} for i in range(20_000)}),
            "it has key 0, key 1, key 2, key 3, key 4 and 19995 more, of which",
        ),
        (
            "a.json",
            json.dumps([{f"column {i}": 1 for i in range(20_000)}]),
            "it has column 0, column 1, column 2, column 3, column 4 and 19995 more",
        ),
    ],
)
def test_what_a_file_looks_like_is_reported_in_few_words(
    fails: Fails, tmp_path: Path, name: str, content: str, reason: str
) -> None:
    (tmp_path / name).write_text(content)
    assert len(fails(tmp_path / name, mentions=(name, reason))) < 600


@pytest.mark.parametrize(
    "names",
    [("missing", "answer"), ("question", "missing"), ("missing", "text"), ("Question", "answer")],
)
def test_a_column_that_is_named_must_be_there_even_beside_a_text(
    fails: Fails, tmp_path: Path, names: tuple[str, str]
) -> None:
    write_jsonl(
        tmp_path / "a.jsonl", table_of(FILLERS).rename_columns(["id", "question", "answer", "text"])
    )
    args = ["--question-column", names[0], "--answer-column", names[1]]
    fails(tmp_path / "a.jsonl", *args, mentions=names)


NO_TEXT = {"lists": pa.array([["가"]] * 40), "objects": pa.array([{"가": "나"}] * 40)}


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl", "json"])
@pytest.mark.parametrize("column", NO_TEXT.values(), ids=NO_TEXT.keys())
def test_a_column_that_holds_no_text_is_reported(
    fails: Fails, tmp_path: Path, suffix: str, column: pa.Array
) -> None:
    table = table_of(FILLERS)
    for name in ("question", "answer"):
        file = tmp_path / f"{name}.{suffix}"
        WRITERS[suffix](file, table.set_column(table.column_names.index(name), name, column))
        fails(file, mentions=(f"{name}.{suffix}", f"the column {name} holds", "not text"))


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("value", [["가"], {"가": "나"}])
def test_a_json_column_of_text_and_other_things_is_reported(
    fails: Fails, tmp_path: Path, suffix: str, value: object
) -> None:
    rows = [*table_of(FILLERS).to_pylist(), {"question": "가", "answer": value}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / f"a.{suffix}").write_text(lines if suffix == "jsonl" else json.dumps(rows))
    fails(tmp_path / f"a.{suffix}", mentions=(f"a.{suffix}",))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-20],
    "of bytes that mean nothing": lambda content: bytes(range(256)) * 40,
    "of zeros": lambda content: bytes(len(content)),
    "of a line": lambda content: b"no data",
    "of another kind": lambda content: b"<html>\n<p>404, 404</p>\n</html>\n",
    "changed in the middle": lambda content: content[:600] + b'\xff"' * 100 + content[800:],
}


DAMAGED = [
    (suffix, how)
    for suffix in WRITERS
    for how in DAMAGES
    if (suffix, how) not in {("csv", "half"), ("csv", "without its end")}  # a shorter CSV file
]


@pytest.mark.parametrize(("suffix", "how"), DAMAGED)
def test_a_file_that_is_damaged_is_reported(
    fails: Fails, tmp_path: Path, suffix: str, how: str
) -> None:
    content = write(tmp_path, f"good.{suffix}", FILLERS).read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(DAMAGES[how](content))
    fails(tmp_path / f"a.{suffix}", mentions=(f"a.{suffix}",))


BAD_CSV = {
    "an open quote": 'question,answer\na,b\n"c,d\n',
    "a value too many in a line": "question,answer\na,b\nc,d,e\n",
    "a value too many in all lines": "question,answer\na,b,c\nd,e,f\n",
    "no line of names": "a,b\nc,d\n",
}


@pytest.mark.parametrize("how", BAD_CSV)
def test_a_csv_file_that_is_not_in_order_is_reported(
    fails: Fails, tmp_path: Path, how: str
) -> None:
    (tmp_path / "a.csv").write_text(BAD_CSV[how])
    fails(tmp_path / "a.csv", mentions=("a.csv",))


def test_a_parquet_file_whose_text_is_not_utf_8_is_reported(fails: Fails, tmp_path: Path) -> None:
    table = table_of(FILLERS)
    binary = table["answer"].cast(pa.binary()).to_pylist()
    spoilt = pa.array([*binary[:-1], "답".encode("cp949")], pa.binary()).view(pa.string())
    write_parquet(tmp_path / "a.parquet", table.set_column(2, "answer", spoilt))
    fails(tmp_path / "a.parquet", mentions=("a.parquet",))


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv"])
def test_two_columns_of_the_same_name_are_reported(
    fails: Fails, tmp_path: Path, suffix: str
) -> None:
    table = table_of(FILLERS).rename_columns(["question", "question", "answer", "note"])
    WRITERS[suffix](tmp_path / f"a.{suffix}", table)
    fails(tmp_path / f"a.{suffix}", mentions=(f"a.{suffix}", "question"))


NOT_SAVED = {
    "nothing": "",
    "half": "{",
    "not UTF-8": "한글",
    "deep": "[" * 100_000,
    "an array": "[]",
    "an empty object": "{}",
    "no names": '{"splits": null, "_data_files": null}',
    "a file that is missing": '{"splits": ["b"], "_data_files": [{"filename": "b.arrow"}]}',
    "a Git LFS pointer": "version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("file", ["dataset_dict.json", "state.json"])
@pytest.mark.parametrize("content", NOT_SAVED.values(), ids=NOT_SAVED.keys())
def test_a_saved_dataset_that_is_not_in_order_is_reported(
    fails: Fails, tmp_path: Path, file: str, content: str
) -> None:
    """Even with good data beside it."""
    source = tmp_path / "a"
    if file == "state.json":
        saved(source)
    else:
        save(source, train=FILLERS)
    write(source, "a.jsonl", FILLERS)
    (source / file).write_bytes(content.encode("cp949"))
    fails(source, mentions=(str(source),))


def test_a_saved_dataset_of_git_lfs_pointers_is_reported(fails: Fails, tmp_path: Path) -> None:
    source = saved(tmp_path / "a")
    (file,) = source.glob("*.arrow")
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    fails(source, mentions=(file.name, "git lfs pull"))


def test_a_source_of_which_nothing_is_left_is_reported(fails: Fails, tmp_path: Path) -> None:
    for suffix in WRITERS:
        source = write(tmp_path, f"a.{suffix}", [(" ", "a"), ("a", ""), ("\n", "\u3000")])
        fails(source, mentions=(str(source), "nothing"))
    for suffix in ("parquet", "arrow", "csv"):
        WRITERS[suffix](tmp_path / f"b.{suffix}", table_of(FILLERS).slice(0, 0))
        fails(tmp_path / f"b.{suffix}", mentions=(f"b.{suffix}", "nothing"))
    for name, content in (("b.json", "[]"), ("b.jsonl", "\n \r\n")):
        (tmp_path / name).write_text(content)
        fails(tmp_path / name, mentions=(name, "nothing"))


@pytest.mark.parametrize(
    ("fractions", "split"),
    [((1e-9, 0.3), "valid"), ((0.3, 1e-9), "test"), ((0.5, 0.499999999), "train")],
)
def test_a_set_that_would_be_empty_is_reported(
    fails: Fails, tmp_path: Path, fractions: tuple[float, float], split: str
) -> None:
    source = write(tmp_path, "a.jsonl", FILLERS)
    args = ["--valid-fraction", fractions[0], "--test-fraction", fractions[1]]
    error = fails(source, *args, mentions=(f"{split}.jsonl", "fraction"))
    assert "--train-fraction" not in error
    fails(source, *args, "--dry-run", mentions=(f"{split}.jsonl",))


BAD_VALUES = {
    "--valid-fraction": ["1", "-0.1", "1.5", "nan", "inf", "x", "", "0.7"],
    "--test-fraction": ["1", "-0.1", "1.5", "nan", "inf", "x", "", "0.7"],
    "--limit": ["0", "-1", "1.5", "x", ""],
    "--seed": ["-1", "1.5", "x", ""],
    "--question-column": [""],
    "--answer-column": [""],
    "--context-column": [""],
    "--source": [""],
    "--output": [""],
    "--lim": ["3"],
    "--frobnicate": [],
}


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_a_command_line_that_makes_no_sense_is_reported_with_the_flag(
    fails: Fails, tmp_path: Path, flag: str
) -> None:
    """0.7 is too much beside the 0.3 of the other set."""
    source = write(tmp_path, "a.jsonl", FILLERS)
    for value in BAD_VALUES[flag]:
        fails(source, flag, value, mentions=(flag,))
    fails(source, flag, mentions=(flag,))


def test_a_wrong_command_line_is_reported(prepare: Run, tmp_path: Path) -> None:
    for flag in ("--limit", "--frobnicate"):
        one_error(prepare(tmp_path / "missing", tmp_path, flag, "0"), flag)


@pytest.mark.parametrize(
    ("name", "mention"),
    [("file", "file"), ("file/below", "file"), ("file/below/that", "file"), ("n" * 300, "nnn")],
)
def test_an_output_that_cannot_be_written_is_reported(
    prepare: Run, tmp_path: Path, name: str, mention: str
) -> None:
    (tmp_path / "file").write_text("text")
    source = write(tmp_path, "a.jsonl", FILLERS)
    before = listing(tmp_path)
    one_error(prepare(source, tmp_path / name), str(tmp_path / mention), "name another with --out")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["train.jsonl.part", "valid.jsonl.part", "test.jsonl.part"])
def test_a_folder_in_the_place_of_a_set_is_reported_and_no_other_set_replaced(
    prepare: Run, tmp_path: Path, name: str
) -> None:
    write_old_sets(tmp_path / "old")
    (tmp_path / "old" / name).unlink(missing_ok=True)
    (tmp_path / "old" / name).mkdir()
    source = write(tmp_path, "a.jsonl", FILLERS)
    before = listing(tmp_path)
    one_error(prepare(source, tmp_path / "old"), name)
    assert listing(tmp_path) == before


# --- What comes with the program ----------------------------------------------------------------


def test_the_sets_in_the_project_are_what_the_defaults_make(run: Run, tmp_path: Path) -> None:
    """From any folder."""
    ended = run("--output", "made", script=SCRIPT.name, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    made = read_bytes(tmp_path / "made")
    assert made == {name: (ROOT / "lora_finetune/data" / name).read_bytes() for name in made}
    assert counts_of(ended)["rows"] == len(all_of(read_sets(tmp_path / "made")))


def test_the_questions_and_answers_in_the_project_are_many_and_in_order() -> None:
    files = sorted((ROOT / "data/korean_textbooks_qa").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [json.loads(line) for line in lines]
    assert len(pairs) >= 400
    assert all(pair.keys() == {"question", "answer"} for pair in pairs)
    sides = [side for pair in pairs for side in pair.values()]
    assert all(side and side == unicodedata.normalize("NFC", side).strip() for side in sides)
    assert len({pair["question"] for pair in pairs}) == len(pairs)
    asked = [pair["question"].startswith("**Phi:** ") for pair in pairs]
    answered = [pair["answer"].startswith("**Epsilon:** ") for pair in pairs]
    assert asked == answered
    assert 0.2 < sum(asked) / len(pairs) < 0.3


HELP = {
    "--source": "data/korean_textbooks_qa",
    "--output": "lora_finetune/data",
    "--question-column": "question",
    "--answer-column": "answer",
    "--context-column": None,
    "--keep-chats": None,
    "--valid-fraction": "0.05",
    "--test-fraction": "0.05",
    "--seed": "0",
    "--limit": "all",
    "--form": "text",
    "--keep-splits": None,
    "--normalize": None,
    "--dry-run": None,
}


def test_help_names_every_flag_and_default(prepare: Run, tmp_path: Path) -> None:
    ended = prepare(tmp_path, tmp_path, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    options = " ".join(ended.stdout.partition("options:")[2].split())
    flags = dict(re.findall(r"(--[a-z-]+)((?:(?! --?[a-z]).)*)", options))
    assert flags.pop("--help")
    defaults = {flag: re.search(r"\(default: (.+)\)$", text) for flag, text in flags.items()}
    assert {flag: default and default[1] for flag, default in defaults.items()} == HELP


# --- The world around ---------------------------------------------------------------------------


def test_a_terminal_that_knows_no_korean_is_no_error(run: Run) -> None:
    ended = run("--dry-run", script=SCRIPT.name, env={"PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stderr) == (0, "")
    assert counts_of(ended)
    assert ended.stdout.count("### ??:") == 6


LISTENING = """
import os, runpy, sys
sys.argv.pop(0)
sys.addaudithook(
    lambda event, args: event.startswith("socket.") and os.write(2, f"{event} {args}\\n".encode())
)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_asks_nothing_of_the_network_and_leaves_nothing_in_a_cache(
    run: Run, tmp_path: Path
) -> None:
    args = ["--source", parts(tmp_path / "source"), "--output", tmp_path / "made", *WIDE]
    env = {"HF_HUB_OFFLINE": None, "HF_HOME": str(tmp_path / "hub"), "TMPDIR": str(tmp_path)}
    ended = run(*args, script=SCRIPT.name, python=("-c", LISTENING), env=env)
    assert (ended.returncode, other_warnings(ended)) == (0, [])
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "made", "hub"}
    cached = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert not sum(path.stat().st_size for path in cached)  # it may hold locks
