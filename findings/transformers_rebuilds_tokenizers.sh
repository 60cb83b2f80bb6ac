#!/bin/sh
# AutoTokenizer builds the tokenizer anew by its class, or by the model's type, and takes no more
# than the vocabulary from tokenizer.json.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
cat > show.py <<'PYTHON'
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

transformers.utils.logging.set_verbosity_error()
special = ["<unk>", "<s>", "</s>"]
pieces = ["▁", "▁대한민국", "의", "▁수도", "는", "▁서울", "입니다", *"대한민국수도서울입니다"]
file = Tokenizer(
    models.Unigram(
        [(token, 0.0) for token in special]
        + [(piece, -1.0 - n) for n, piece in enumerate(dict.fromkeys(pieces))],
        unk_id=0,
    )
)
file.pre_tokenizer, file.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
file.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
file.add_special_tokens(special)

text = "대한민국의 수도는 서울입니다"
expected = file.encode(text).tokens
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("tokenizer.json itself:", expected)
others = 0
for model_type, name in [
    ("llama", "LlamaTokenizerFast"),
    ("qwen2", "PreTrainedTokenizerFast"),
    ("qwen3", None),
    ("gemma3_text", None),
    ("llama", "PreTrainedTokenizerFast"),
]:
    folder = Path(f"{model_type}-{name}")
    folder.mkdir()
    file.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"tokenizer_class": name} if name else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = AutoTokenizer.from_pretrained(folder)
    found = loaded.convert_ids_to_tokens(loaded.encode(text))
    print(f"{model_type}, tokenizer_class {name}: {type(loaded).__name__}", found)
    print("    decoded:", repr(loaded.decode(loaded.encode(text))))
    others += found != expected
sys.exit(others != 4)
PYTHON
venv/bin/python show.py
