"""`--show-texts`: training texts as the model gets them, with what the loss counts marked."""

from __future__ import annotations

import sys
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from lora_finetune.base.errors import UserError
from lora_finetune.model_folder import tokenizer as tokenizers
from lora_finetune.model_folder.files import read_object
from lora_finetune.texts import dataset, tokenizing
from lora_finetune.texts.chat import template_of

if TYPE_CHECKING:
    from lora_finetune.run.config import Config

GREEN, PLAIN = "\033[32m", "\033[0m"  # a terminal's


def show(config: Config, folder: Path) -> None:
    """Print the first training texts; what counts is green on a terminal, else between ⟦ and ⟧.

    Args:
        folder: of the model, of which only the tokenizer is loaded.
    """
    file = dataset.read(Path(config.data, "train.jsonl"), config.mask_prompt)
    tokenizer = tokenizers.load(folder, read_object(folder / "config.json"))
    template = template_of(tokenizer, config.chat_template_args)
    add_eos = bool(config.add_eos_token) and tokenizer.eos_token_id is not None
    marks = (GREEN, PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
    for number, row in islice(list(file.rows), config.show_texts):
        try:
            text = dataset.render(row, template, config.mask_prompt)
        except ValueError as error:
            raise UserError(f"{file.path}, line {number}: {error}") from None
        examples = tokenizing.tokenize([text], tokenizer, add_eos, config.max_seq_length)
        said = [f"{len(examples.tokens)} tokens, {sum(examples.is_target)} of them learnt"]
        said += ["cut at --max-seq-length"] * examples.num_truncated
        said += ["only the last answer can be found"] * text.last_only
        said += [f"the template leaves out {name}" for name in text.left_out]
        print(f"--- {file.path}, line {number}: {'; '.join(said)}")
        pairs = zip(examples.is_target.tolist(), examples.tokens.tolist(), strict=True)
        for counts, some in groupby(pairs, lambda pair: pair[0]):
            shown = tokenizer.decode([token for _, token in some])
            print(shown.join(marks) if counts else shown, end="")
        print()
