#!/bin/sh
# DecodeStream raises "Invalid prefix encountered" at tokens of bytes that are no whole character,
# which a model may well generate; decoding the same tokens at once gives U+FFFD.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
cd "$folder"
cat > show.py <<'PYTHON'
import sys

import tokenizers
from tokenizers import Tokenizer, decoders, models

vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256}
tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
ids = [0x61, 0xEA, 256, 0xEA, 256]
print("tokenizers", tokenizers.__version__)
print("decoded at once:", repr(tokenizer.decode(ids)))
stream, parts = decoders.DecodeStream(), []
try:
    for token in ids:
        parts.append(stream.step(tokenizer, token))
except Exception as error:
    print("decoded one by one:", parts, f"{type(error).__name__}: {error}")
else:
    sys.exit(f"it did not raise: {parts}")
PYTHON
venv/bin/python show.py
