"""Training steps of this program, or of mlx-lm as it comes, timed when a line asks for some.

    python step.py train_lora.py|mlx-lm MODEL

A line on standard input names the rows and the tokens of a row of a batch. The answer is a line:
the seconds of a step, as the mean of forty after eight, and the most memory in GB that the process
has held in them. All layers have LoRA on queries and values.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

# Takes the tokens of a batch, and how many steps to do on it.
Steps = Callable[[np.ndarray, int], None]


def plain_steps(folder: Path) -> Steps:
    """Steps as mlx_lm.lora does them, without anything of this program."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.freeze()
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    options = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, len(model.layers), options)
    model.train()
    optimizer = optim.Adam(learning_rate=2e-5)
    state = [model.state, optimizer.state, mx.random.state]
    function = nn.value_and_grad(model, default_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled(tokens: mx.array, lengths: mx.array) -> tuple:
        (loss, number), gradients = function(model, tokens, lengths)
        optimizer.update(model, gradients)
        return loss, number

    def steps(tokens: np.ndarray, number: int) -> None:
        for _ in range(number):
            lengths = mx.array([[0, tokens.shape[1] - 1]] * len(tokens))
            mx.eval(state, compiled(mx.array(tokens), lengths))

    return steps


def our_steps(folder: Path) -> Steps:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from lora_finetune.adapters import loading
    from lora_finetune.mlx_patches import patches
    from lora_finetune.mlx_patches.loading import load_as_stored
    from lora_finetune.training import losses
    from lora_finetune.training.step import Trainer

    import mlx.core as mx

    model = load_as_stored(folder)[0]
    mx.eval(model.parameters())  # else each compiled step would read them anew
    loading.adapt(model, {}, None, len(model.layers))
    loss = losses.make_loss(model)
    model.train()
    trainer = Trainer(model, loss, 2e-5, {})

    def steps(tokens: np.ndarray, number: int) -> None:
        is_target = np.arange(tokens.shape[1])[None].repeat(len(tokens), 0) > 0
        with patches.applied():
            batches = iter([[(tokens, is_target)]] * number)
            for _ in trainer.steps(batches, ahead=lambda: True):
                pass

    return steps


def main() -> None:
    contender, folder = sys.argv[1], Path(sys.argv[2])
    steps = {"mlx-lm": plain_steps, "train_lora.py": our_steps}[contender](folder)
    import mlx.core as mx

    for line in sys.stdin:
        rows, width = map(int, line.split())
        tokens = np.random.default_rng(0).integers(0, 300, (rows, width + 1)).astype(np.int32)
        mx.clear_cache()
        steps(tokens, 8)
        mx.reset_peak_memory()
        start = time.perf_counter()
        steps(tokens, 40)
        print((time.perf_counter() - start) / 40, mx.get_peak_memory() / 1e9, flush=True)


if __name__ == "__main__":
    main()
