"""The tokenizer of a model's folder: what its tokenizer.json says, where it has one.

transformers 5 builds many tokenizers anew, by a class that the type of the model or the folder
names: it takes the vocabulary from tokenizer.json, but how texts are cut from the class.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_lm import tokenizer_utils
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# The files that name special and other added tokens, besides tokenizer.json.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a model's folder, with its chat template; may raise anything."""
    if (folder / "tokenizer.json").exists():
        # Within mlx-lm's loading, which derives more from the tokenizer.
        tokenizer_utils.AutoTokenizer = SimpleNamespace(from_pretrained=read)
    try:
        wrapper = load_tokenizer(folder, {"trust_remote_code": False}, config.get("eos_token_id"))
    finally:
        tokenizer_utils.AutoTokenizer = AutoTokenizer
    of_processor = folder / "chat_template.json"  # in which transformers' tokenizers do not look
    if not wrapper.has_chat_template and of_processor.exists():
        found = json.loads(of_processor.read_bytes()).get("chat_template")
        if isinstance(found, list):
            found = {each["name"]: each["template"] for each in found}
        wrapper.chat_template = found
        wrapper.has_chat_template = found is not None
    if type(wrapper._detokenizer) is NaiveStreamingDetokenizer:
        wrapper._detokenizer = Detokenizer(wrapper._tokenizer)
    return wrapper


def read(folder: Path, **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer that transformers builds, with tokenizer.json as that itself says inside.

    Where it can build none that works with tokenizer.json, the folder gives the settings alone. As
    `as_built`, the result has what transformers built: the `tokenizers.Tokenizer` that the file's
    has replaced, a tokenizer without one, or None.
    """
    try:
        tokenizer = built = AutoTokenizer.from_pretrained(folder, **options)
    except Exception:  # of any kind, where the class and the file do not go together
        built = None
    if not isinstance(built, PreTrainedTokenizerFast):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    of_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    of_file.encode_special_tokens = tokenizer.split_special_tokens
    # Tokens that are only in the settings are added; those that only a class names are not.
    files = [folder / name for name in SETTINGS if (folder / name).exists()]
    settings = " ".join(json.dumps(json.loads(file.read_bytes())) for file in files)
    known = {token.content for token in of_file.get_added_tokens_decoder().values()}
    added = [token for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    of_file.add_tokens(
        [t for t in added if t.content not in known and json.dumps(t.content) in settings]
    )
    tokenizer.as_built = getattr(built, "backend_tokenizer", built)
    tokenizer._tokenizer = of_file
    for name, token in tokenizer.special_tokens_map.items():
        if of_file.token_to_id(token) is None:
            setattr(tokenizer, name, None)
    return tokenizer


class Detokenizer(NaiveStreamingDetokenizer):
    """As mlx-lm's for any tokenizer, but a line that starts with a space keeps it.

    That decodes each line alone, where many decoders drop a space; here after the token before it.
    """

    def reset(self) -> None:
        super().reset()
        self._before = 0  # characters of _current_tokens that are in _text

    @property
    def text(self) -> str:
        line = self._tokenizer.decode(self._current_tokens)[self._before :]
        if line.endswith("\n"):
            self._text += line
            del self._current_tokens[:-1]
            self._before = len(self._tokenizer.decode(self._current_tokens))
            return self._text
        # What may become another character, or vanish, with the next token.
        return self._text + line.rstrip("\ufffd").removesuffix(" " * self._clean_spaces)

    def finalize(self) -> None:
        self._text += self._tokenizer.decode(self._current_tokens)[self._before :]
        self._current_tokens, self._before = [], 0
