#!/bin/sh
# transformers' apply_chat_template removes a message's null content before the template sees it. The
# template of DeepSeek-R1-Distill (as TRL carries it) shows tool calls only where the content is null,
# and raises where it is missing: so null contents raise, an empty string loses the call in silence,
# and only a template that is rendered directly shows it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers jinja2
"$folder/venv/bin/pip" install -q --no-deps trl==1.16.0
cd "$folder"
cat > show.py <<'PYTHON'
import sysconfig
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

print("transformers", version("transformers"), "and trl", version("trl"))
file = Path(sysconfig.get_path("purelib"), "trl/chat_templates/deepseek_r1_distill.jinja")
template = file.read_text(encoding="utf-8")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), bos_token="<s>"
)
call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Jeju"}'}}


def chat(content):
    asked = {"role": "user", "content": "Jeju?"}
    return [asked, {"role": "assistant", "content": content, "tool_calls": [call]}]


def applied(content):
    try:
        return tokenizer.apply_chat_template(chat(content), chat_template=template, tokenize=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


texts = {content: applied(content) for content in (None, "")}
for content, text in texts.items():
    print(f"apply_chat_template, content {content!r}:", text)
[[direct]] = render_jinja_template([chat(None)], chat_template=template, bos_token="<s>")[:1]
print("render_jinja_template, content None:", direct)
shown = ["weather" in text for text in (*texts.values(), direct)]
raise SystemExit(int(shown != [False, False, True] or "Undefined" not in texts[None]))
PYTHON
venv/bin/python show.py
