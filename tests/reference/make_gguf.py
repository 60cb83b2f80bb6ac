"""Make what llama.cpp's converter makes of adapters in PEFT's form, which `--export gguf` is to be.

The tests read gguf.json beside this file, and need neither llama.cpp nor PyTorch. To make it again:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36, and unpack it
    a Python with torch==2.13.0 and transformers==5.24.0, but 4.57.6, which the converter is
    made for, for granitemoehybrid: it does not know what 5 calls the kinds of its layers
    python make_gguf.py …/vendor/llama.cpp/convert_lora_to_gguf.py THAT-PYTHON

gguf.json holds for each type of model that is exported its keys, and the shape and the CRC-32 of
each tensor (float32) of an adapter of the model's last layer. The model is that of
architectures.json, the adapter's numbers are made from the names. llama.cpp (xllamacpp
2026.10.11549) was then asked for the logits of such models, of which PyTorch's folders were
converted, with these adapters and others of all layers: they are ours, to 1e-4 of them.
"""

import copy
import json
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import models  # noqa: E402
import tiny  # noqa: E402
from lora_finetune.adapters import export, gguf, peft  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from gguf import GGUFReader  # noqa: E402

FILE = HERE / "gguf.json"
CONFIGS = json.loads((HERE.parent / "architectures.json").read_text("utf-8"))
# Those that mlx-lm loads as others.
AS = {"mistral": "llama", "iquestcoder": "llama", "minimax_m2": "minimax"}
# Of Mistral 3, the converter writes the base in place of the adapter; of GPT-2 it turns pairs, so
# that llama.cpp refuses them; the others are like those in architectures.json.
NOT_CONVERTED = {"mistral3", "ministral3", "gpt2", "qwen2_5_vl", "gemma4_unified"}
NOT_CONVERTED |= {"qwen3_5_text", "qwen3_5_moe_text"}
# llama.cpp takes no LoRA of what linear attention puts out, and splits Granite's MLP.
NOT_ALL = ("granitemoehybrid", "qwen3_5", "qwen3_5_moe")
# Not all of their layers are alike.
HYBRIDS = ("granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "qwen3_5", "qwen3_5_moe")
NOT_IN_TRANSFORMERS = {
    "exaone": "ExaoneForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "iquestcoder": "IQuestCoderForCausalLM",
}


# Prints the names of transformers' classes by the types of models.
CLASSES = """
import json
from transformers.models.auto import modeling_auto as auto
names = dict(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
print(json.dumps(names | dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
"""


def make_model(name: str, folder: Path, kind: str | None = None) -> nn.Module:
    """A model with LoRA in its last layer, whose config.json is written into a folder.

    `kind` is its class in transformers.
    """
    config = tiny.LLAMA | CONFIGS[AS.get(name, name)]["config"]
    model = tiny.build_model(copy.deepcopy(config))
    config |= {"model_type": name, "architectures": [kind], "mtp_num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    number = len(model.layers) if name in HYBRIDS else 1
    targets = models.find_targets(model, number, "qv" if name in NOT_ALL else "all")
    models.add_lora(model, dict.fromkeys(targets, 2))
    for path, module in model.named_modules():
        if isinstance(module, models.LowRank):
            random = np.random.RandomState(zlib.crc32(path.encode()))
            for part in ("lora_a", "lora_b"):
                module[part] = mx.array(random.standard_normal(module[part].shape), mx.float32)
    return model


def content(file: Path) -> dict[str, dict]:
    """What a GGUF file has: keys, but for its name, and of each tensor shape and CRC-32."""
    reader = GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items() if name[:5] != "GGUF."}
    keys.pop("general.name")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    tensors = {t.name: [*t.shape.tolist(), zlib.crc32(t.data.tobytes())] for t in reader.tensors}
    return {"keys": keys, "tensors": dict(sorted(tensors.items()))}


def convert(name: str, kind: str, converter: str, python: str) -> dict:
    with tempfile.TemporaryDirectory() as place:
        folder, adapter = Path(place), Path(place, "adapter")
        adapter.mkdir()
        model = make_model(name, folder, kind)
        names, pairs = peft.module_names(model, folder), export.whole_pairs(model)
        peft.write(adapter, {names[path]: pair for path, pair in pairs.items()}, name)
        command = [python, converter, "--base", place, "--outfile", f"{place}/out.gguf", adapter]
        subprocess.run(command, check=True, stderr=subprocess.PIPE)
        return content(folder / "out.gguf")


def main() -> None:
    converter, python, *names = sys.argv[1:]
    found = subprocess.run([python, "-c", CLASSES], check=True, stdout=subprocess.PIPE)
    kinds = json.loads(found.stdout) | NOT_IN_TRANSFORMERS
    made = json.loads(FILE.read_text("utf-8"))
    for name in names or gguf.ARCHITECTURES.keys() - NOT_CONVERTED:
        made[name] = convert(name, kinds[name], converter, python)
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(made.items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
