"""`--show-texts`: training texts as the model gets them, with what the loss counts marked."""

from __future__ import annotations

import sys
from itertools import groupby, islice
from pathlib import Path

from lora_finetune.demo import demo_model
from lora_finetune.model_folder import tokenizer as tokenizers
from lora_finetune.model_folder.files import FILES, read_object
from lora_finetune.model_folder.hub import find_model
from lora_finetune.run.config import Config
from lora_finetune.texts import dataset, tokenizing
from lora_finetune.texts.chat import template_of

GREEN, PLAIN = "\033[32m", "\033[0m"  # a terminal's


def show(config: Config) -> None:
    """Print the first training texts; what counts is green on a terminal, else between ⟦ and ⟧.

    Of the model only the tokenizer is loaded.
    """
    file = dataset.read(Path(config.data, "train.jsonl"), config.mask_prompt)
    if not file.path.with_name("valid.jsonl").exists():
        file, *_ = dataset.hold_out(file, None)
    folder = find_model(config.model or str(demo_model.fetch()), only=FILES)
    tokenizer = tokenizers.load(folder, read_object(folder / "config.json"))
    template = template_of(tokenizer, config.chat_template_args)
    add_eos = bool(config.add_eos_token) and tokenizer.eos_token_id is not None
    marks = (GREEN, PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
    for number, row in islice(file.rows, config.show_texts):
        text = dataset.render_line(file.path, number, row, template, config.mask_prompt)
        examples = tokenizing.tokenize([text], tokenizer, add_eos, config.max_seq_length)
        tokens, counted = examples.tokens.tolist(), examples.is_target.tolist()
        said = [f"{len(tokens)} tokens, {sum(counted)} of them learnt"]
        said += ["cut at --max-seq-length"] * examples.num_truncated
        said += ["only the last answer can be found"] * text.last_only
        said += [f"the template leaves out {name}" for name in text.left_out]
        print(f"--- {file.path}, line {number}: {'; '.join(said)}")
        end, shown = 0, ""
        for counts, run in groupby(counted):
            end += len(list(run))
            whole = tokenizer.decode(tokens[:end])  # some decoders drop a space at the start
            piece, shown = whole[len(shown) :], whole
            print(piece.join(marks) if counts else piece, end="")
        print()
