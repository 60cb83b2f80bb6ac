"""Training texts as the model gets them, with what the loss counts marked."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from lora_finetune.texts import dataset, tokenizing
from lora_finetune.texts.chat import Template

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

GREEN, PLAIN = "\033[32m", "\033[0m"  # a terminal's


def show(
    file: dataset.File, tokenizer: TokenizerWrapper, template: Template | None,
    add_eos: bool, mask_prompt: bool, max_length: int,
) -> None:  # fmt: skip
    """Print the texts of a file; what counts is green on a terminal, and between ⟦ ⟧ elsewhere."""
    add_eos = add_eos and tokenizer.eos_token_id is not None
    marks = (GREEN, PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
    for number, row in file.rows:
        one = replace(file, rows=type(file.rows)([(number, row)]))
        left_out = dataset.render(row, template, mask_prompt).left_out
        texts = dataset.render_rows(one, template, mask_prompt)
        examples = tokenizing.tokenize(texts, tokenizer, add_eos, max_length)
        pairs = zip(examples.is_target.tolist(), examples.tokens.tolist(), strict=True)
        pieces = [(c, [t for _, t in run]) for c, run in groupby(pairs, lambda pair: pair[0])]
        said = [f"{len(examples.tokens)} tokens, {sum(examples.is_target)} of them learnt"]
        said += ["cut at --max-seq-length"] * examples.num_truncated
        said += [f"the template leaves out {name}" for name in left_out]
        print(f"--- {file.path}, line {number}: {'; '.join(said)}")
        for counts, tokens in pieces:
            text = tokenizer.decode(tokens)
            print(text.join(marks) if counts else text, end="")
        print()
