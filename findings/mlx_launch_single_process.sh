#!/bin/sh
# mlx.launch -n 1 gives its program a file of hosts with nothing in it, and mx.distributed.init(),
# strict or not, raises at that file. Without mlx.launch the same program is a group of one.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4"
cd "$folder"
cat > show.py <<'PYTHON'
import os

import mlx.core as mx

print("mlx", mx.__version__)
if "MLX_HOSTFILE" in os.environ:
    with open(os.environ["MLX_HOSTFILE"]) as file:
        print("the file of hosts holds", repr(file.read()))
for strict in (False, True) if "MLX_HOSTFILE" in os.environ else (False,):
    try:
        print(f"strict={strict}: a group of", mx.distributed.init(strict=strict).size())
    except RuntimeError as error:
        print(f"strict={strict}: raised", error)
PYTHON
echo "- python show.py"
venv/bin/python show.py
echo "- mlx.launch -n 1 python show.py"
venv/bin/mlx.launch -n 1 venv/bin/python show.py < /dev/null > launched
cat launched
test "$(grep -c 'raised \[json.exception.parse_error' launched)" = 2
