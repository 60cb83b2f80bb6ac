#!/bin/sh
# mlx-lm's streaming detokenizer for tokenizers that it has no special one for decodes each line on
# its own. Decoders such as Metaspace (sentencepiece's) drop the first space of what they decode, so
# that every line loses one, and code its indentation.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
cat > show.py <<'PYTHON'
import json
import sys
from pathlib import Path

import mlx_lm
import transformers
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pieces = ["<unk>", "</s>", "▁", "\n", "▁if", "▁x", ":", "y", "▁y"]
file = Tokenizer(models.Unigram([(piece, -1.0 - n) for n, piece in enumerate(pieces)], unk_id=0))
file.pre_tokenizer, file.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
file.add_special_tokens(["<unk>", "</s>"])
file.save("tokenizer.json")
Path("config.json").write_text('{"model_type": "llama"}')
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
Path("tokenizer_config.json").write_text(json.dumps(settings))

tokenizer = load_tokenizer(Path("."))
ids = tokenizer.encode("if x:\n y\n  y")
detokenizer, text = tokenizer.detokenizer, ""
for token in ids:
    detokenizer.add_token(token)
    text += detokenizer.last_segment
detokenizer.finalize()
text += detokenizer.last_segment
print("mlx-lm", mlx_lm.__version__, "transformers", transformers.__version__)
print("decoded: ", repr(tokenizer.decode(ids)))
print("streamed:", repr(text))
sys.exit((tokenizer.decode(ids), text) != ("if x:\n y\n  y", "if x:\ny\n y"))
PYTHON
venv/bin/python show.py
