"""A model's tokenizer is what its tokenizer.json says, whatever class its settings name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import models
import tiny
from conftest import Run

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece

SPECIAL = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2
TEXTS = ["나는 물을 마신다", "물 12 a b", "나는</s>물을 <s> 마신다", "a\n b\n\n  a b"]


def unigram() -> Tokenizer:
    """As Korean sentencepiece models are, with a token for the beginning of a text."""
    pieces = ["▁", "\n", "a", "b", "▁나는", "▁물", "을", "▁마신", "다", "1", "2", "물", "물을"]
    scores = [(piece, -1.0 - n) for n, piece in enumerate(pieces)]
    tokenizer = Tokenizer(Unigram([(token, 0.0) for token in SPECIAL] + scores, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return with_bos(tokenizer)


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def bpe_of_jamo() -> Tokenizer:
    """Byte by byte, after Hangul is taken apart; numbers whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *alphabet, "12"])}
    tokenizer = Tokenizer(BPE(vocabulary, [("1", "2")]))
    tokenizer.normalizer = normalizers.NFD()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def llama_2() -> Tokenizer:
    """Bytes where the vocabulary has no character; a space before the text, and not after </s>."""
    vocabulary = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁나는물을",
        "▁물",
        "는물",
    ]
    ids = {token: n for n, token in enumerate(vocabulary)}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(BPE(ids, [("▁", "물")], **options))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    tokens = [AddedToken(token, special=True, normalized=True) for token in SPECIAL]
    tokenizer.add_special_tokens(tokens)
    return with_bos(tokenizer)


def word_piece() -> Tokenizer:
    vocabulary = [*SPECIAL, "나는", "물", "##을", "마", "##신", "##다", "a", "b", "12"]
    tokenizer = Tokenizer(WordPiece({t: n for n, t in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def make_model(
    folder: Path, tokenizer: Tokenizer, class_: str | None, type_: str = "llama", **settings: object
) -> Path:
    """A model folder with a tokenizer; `settings` go into tokenizer_config.json, if not None."""
    tiny.make_model(folder, model_type=type_, bos_token_id=1, eos_token_id=2)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": class_, "bos_token": "<s>", "eos_token": "</s>"} | settings
    named = {key: value for key, value in named.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def load(folder: Path) -> TokenizerWrapper:
    return models.load(str(folder))[1]


def streamed(tokenizer: TokenizerWrapper, ids: list[int]) -> str:
    """Tokens as text, as generation prints it."""
    detokenizer, text = tokenizer.detokenizer, ""
    for token in ids:
        detokenizer.add_token(token)
        text += detokenizer.last_segment
    detokenizer.finalize()
    return text + detokenizer.last_segment


# --- Tokens -------------------------------------------------------------------------------------

# What transformers 5.24 makes something else of, or cannot build.
CASES = [
    (unigram, "LlamaTokenizerFast", "llama"),
    (unigram, "PreTrainedTokenizerFast", "qwen2"),
    (unigram, "XLMRobertaTokenizer", "llama"),
    (bpe_of_jamo, None, "qwen2"),
    (bpe_of_jamo, "GPT2TokenizerFast", "llama"),
    (bpe_of_jamo, "T5TokenizerFast", "llama"),
    (llama_2, "LlamaTokenizer", "llama"),
    (llama_2, "GemmaTokenizerFast", "llama"),
    (word_piece, "GPTNeoXTokenizerFast", "qwen2"),
    (word_piece, "BertTokenizerFast", "llama"),
]


@pytest.mark.parametrize(("make", "class_", "type_"), CASES)
def test_texts_become_the_tokens_of_tokenizer_json_and_tokens_its_text(
    tmp_path: Path, make: Callable[[], Tokenizer], class_: str | None, type_: str
) -> None:
    file, tokenizer = make(), load(make_model(tmp_path / "model", make(), class_, type_))
    for text in TEXTS:
        ids = file.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == file.decode(ids, skip_special_tokens=False)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, {2})


def test_korean_words_keep_the_tokens_that_the_model_has_for_them(tmp_path: Path) -> None:
    """What transformers 5.24 builds here has, after <s>, a token for each character or none."""
    tokenizer = load(make_model(tmp_path / "model", unigram(), "LlamaTokenizer", "llama"))
    assert tokenizer.encode("나는 물을 마신다") == [1, 7, 8, 9, 10, 11]


def test_what_a_class_does_with_texts_before_stays(tmp_path: Path) -> None:
    """The class of mlx-lm that writes <n> for the end of a line."""
    file = unigram()
    file.add_tokens([AddedToken("<n>", normalized=False)])
    tokenizer = load(make_model(tmp_path / "model", file, "NewlineTokenizer"))
    assert tokenizer.encode("나는\n물을") == file.encode("나는<n>물을").ids
    assert tokenizer.decode(file.encode("나는<n>물을").ids) == "<s> 나는\n 물을"


# --- Settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [True, False])
def test_a_beginning_of_text_is_added_where_tokenizer_json_does(tmp_path: Path, said: bool) -> None:
    """As in transformers, which does not read add_bos_token where there is a tokenizer.json."""
    adds = load(make_model(tmp_path / "adds", unigram(), "LlamaTokenizer", add_bos_token=said))
    assert adds.encode("나는") == [1, 7]
    file = unigram()
    file.post_processor = processors.TemplateProcessing("$A")
    without = load(make_model(tmp_path / "without", file, "LlamaTokenizer", add_bos_token=said))
    assert without.encode("나는") == [7]


def test_special_tokens_are_those_that_the_settings_name(tmp_path: Path) -> None:
    """A token that is only there is added; how one takes up spaces, tokenizer.json says."""
    strips = {"content": "</s>", "lstrip": True, "rstrip": True, "special": True}
    settings = {"eos_token": "<end>", "pad_token": "</s>", "added_tokens_decoder": {"2": strips}}
    tokenizer = load(make_model(tmp_path / "model", unigram(), "LlamaTokenizer", **settings))
    new = unigram().get_vocab_size()
    assert tokenizer.eos_token_id == new and tokenizer.pad_token_id == 2
    assert tokenizer.encode("나는 </s> 물<end>") == [1, 7, 3, 2, 8, new]


def test_a_token_that_only_a_class_names_is_none(tmp_path: Path) -> None:
    """Qwen2's has <|endoftext|> by default, which this model has no embedding for."""
    tokenizer = load(make_model(tmp_path / "model", unigram(), None, "qwen2", eos_token=None))
    assert tokenizer.eos_token_id is None
    assert len(tokenizer) == unigram().get_vocab_size()


def test_the_chat_template_stays(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    model = make_model(tmp_path / "model", unigram(), "LlamaTokenizer", chat_template=template)
    ids = load(model).apply_chat_template([{"role": "user", "content": "나는"}])
    assert ids == [7, 2]


@pytest.mark.parametrize(("said", "ends"), [([0, 5], {0, 2, 5}), (None, {2})])
def test_the_generation_settings_name_the_end_of_text(
    tmp_path: Path, said: object, ends: set[int]
) -> None:
    model = make_model(tmp_path / "model", unigram(), "LlamaTokenizer")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    assert load(model).eos_token_ids == ends


# --- What is said -------------------------------------------------------------------------------


def test_one_line_says_that_the_tokens_are_the_files(call: Run, tmp_path: Path) -> None:
    """In training and where an adapter is asked; in both the same tokens are taken."""
    model = make_model(tmp_path / "model", unigram(), "LlamaTokenizer")
    for split in ("train", "valid"):
        tiny.write_jsonl(tmp_path / "data", split, ["나는 물을 마신다", "물을 마신다"])
    adapter = ["--model", model, "--adapter-file", tmp_path / "a.npz"]
    data = ["--data", tmp_path / "data", "--batch-size", 2, "--lora-layers", 4]
    trained = call("--train", *adapter, *data)
    asked = call(*adapter, "--prompt", "나는 물을", "--prompt", "물을", "--max-tokens", 2)
    for ended in (trained, asked):
        assert ended.returncode == 0, ended.stderr
        [line] = ended.stderr.splitlines()
        assert line.startswith(f"warning: {model / 'tokenizer.json'} makes other tokens")
    assert "Iter 1: Train loss" in trained.stdout
    assert asked.stdout.count("나는 물을") == 1


def test_nothing_is_said_where_the_texts_have_the_same_tokens(call: Run, tmp_path: Path) -> None:
    """With this class only what follows a special token differs."""
    model = make_model(tmp_path / "model", llama_2(), "LlamaTokenizer")
    adapter = tiny.make_adapter(tmp_path / "a.npz")
    args = ["--model", model, "--adapter-file", adapter, "--max-tokens", 2, "--prompt"]
    assert call(*args, "나는 물을").stderr == ""
    assert "tokenizer.json" in call(*args, "나는</s>물을").stderr


def test_streamed_text_has_the_spaces_at_the_start_of_its_lines(tmp_path: Path) -> None:
    tokenizer = load(make_model(tmp_path / "model", unigram(), "PreTrainedTokenizerFast"))
    assert streamed(tokenizer, [7, 4, 8, 4, 3, 3, 5, 4]) == "나는\n 물\n  a\n"
