"""A Modelfile for Ollama: the base, how prompts go in, and what ends an answer."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lora_finetune.adapters.export import Export, modelfile_of
from lora_finetune.base.errors import print_line
from lora_finetune.base.files import atomic_write
from lora_finetune.texts import dataset, prompts
from lora_finetune.texts.chat import Chat, Template

from mlx_lm.tokenizer_utils import TokenizerWrapper


def write_all(
    exports: list[Export], base: str, learnt: str | None, template: Template | None,
    tokenizer: TokenizerWrapper,
) -> None:  # fmt: skip
    """Write a Modelfile for each adapter in a GGUF file, and print the commands that take it.

    `base` is the name of its model, `learnt` the format of the texts that it learnt, if known.
    """
    for gguf in [path for form, path in exports if form == "gguf"]:
        write(gguf, base, learnt, template, tokenizer)


def write(
    gguf: Path, base: str, learnt: str | None, template: Template | None,
    tokenizer: TokenizerWrapper,
) -> None:  # fmt: skip
    text, ends = None, set(tokenizer.eos_token_ids)
    if learnt == prompts.QA:
        text = dataset.join_question("{{ .Prompt }}", "{{ .Response }}")
        text += f"{tokenizer.eos_token or ''}\n\n"  # before a next question; else left out
    elif learnt == prompts.RAW:
        text = "{{ .Prompt }}"
    elif learnt == prompts.CHAT and template and (text := chat_template(template, tokenizer)):
        ends |= prompts.encode_chat("a", None, tokenizer, template, 1).end_tokens
    lines = [
        f"# The base, {base}: put the path of its GGUF file here, or its name in Ollama's library.",
        f"FROM ./{Path(base).name}.gguf",
        f"ADAPTER ./{gguf.name}",
        f'TEMPLATE """{text}"""' if text else "# Without a TEMPLATE, that of the base counts.",
        *(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(end)}"' for end in sorted(ends)),
    ]
    with atomic_write(file := modelfile_of(gguf)) as [stream]:
        stream.write("".join(f"{line}\n" for line in lines).encode())
    name = re.sub(r"[^a-z0-9._-]", "", gguf.stem.lower()).lstrip("._-") or "mine"
    print_line(f"For Ollama, put the base into {file}, then:")
    print_line(f"  ollama create {name} -f {shlex.quote(str(file))}\n  ollama run {name}")


def chat_template(template: Template, tokenizer: TokenizerWrapper) -> str | None:
    """A chat template in Go's language, as Ollama takes it; None where it cannot be put so.

    It can where messages stand between texts that depend on the roles before and after alone, but
    for what is before the first and after the last.
    """
    turns = [("user", "MESSAGE1"), ("assistant", "MESSAGE2"), ("user", "MESSAGE3")]
    start, *later = between(template, turns) or [""]
    with_system = between(template, [("system", "MESSAGE0"), *turns])
    answered = "".join(between(template, turns[:2], is_open=False)[:2])
    is_simple = later and between(template, turns[:1]) == [start, later[-1]]
    is_simple = is_simple and answered.startswith(start + later[-1])  # as prompts are put here
    is_simple = is_simple and with_system[2:] in ([], later) and not template.has_date
    if not is_simple or re.search('{{|}}|"""', start + "".join(with_system or later)):
        return None
    if tokenizer.encode("a")[0] == tokenizer.bos_token_id:  # llama.cpp adds it too
        bos = tokenizer.bos_token
        start, with_system = start.removeprefix(bos), [t.removeprefix(bos) for t in with_system]
    to_answer, to_next, end = later
    if end != to_answer:
        is_last = "{{ if eq (len (slice $.Messages $i)) 1 }}"
        to_answer = is_last + end + "{{ else }}" + to_answer + "{{ end }}"
    parts = [
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}',
        "{{ .Content }}".join(with_system[:2]) or start,  # some templates take none
        '{{ else if eq .Role "user" }}{{ if eq $i 0 }}',
        start + "{{ end }}{{ .Content }}" + to_answer,
        "{{ else }}{{ .Content }}" + to_next + "{{ end }}{{ end }}",
    ]
    return "".join(parts)


def between(template: Template, messages: list[tuple[str, str]], is_open: bool = True) -> list[str]:
    """The texts before, between and after messages; `is_open` for an answer at the end."""
    chat = Chat([{"role": role, "content": content} for role, content in messages])
    text = template.try_render(chat, add_generation_prompt=is_open)
    texts = re.split("|".join(content for _, content in messages), text)
    return texts if len(texts) == len(messages) + 1 else []
