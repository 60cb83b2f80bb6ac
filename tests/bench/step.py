"""Training steps of this program, of mlx-lm as it comes or of PEFT, timed at a line's request.

    python step.py train_lora.py|mlx-lm|peft|peft-compiled MODEL LAYERS

A line on standard input names the rows of a batch, the tokens of a row, and how many steps to do
after a fifth as many. The answer is a line: the mean of their seconds, and the most memory in GB
that the process has held in them. The last LAYERS have LoRA on queries and values.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

# Takes the tokens of a batch, and how many steps to do on it.
Steps = Callable[[np.ndarray, int], None]


def plain_steps(folder: Path, layers: int) -> Steps:
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
    linear_to_lora_layers(model, layers, options)
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


def our_steps(folder: Path, layers: int) -> Steps:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from lora_finetune.adapters import loading
    from lora_finetune.mlx_patches import patches
    from lora_finetune.mlx_patches.loading import load_as_stored
    from lora_finetune.training import losses
    from lora_finetune.training.optimizer import Optimizer
    from lora_finetune.training.step import Trainer

    import mlx.core as mx

    model = load_as_stored(folder)[0]
    mx.eval(model.parameters())  # else each compiled step would read them anew
    loading.adapt(model, {}, None, layers)
    loss = losses.make_loss(model)
    model.train()
    trainer = Trainer(model, loss, Optimizer(2e-5), {})

    def steps(tokens: np.ndarray, number: int) -> None:
        is_target = np.arange(tokens.shape[1])[None].repeat(len(tokens), 0) > 0
        with patches.applied():
            batches = iter([[(tokens, is_target)]] * number)
            for _ in trainer.steps(batches, ahead=lambda: True):
                pass

    return steps


def peft_steps(folder: Path, layers: int, is_compiled: bool = False) -> Steps:
    """Steps of PyTorch and PEFT in bfloat16, LoRA in float32, with Adam's fused kernel."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    number = model.config.num_hidden_layers
    last = list(range(number - layers, number))
    targets = ["q_proj", "v_proj"]
    options = {"r": 8, "lora_alpha": 160, "target_modules": targets, "layers_to_transform": last}
    model = get_peft_model(model, LoraConfig(**options))
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=2e-5, fused=True)
    if is_compiled:
        model = torch.compile(model)

    def steps(tokens: np.ndarray, number: int) -> None:
        inputs = torch.tensor(tokens[:, :-1], device="cuda", dtype=torch.long)
        for _ in range(number):
            model(input_ids=inputs, labels=inputs).loss.backward()
            adam.step()
            adam.zero_grad()
        torch.cuda.synchronize()

    return steps


CONTENDERS = {
    "mlx-lm": plain_steps,
    "train_lora.py": our_steps,
    "peft": peft_steps,
    "peft-compiled": partial(peft_steps, is_compiled=True),
}


def main() -> None:
    contender, folder, layers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    steps = CONTENDERS[contender](folder, layers)
    if contender.startswith("peft"):
        from torch import cuda

        clear, reset, peak = (
            cuda.empty_cache,
            cuda.reset_peak_memory_stats,
            cuda.max_memory_allocated,
        )
    else:
        import mlx.core as mx

        clear, reset, peak = mx.clear_cache, mx.reset_peak_memory, mx.get_peak_memory
    for line in sys.stdin:
        rows, width, number = map(int, line.split())
        tokens = np.random.default_rng(0).integers(0, 300, (rows, width + 1)).astype(np.int32)
        clear()
        steps(tokens, number // 5)
        reset()
        start = time.perf_counter()
        steps(tokens, number)
        print((time.perf_counter() - start) / number, peak() / 1e9, flush=True)


if __name__ == "__main__":
    main()
