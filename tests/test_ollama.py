"""The Modelfile beside an exported GGUF file puts prompts as the adapter learnt its texts.

The templates in it were run by Go 1.27's text/template, as Ollama does, on the messages of chats:
of all of templates.py that are put into one, the texts were those that Jinja makes.
"""

from pathlib import Path

import templates
import tiny
from conftest import Run
from test_chat import turns, write_tokenizer
from test_prompts import learn

import pytest


def modelfile(
    call: Run,
    folder: Path,
    template: str | None,
    entry: dict,
    *args: object,
    adds_bos: bool = False,
) -> str:
    """What an adapter's Modelfile says behind the line of the adapter."""
    base = write_tokenizer(tiny.make_model(folder / "base"), template, adds_bos)
    ended = learn(call, base, folder, entry, "--export", "gguf", folder / "내 것 A.gguf", *args)
    file = folder / "내 것 A.Modelfile"
    assert f"  ollama create a -f '{file}'\n  ollama run a\n" in ended.stdout
    about, base_line, adapter, rest = file.read_text("utf-8").split("\n", 3)
    assert about.startswith(f"# The base, {base}: ")
    assert (base_line, adapter) == ("FROM ./base.gguf", "ADAPTER ./내 것 A.gguf")
    return rest


def test_questions_are_put_below_their_heading(call: Run, tmp_path: Path) -> None:
    """And answers before a next question end as those learnt; the last goes on from its heading."""
    question = {"text": "### 질문:\n물은?\n\n### 답변:\n끓는다."}
    assert modelfile(call, tmp_path, templates.CHATML, question) == (
        'TEMPLATE """### 질문:\n{{ .Prompt }}\n\n### 답변:\n{{ .Response }}<|endoftext|>\n\n"""\n'
        'PARAMETER stop "<|endoftext|>"\n'
    )


def test_texts_go_on_as_they_stand(call: Run, tmp_path: Path) -> None:
    said = modelfile(call, tmp_path, templates.CHATML, {"text": "물은 물이다."})
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in said


SYSTEM = '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}'
USER = '{{ else if eq .Role "user" }}{{ if eq $i 0 }}'
END = "{{ end }}{{ end }}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (  # a system message of its own where there is none
            templates.QWEN_2_5,
            f"{SYSTEM}<|im_start|>system\n{{{{ .Content }}}}<|im_end|>\n<|im_start|>user\n{USER}"
            "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n{{ end }}{{ .Content }}"
            "<|im_end|>\n<|im_start|>assistant\n{{ else }}{{ .Content }}<|im_end|>\n"
            f"<|im_start|>user\n{END}",
        ),
        (  # no system message; the beginning-of-text token, which Ollama adds
            templates.GEMMA,
            f"{SYSTEM}<start_of_turn>user\n{USER}<start_of_turn>user\n"
            "{{ end }}{{ .Content }}<end_of_turn>\n<start_of_turn>model\n"
            "{{ else }}{{ .Content }}<end_of_turn>\n"
            f"<start_of_turn>user\n{END}",
        ),
    ],
    ids=["Qwen 2.5", "Gemma"],
)
def test_a_chat_template_is_put_into_ollamas_language(
    call: Run, tmp_path: Path, template: str, expected: str
) -> None:
    said = modelfile(call, tmp_path, template, turns("물은?", "끓는다."), adds_bos=True)
    assert f'TEMPLATE """{expected}"""\nPARAMETER stop "' in said


def test_a_generation_prompt_that_is_in_no_earlier_turn_is_put_last(
    call: Run, tmp_path: Path
) -> None:
    """As with thinking turned off."""
    template = templates.QWEN_3.replace(
        "assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    assert template != templates.QWEN_3
    said = modelfile(call, tmp_path, template, turns("물은?", "끓는다."))
    assert (
        "{{ if eq (len (slice $.Messages $i)) 1 }}<|im_end|>\n<|im_start|>assistant\n<think>\n\n"
        "</think>\n\n{{ else }}<|im_end|>\n<|im_start|>assistant\n{{ end }}{{ else }}"
    ) in said


@pytest.mark.parametrize(
    "template", [templates.GPT_OSS, templates.CHATML.replace("assistant", "{{ '{{' }}")]
)
def test_without_a_simple_form_the_template_of_the_base_counts(
    call: Run, tmp_path: Path, template: str
) -> None:
    said = modelfile(call, tmp_path, template, turns("물은?", "끓는다."))
    assert said.startswith("# Without a TEMPLATE, that of the base counts.\nPARAMETER stop ")
