"""Make what transformers calls in memory the weights that have another name in its checkpoints.

The tests read modules.json beside this file, and need neither package. To make it again:

    pip install torch==2.13.0 transformers==5.24.0
    python make_modules.py

modules.json holds, for each model of transformers5.json that has any, the names of matrices in its
checkpoint and those of the parameters that transformers reads them into, which PEFT adapts; not of
experts, nor of what sees images. They are told by their numbers.
"""

import json
import re
import tempfile
from pathlib import Path

import safetensors.numpy
import torch
from make_transformers5 import FILE, numbers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

OTHERS = re.compile(r"experts\.\d|vision|visual|audio|multi_modal|projector|patch_merge")


def renamed(entry: dict) -> dict[str, str]:
    """The names of matrices in a checkpoint -> those in memory, where they differ."""
    arrays = {name: numbers(name, shape) for name, shape in entry["shapes"].items()}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(entry["config"]))
        is_text = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
        is_text = is_text and "vision_config" not in entry["config"]
        kind = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
        file = Path(folder, "model.safetensors")
        safetensors.numpy.save_file(arrays, file, {"format": "pt"})
        model = kind.from_pretrained(folder, dtype=torch.float32)
    places = {p.numpy(force=True).tobytes(): n for n, p in model.named_parameters() if p.ndim == 2}
    found = {name: places.get(array.tobytes()) for name, array in arrays.items() if array.ndim == 2}
    return {n: p for n, p in found.items() if p and p != n and not OTHERS.search(n)}


def main() -> None:
    models = json.loads(FILE.read_text("utf-8"))
    found = {name: renamed(entry) for name, entry in models.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(names)}" for name, names in found.items() if names]
    FILE.with_name("modules.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
