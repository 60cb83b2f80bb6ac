"""Prompts: put as the texts were that the adapter learnt, from the command line or a pipe."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import models
import templates
import tiny
from conftest import ROOT, Ended, Run, one_error
from lora_finetune.mlx_patches.loading import Limits
from lora_finetune.texts import chat, dataset, prompts, tokenizing
from test_chat import BOS, turns, write_tokenizer

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import AutoTokenizer

LIMITS = Limits(300, 4096)
# The model says "yes" after a colon, which ends the assistant's mark here.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT, TEXT = turns("물", "네"), {"text": "물은 물이다."}
PAIR = {"prompt": "물", "completion": "네"}
QUESTION = {"text": dataset.join_question("물", "네")}


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template in which the assistant's mark ends in a colon."""
    folder = tmp_path_factory.mktemp("models") / "speaker"
    return write_tokenizer(tiny.make_speaker(folder, b"yes", again=False), TEMPLATE)


@pytest.fixture(scope="module")
def plain_speaker(speaker: Path) -> Path:
    """The same model without a template."""
    return write_tokenizer(shutil.copytree(speaker, speaker.with_name("plain")), None)


def learn(call: Run, model: Path, folder: Path, entry: dict, *args: object) -> Ended:
    """Train on a single entry, without changing anything."""
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text(json.dumps(entry) + "\n", encoding="utf-8")
    fixed = ["--train", "--iters", 1, "--learning-rate", 0, "--lora-layers", 1, "--temp", 0]
    fixed += ["--model", model, "--data", folder, "--adapter-file", folder / "a.npz"]
    ended = call(*fixed, *args)
    assert ended.returncode == 0, ended.stderr
    return ended


def ask(call: Run, model: Path, folder: Path, *args: object) -> Ended:
    adapter = ["--adapter-file", folder / "a.npz"] if "--adapter-file" not in args else []
    return call("--model", model, *adapter, "--temp", 0, "--max-tokens", 5, *args)


def answers(ended: Ended) -> list[str]:
    """What was generated, with the prompts before it."""
    assert ended.returncode == 0, ended.stderr
    parts = ended.stdout.split("Generating\n")[1:]
    return [part.rpartition("\n==========")[0] for part in parts]


# --- The form that goes with what was learnt ----------------------------------------------------


@pytest.mark.parametrize("entry", [CHAT, PAIR], ids=["messages", "prompt and completion"])
def test_after_training_on_chats_a_prompt_goes_through_the_template(
    call: Run, speaker: Path, tmp_path: Path, entry: dict
) -> None:
    """In the same run, in a later one, with the best adapter, and in a resumed run."""
    ended = learn(call, speaker, tmp_path, entry, "--prompt", "물은?")
    assert answers(ended) == ["물은?\nyes"]
    assert answers(ask(call, speaker, tmp_path, "--prompt", "물은?")) == ["물은?\nyes"]
    best = ["--adapter-file", tmp_path / "a.run/best.npz"]
    assert answers(ask(call, speaker, tmp_path, *best, "--prompt", "물은?")) == ["물은?\nyes"]
    again = ["--resume-adapter-file", tmp_path / "a.npz", "--iters", 2, "--prompt", "물은?"]
    assert answers(learn(call, speaker, tmp_path, entry, *again)) == ["물은?\nyes"]


@pytest.mark.parametrize("entry", [TEXT, QUESTION], ids=["texts", "questions"])
def test_after_training_on_texts_a_prompt_goes_in_as_it_stands(
    call: Run, speaker: Path, tmp_path: Path, entry: dict
) -> None:
    learn(call, speaker, tmp_path, entry)
    assert answers(ask(call, speaker, tmp_path, "--prompt", "### 질문: 물:")) == [
        "### 질문: 물:yes"
    ]
    assert "yes" not in answers(ask(call, speaker, tmp_path, "--prompt", "물은?"))[0]


def test_without_a_template_a_prompt_and_completion_are_asked_for_as_they_were_learnt(
    call: Run, plain_speaker: Path, tmp_path: Path
) -> None:
    learn(call, plain_speaker, tmp_path, PAIR)
    assert answers(ask(call, plain_speaker, tmp_path, "--prompt", "물:")) == ["물:yes"]


def test_an_adapter_without_its_state_is_prompted_as_it_stands_which_is_said(
    call: Run, speaker: Path, tmp_path: Path
) -> None:
    learn(call, speaker, tmp_path, CHAT)
    (tmp_path / "a.run/state.npz").unlink()
    ended = ask(call, speaker, tmp_path, "--prompt", "물:")
    assert answers(ended) == ["물:yes"]
    assert "as they stand; --prompt-format chat" in ended.stderr
    asked = ["--prompt", "물은?", "--prompt-format", "chat"]
    assert answers(ask(call, speaker, tmp_path, *asked)) == ["물은?\nyes"]


@pytest.mark.parametrize("form", ["mlx-lm", "peft"])
def test_an_exported_adapter_is_prompted_as_it_learnt_and_exported_again_so(
    call: Run, speaker: Path, tmp_path: Path, form: str
) -> None:
    learn(call, speaker, tmp_path, QUESTION, "--export", form, tmp_path / "out")
    out = ["--adapter-file", tmp_path / "out", "--prompt", "물은?"]
    ended = ask(call, speaker, tmp_path, *out, "--export", "merged", tmp_path / "merged")
    assert answers(ended)[0].startswith("### 질문:\n물은?")
    assert "### 질문:" in (tmp_path / "merged/chat_template.jinja").read_text("utf-8")


def test_a_template_that_wants_thoughts_can_be_told_to_want_none(
    call: Run, speaker: Path, tmp_path: Path
) -> None:
    """DeepSeek V3.2's, which mlx-lm has as a program; the command printed at the end works."""
    model = shutil.copytree(speaker, tmp_path / "model")
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"chat_template_type": "deepseek_v32"}
    del settings["chat_template"]
    file.write_text(json.dumps(settings))
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(CHAT), encoding="utf-8")
    fixed = ["--train", "--iters", 1, "--lora-layers", 1, "--model", model, "--data", tmp_path]
    fixed += ["--adapter-file", tmp_path / "a.npz"]
    one_error(call(*fixed), "line 1", "without reasoning_content", "--chat-template-args")
    ended = learn(call, model, tmp_path, CHAT, "--chat-template-args", '{"enable_thinking": false}')
    [line] = [line for line in ended.outcome.splitlines() if line.startswith("Ask it:")]
    words = shlex.split(line)
    flags = next(i for i, word in enumerate(words) if word.startswith("--"))
    assert answers(call(*words[flags:], "--max-tokens", 2))


def test_a_prompt_that_went_through_a_template_already_is_not_put_through_it_again(
    call: Run, speaker: Path, tmp_path: Path
) -> None:
    learn(call, speaker, tmp_path, CHAT)
    prompt = "<s>user:물은?<|endoftext|>assistant:"
    assert answers(ask(call, speaker, tmp_path, "--prompt", prompt)) == [prompt + "yes"]


def test_the_forms_can_be_asked_for_by_hand(call: Run, speaker: Path, tmp_path: Path) -> None:
    learn(call, speaker, tmp_path, CHAT)
    asked = {
        form: answers(ask(call, speaker, tmp_path, "--prompt", "물", "--prompt-format", form))[0]
        for form in ("raw", "chat", "qa")
    }
    assert asked["raw"].startswith("물") and "yes" not in asked["raw"]
    assert asked["chat"] == "물\nyes"
    assert asked["qa"].startswith("### 질문:\n물\n\n### 답변:\n")
    wrapped = ["--prompt", "### 질문:\n물\n\n### 답변:", "--prompt-format", "qa"]
    assert answers(ask(call, speaker, tmp_path, *wrapped)) == [asked["qa"]]


def test_after_questions_a_prompt_gets_their_headings_and_one_line_says_so(
    call: Run, speaker: Path, tmp_path: Path
) -> None:
    learn(call, speaker, tmp_path, QUESTION)
    ended = ask(call, speaker, tmp_path, "--prompt", "물은?", "--prompt", "불은?")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("hint: ") and "--prompt-format qa" in ended.stderr
    by_hand = ask(call, speaker, tmp_path, "--prompt", "물은?", "--prompt-format", "qa")
    assert answers(ended)[:1] == answers(by_hand)
    assert "### 질문:\n물은?\n\n### 답변:\n" in ended.stdout
    for prompt in (["--prompt", QUESTION["text"]], ["--prompt", "물", "--prompt-format", "raw"]):
        assert ask(call, speaker, tmp_path, *prompt).stderr == ""


def test_an_answer_ends_at_the_special_token_that_the_template_ends_it_with(
    call: Run, tmp_path: Path
) -> None:
    """Also where it is not the tokenizer's end-of-text token, as with base models."""
    model = tiny.make_model(tmp_path / "model")
    write_tokenizer(model, TEMPLATE.replace("<|endoftext|>", "<|pad|>\n"))
    tokenizer = models.load(str(model))[1]
    template = chat.Template(tokenizer)
    [prompt] = prompts.encode(["물"], "chat", None, None, tokenizer, template, 9, LIMITS)
    assert prompt.end_tokens == {tiny.PAD}


# --- System messages ----------------------------------------------------------------------------


def prompt_of(tokenizer: TokenizerWrapper, text: str, form: str, system: str | None = None) -> str:
    template = chat.Template(tokenizer)
    [prompt] = prompts.encode([text], form, None, system, tokenizer, template, 9, LIMITS)
    return tokenizer.decode(prompt.tokens)


def test_a_system_message_goes_before_the_prompt(speaker: Path) -> None:
    tokenizer = models.load(str(speaker))[1]
    assert prompt_of(tokenizer, "물", "chat", "짧게.") == (
        "system:짧게.<|endoftext|>user:물<|endoftext|>assistant:"
    )


def test_a_system_message_is_refused_where_it_would_go_nowhere(
    call: Run, speaker: Path, plain_speaker: Path, tmp_path: Path
) -> None:
    learn(call, speaker, tmp_path, TEXT)
    system = ["--system", "짧게."]
    one_error(ask(call, speaker, tmp_path, "--test", *system), "--system")
    raw = ["--prompt", "물", "--prompt-format", "raw"]
    one_error(ask(call, speaker, tmp_path, *raw, *system), "--system")
    one_error(ask(call, speaker, tmp_path, "--prompt", "물", *system), "--prompt-format chat")
    form = ["--prompt", "물", "--prompt-format", "chat"]
    one_error(ask(call, plain_speaker, tmp_path, *form), "no chat template")


def test_a_system_message_that_the_template_does_not_take_is_an_error(tmp_path: Path) -> None:
    for template in (templates.GEMMA, templates.ZEPHYR.replace("'system', ", "")):
        model = tiny.make_model(tmp_path / str(len(template)))
        tokenizer = models.load(str(write_tokenizer(model, template)))[1]
        of_model = chat.Template(tokenizer)
        with pytest.raises(dataset.UserError, match=r"(?i)system"):
            prompts.encode(["물"], "chat", None, "짧게.", tokenizer, of_model, 9, LIMITS)


# --- The same tokens as in training -------------------------------------------------------------


def merge(folder: Path, *pairs: tuple[str, str]) -> None:
    """Give the tokenizer of a folder tokens that are two others together."""
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    for number, pair in enumerate(pairs):
        settings["model"]["vocab"]["".join(pair)] = 270 + number
    settings["model"]["merges"] = list(map(list, pairs))
    file.write_text(json.dumps(settings))


ANSWER = "answers."
LEARNT: dict[str, tuple[dict, str]] = {
    "chat": (turns("what?", ANSWER), "what?\n"),
    "chat with blanks": (turns("\n  what? ", ANSWER), "\n  what? "),
    "qa": ({"text": dataset.join_question("what?", ANSWER)}, "what?"),
    "raw": ({"prompt": "what? ", "completion": ANSWER}, "what? "),
}


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("written", ["", "<s>"])
@pytest.mark.parametrize("form", LEARNT)
@pytest.mark.parametrize("name", ["case", *templates.ALL])
def test_the_tokens_of_a_prompt_are_those_that_training_had_at_its_place(
    tmp_path: Path, name: str, form: str, written: str, adds_bos: bool
) -> None:
    """Also where the prompt ends in a space, which belongs to the token after it."""
    cases = json.loads((ROOT / "tests" / "cases" / "templates.json").read_text(encoding="utf-8"))
    template = templates.ALL.get(name, cases["plain"])
    model = tiny.make_model(tmp_path / "model")
    merge(model, ("Ġ", "a"), ("Ċ", "Ċ"))
    tokenizer = models.load(str(write_tokenizer(model, template, adds_bos)))[1]
    entry, asked = LEARNT[form]
    form = form.split()[0]
    if form == "raw":
        entry, asked = entry | {"prompt": written + entry["prompt"]}, written + asked
    of_model = chat.Template(tokenizer) if form == "chat" else None
    text = dataset.render(entry, of_model, mask_prompt=True)
    learnt = tokenizing.tokenize([text], tokenizer, True, 999)
    first = learnt.is_target.tolist().index(True)
    [prompt] = prompts.encode([asked], form, None, None, tokenizer, of_model, 9, LIMITS)
    assert prompt.tokens == learnt.tokens[:first].tolist()
    assert prompt.tokens.count(BOS) <= 1
    unmasked = tokenizing.tokenize([text._replace(answers=None)], tokenizer, True, 999)
    assert unmasked.tokens[:first].tolist() == prompt.tokens


# --- From the command line and from a pipe ------------------------------------------------------


@pytest.fixture
def pipe(
    call: Run, speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """A prompt on standard input, for an adapter without a state; `by=run` takes a real pipe."""
    tiny.make_adapter(tmp_path / "a.npz", range(1))

    def pipe(content: bytes, *args: object, by: Run = call) -> Ended:
        fixed = ["--model", speaker, "--adapter-file", tmp_path / "a.npz", "--temp", 0, "-m", 1]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        options = {} if by is call else {"input": content}
        return by(*fixed, "--prompt", "-", *args, **options)

    return pipe


def test_a_prompt_is_read_from_standard_input_to_its_end(
    pipe: Callable[..., Ended], run: Run
) -> None:
    ended = pipe("\ufeff물은\n\n무엇:\n".encode(), by=run)
    assert ended.returncode == 0, ended.stderr
    assert "Generating\n물은\n\n무엇:\n" in ended.stdout


@pytest.mark.parametrize(
    ("content", "mentions"), [(b"", "no prompt"), (b" \n", "no prompt"), (b"\xff\xfea", "UTF-8")]
)
def test_standard_input_without_a_prompt_is_an_error(
    pipe: Callable[..., Ended], content: bytes, mentions: str
) -> None:
    one_error(pipe(content), "standard input", mentions)


def test_standard_input_is_read_once(pipe: Callable[..., Ended]) -> None:
    one_error(pipe(b"a", "--prompt", "-"), "--prompt", "no prompt")


@pytest.mark.parametrize("kept_in", ["settings", "settings by name", "file", "JSON file"])
def test_a_merged_model_asks_in_the_form_of_the_questions_it_learnt(
    call: Run, speaker: Path, tmp_path: Path, kept_in: str
) -> None:
    """Its chat template makes the very text of training; the base's is kept beside it."""
    model = shutil.copytree(speaker, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    if kept_in == "settings by name":
        of_names = {"tool_use": f"{TEMPLATE}+", "default": TEMPLATE}
        settings["chat_template"] = [{"name": n, "template": t} for n, t in of_names.items()]
    elif kept_in == "file":
        (model / "chat_template.jinja").write_text(settings.pop("chat_template"))
    elif kept_in == "JSON file":
        of_processor = {"chat_template": settings.pop("chat_template")}
        (model / "chat_template.json").write_text(json.dumps(of_processor))
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    merged = tmp_path / "merged"
    ended = learn(call, model, tmp_path, QUESTION, "--export", "merged", merged)
    assert "chat_template.jinja puts questions below the headings" in ended.stderr
    assert (merged / "chat_template.base.jinja").read_text() == TEMPLATE
    assert "chat_template" not in json.loads((merged / "tokenizer_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(merged)
    asked = CHAT["messages"][:1]
    opened = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert opened == "### 질문:\n물\n\n### 답변:\n"
    if kept_in == "settings by name":
        assert tokenizer.get_chat_template("tool_use") == f"{TEMPLATE}+"
    whole = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert whole.startswith(QUESTION["text"] + tokenizer.eos_token)

    chats = tmp_path / "chats"
    learn(call, model, tmp_path, CHAT, "--export", "merged", chats)
    assert json.loads((chats / "tokenizer_config.json").read_text()) == settings
    assert {file.name for file in model.glob("chat*")} == {
        file.name for file in chats.glob("chat*")
    }


@pytest.mark.parametrize("scheme", ["never", "first", "always"])
@pytest.mark.parametrize("first", ["", "<s> ", "<|pad|> <s> "])
def test_the_template_of_questions_gives_the_tokens_of_training(
    plain_speaker: Path, tmp_path: Path, scheme: str, first: str
) -> None:
    """Where the tokenizer puts tokens, or a space, before each text."""
    model = shutil.copytree(plain_speaker, tmp_path / "model")
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    spaces = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([spaces, backend.pre_tokenizer])
    if first:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first}$A", special_tokens=[("<s>", BOS), ("<|pad|>", tiny.PAD)]
        )
    backend.save(str(model / "tokenizer.json"))
    tokenizer = models.load(model)[1]
    asked = tokenizer.apply_chat_template(
        CHAT["messages"][:1], add_generation_prompt=True, return_dict=False,
        chat_template=prompts.own_template(prompts.QA, tokenizer),
    )  # fmt: skip
    assert asked == tokenizer.encode("### 질문:\n물\n\n### 답변:\n")


def test_a_question_without_words_is_no_example(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": dataset.join_question(q, "네")}) for q in ("", "왜 그런가?", "왜?")
    ]
    (tmp_path / "valid.jsonl").write_text("\n".join(lines))
    assert prompts.example(dataset.read(tmp_path / "valid.jsonl", False)) == "왜?"


def test_an_answer_that_is_cut_says_so(call: Run, speaker: Path, tmp_path: Path) -> None:
    learn(call, speaker, tmp_path, CHAT)
    asked = ["--prompt", "물:", "--prompt-format", "raw"]
    assert "cut at --max-tokens" not in ask(call, speaker, tmp_path, *asked).stdout
    cut = ask(call, speaker, tmp_path, *asked, "--max-tokens", 2)
    assert cut.stdout.endswith("tokens/sec, cut at --max-tokens\n")


def test_the_model_alone_is_asked_and_tested_in_the_form_of_its_adapter(
    call: Run, speaker: Path, tmp_path: Path
) -> None:
    learn(call, speaker, tmp_path, CHAT)
    (tmp_path / "test.jsonl").write_text(json.dumps(CHAT) + "\n")
    log = (tmp_path / "a.run/log.jsonl").read_bytes()
    flags = ["--prompt", "물은?", "--test", "--data", tmp_path]
    adapted, alone = (ask(call, speaker, tmp_path, *flags, *f) for f in ([], ["--no-adapter"]))
    assert "Trainable parameters 0.000M" in alone.stdout
    assert answers(alone) == answers(adapted) == ["물은?\nyes"]  # it has learnt nothing
    assert "as messages of a chat, as in training" in alone.stderr
    assert "Test loss" in alone.stdout
    assert (tmp_path / "a.run/log.jsonl").read_bytes().startswith(log)
    assert (tmp_path / "a.run/log.jsonl").read_text().count("test_loss") == 1  # the adapter's
    nothing = ["--adapter-file", tmp_path / "none.npz", "--prompt", "물:"]
    assert answers(ask(call, speaker, tmp_path, *nothing, "--no-adapter")) == ["물:yes"]
    one_error(ask(call, speaker, tmp_path, *nothing), "none.npz", "--train", "--no-adapter")
    one_error(call("--train", "--no-adapter"), "--no-adapter")


def test_several_prompts_are_answered_in_order_after_one_load_each_as_alone(
    call: Run, speaker: Path, tmp_path: Path
) -> None:
    tiny.make_adapter(tmp_path / "a.npz", range(1))
    asked = ["--prompt", "물:", "-p", "불", "--prompt", "달:"]
    ended = ask(call, speaker, tmp_path, *asked, "--temp", 2)
    assert ended.stdout.count("Loading pretrained model") == 1
    alone = [
        answers(ask(call, speaker, tmp_path, "--prompt", prompt, "--temp", 2))[0]
        for prompt in asked[1::2]
    ]
    assert answers(ended) == alone
