"""A GGUF adapter is that of llama.cpp's converter, and says in llama.cpp what it says here.

reference/gguf.json has what the converter makes; reference/make_gguf.py makes it.
"""

import json
from pathlib import Path

from lora_finetune.adapters import export, gguf
from reference.make_gguf import FILE, NOT_CONVERTED, content, make_model

import pytest

REFERENCE = json.loads(FILE.read_text("utf-8"))


def test_every_type_of_model_was_compared():
    assert REFERENCE.keys() == gguf.ARCHITECTURES.keys() - NOT_CONVERTED


@pytest.mark.parametrize("name", REFERENCE)
def test_the_file_is_that_of_the_converter(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    export.write_all([("gguf", tmp_path / "a.gguf")], model, tmp_path, name)
    assert content(tmp_path / "a.gguf") == REFERENCE[name]
