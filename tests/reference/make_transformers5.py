"""Make the losses that PyTorch computes for folders as transformers 5 saves them.

The tests read transformers5.json beside this file, and need neither package. To make it again:

    pip install torch==2.13.0 transformers==5.24.0
    python make_transformers5.py

transformers5.json holds for each model:

    config   its config.json, as transformers saved it; what the model is made from
    shapes   the names and shapes of its weights, as transformers saved them
    loss     the mean cross-entropy, in nats, of the text below, in float32
    last     the logits of the last token for the first 16 of the vocabulary

Weights are not kept: `numbers` makes them from their names, here and in the tests. To add a model,
give it a config and nothing else.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

FILE = Path(__file__).with_name("transformers5.json")
TOKENS = np.random.RandomState(5).randint(3, 500, (1, 160))


def numbers(name: str, shape: list[int]) -> np.ndarray:
    """The numbers of an array, float32, from its name and shape.

    Of one axis around 1, as the weights of norms are; of more with a variance by the last axis,
    larger where they make queries and keys, so that attention looks at single tokens.
    """
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if len(shape) < 2 or "A_log" in name or "dt_bias" in name:
        return np.asarray(1 + 0.2 * random.standard_normal(shape), np.float32)
    gain = 2.0 if any(part in name for part in ("q_", "k_", "qkv", "query", "c_attn")) else 1.0
    fan = min(shape[-2:]) if len(shape) > 2 and shape[-2] > 1 else shape[-1]
    scale = 1.0 if "embed" in name or "wte" in name or "wpe" in name else gain / fan**0.5
    return np.asarray(scale * random.standard_normal(shape), np.float32)


def make(settings: dict) -> dict:
    """The entry of a model with these settings."""
    config = AutoConfig.for_model(**settings)
    is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and "vision_config" not in settings
    kind = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    with tempfile.TemporaryDirectory() as folder:
        kind.from_config(config, **options).save_pretrained(folder)
        file = Path(folder, "model.safetensors")
        shapes = {n: list(a.shape) for n, a in sorted(safetensors.numpy.load_file(file).items())}
        arrays = {name: numbers(name, shape) for name, shape in shapes.items()}
        safetensors.numpy.save_file(arrays, file, {"format": "pt"})
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        saved = json.loads(Path(folder, "config.json").read_text())
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits[0].double()
    loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:]).item()
    last = [round(number, 6) for number in logits[-1, :16].tolist()]
    return {"config": saved, "shapes": shapes, "loss": loss, "last": last}


def main() -> None:
    models = json.loads(FILE.read_text("utf-8"))
    names = sys.argv[1:] or list(models)
    for name in names:
        models[name] = make(models[name]["config"])
        print(f"{name:24} {models[name]['loss']:.5f}", flush=True)
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in models.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
