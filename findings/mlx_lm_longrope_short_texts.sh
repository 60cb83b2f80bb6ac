#!/bin/sh
# mlx-lm: its longrope (Phi-3, Phi-4-mini, MiniCPM3, …) turns by the long factors whatever the length,
# and never reads the short ones, which its own docstring says are for texts below
# original_max_position_embeddings, as in the paper and in transformers. Asked for pairs of neighbours
# it rotates halves all the same (DeepSeek's layers ask for neighbours).
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2
"$folder/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
import numpy as np
from mlx_lm.models.rope_utils import initialize_rope

scaling = {
    "type": "longrope", "rope_type": "longrope", "original_max_position_embeddings": 4096,
    "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 4.0, 8.0],
}
rope = initialize_rope(8, 10000.0, False, scaling, 131072)
x = mx.broadcast_to(mx.eye(8)[:, None], (8, 2, 8))[None]  # unit vectors, in a text of two tokens
turned = np.array(rope(x))[0, :, 1]  # at position 1
angles = np.arctan2([turned[i, i + 4] for i in range(4)], [turned[i, i] for i in range(4)])
plain = 10000.0 ** -(np.arange(4) / 4)
print("mlx-lm 0.32.2, a text of 2 tokens, trained up to 4096")
print("frequencies by the short factors:", plain / scaling["short_factor"])
print("frequencies by the long factors: ", plain / scaling["long_factor"])
print("what is computed:                ", angles)
assert np.allclose(angles, plain / scaling["long_factor"], rtol=1e-4), "this has changed"

neighbours = initialize_rope(8, 10000.0, True, scaling, 131072)
print("asked for neighbours, it does the same as for halves:", mx.array_equal(neighbours(x), rope(x)))
assert mx.array_equal(neighbours(x), rope(x)), "this has changed"
PYTHON
