#!/bin/sh
# mlx.launch ends with status 0 where the program that it launched ended with another, so a shell's
# && goes on and a CI job passes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4"
cd "$folder"
venv/bin/python -c "import mlx.core as mx; print('mlx', mx.__version__)"
echo "raise SystemExit(3)" > fails.py
changed=0
for processes in 1 2; do
    status=0
    venv/bin/mlx.launch -n $processes venv/bin/python fails.py < /dev/null || status=$?
    echo "$processes of a program that ends with status 3: mlx.launch ends with $status"
    test $status = 0 || changed=1
done
exit $changed
