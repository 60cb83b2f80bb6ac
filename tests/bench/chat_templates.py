"""Where llama.cpp puts chats otherwise than training did: prints the first difference of each.

    llama-server -m BASE.gguf
    python tests/bench/chat_templates.py http://127.0.0.1:8080 [--model FOLDER] [--data FOLDER]

Of each chat in train.jsonl, that is what stands before its last answer. `train_lora.py
--show-texts` shows all of a text. The base is to be the same model; its own template counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.request
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402, F401
from lora_finetune.demo import demo_model  # noqa: E402
from lora_finetune.model_folder import tokenizer as tokenizers  # noqa: E402
from lora_finetune.model_folder.files import read_object  # noqa: E402
from lora_finetune.model_folder.hub import find_model  # noqa: E402
from lora_finetune.texts import dataset  # noqa: E402
from lora_finetune.texts.chat import Chat, Template, template_of  # noqa: E402

AROUND = 60  # characters shown on each side of a difference


def put_here(template: Template, chat: Chat) -> str:
    """The text before the last answer, as training had it."""
    last = len(chat.messages) - 1
    whole = template.render(chat)
    place = template.find(chat, whole, last)
    opened = template.render(chat.until(last), add_generation_prompt=True)
    return whole[: place[0]] if place else opened


def put_there(url: str, chat: Chat, arguments: dict) -> str:
    """What llama.cpp's server makes of the messages before the last answer."""
    request = {"messages": chat.messages[:-1], "chat_template_kwargs": arguments | chat.arguments}
    request |= {"tools": chat.tools} if chat.tools else {}
    body, kind = json.dumps(request).encode(), {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{url.rstrip('/')}/apply-template", body, kind)
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)["prompt"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", default=None)
    parser.add_argument("--data", default=ROOT / "lora_finetune" / "data", type=Path)
    parser.add_argument("--chat-template-args", default=None)
    parser.add_argument("--chats", default=20, type=int, help="how many (default: 20)")
    args = parser.parse_args()
    folder = find_model(args.model or str(demo_model.fetch()))
    tokenizer = tokenizers.load(folder, read_object(folder / "config.json"))
    template = template_of(tokenizer, args.chat_template_args)
    rows = dataset.read(args.data / "train.jsonl", False).rows
    for number, row in islice(rows, args.chats):
        if "messages" not in row:
            sys.exit(f"error: line {number} is no chat; name data with messages (--data)")
        messages = row["messages"]
        while messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        chat = Chat(messages, row.get("tools"), row.get("chat_template_kwargs", {}))
        here = put_here(template, chat)
        there = put_there(args.url, chat, template.arguments)
        bos = tokenizer.bos_token or ""
        if not there.startswith(bos):  # llama.cpp puts it there when it makes tokens
            here = here.removeprefix(bos)
        at = len(os.path.commonprefix([here, there]))
        print(f"line {number}: {'the same' if here == there else f'from character {at} on'}")
        if here != there:
            for name, text in (("training", here), ("llama.cpp", there)):
                print(f"  {name:9} … {text[max(at - AROUND, 0) : at + AROUND]!r}")


if __name__ == "__main__":
    main()
