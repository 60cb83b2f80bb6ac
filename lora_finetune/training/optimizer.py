"""What the optimizer does with a gradient, and the learning rate of each iteration."""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

SCHEDULES = ("constant", "linear", "cosine")
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam, in MLX as in PyTorch


class Optimizer(NamedTuple):
    """Adam or AdamW, with a learning rate by the iteration and a limit to the gradient.

    Attributes:
        learning_rate: the highest.
        iters: the last iteration of the run.
        warmup: iterations in which the rate rises, "100", or their share of the run, "5%".
        max_grad_norm: the largest L2 norm of all gradients together; None for no limit.
        weight_decay: AdamW's; 0 is Adam.
        bias_correction: whether the moments are corrected for their start at 0.
    """

    learning_rate: float
    iters: int = 1
    schedule: str = "constant"
    warmup: str = "0"
    max_grad_norm: float | None = None
    weight_decay: float = 0.0
    bias_correction: bool = False

    @property
    def varies(self) -> bool:
        """Whether the learning rate does, or might."""
        return (self.schedule, self.warmup) != ("constant", "0")

    @property
    def depends_on_length(self) -> bool:
        return self.schedule != "constant" or self.warmup.endswith("%")

    def rate(self, iteration: int) -> float:
        """The learning rate of iteration k of n, from 1 on, with a warmup of w iterations.

        It is peak · k / w for k = 1 … w, and w is 1 at least. Then, with d = (k − w) / (n − w + 1),
        it is peak (constant), peak · (1 − d) (linear) or peak · (1 + cos πd) / 2 (cosine): once the
        peak, and more than 0 to the end, so that the last iteration learns too.
        """
        number = float(self.warmup.removesuffix("%"))
        warmup = math.ceil(number * self.iters / 100) if "%" in self.warmup else int(number)
        warmup = max(warmup, 1)
        if iteration <= warmup:
            return self.learning_rate * iteration / warmup
        done = (iteration - warmup) / (self.iters - warmup + 1)
        factors = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * factors[self.schedule]

    def update(
        self, gradient: mx.array, parameters: mx.array, moments: dict
    ) -> tuple[mx.array, dict, mx.array]:
        """The parameters and moments after an iteration, and the norm of its gradient.

        With a limit X the gradient is first multiplied by min(1, X / norm). PyTorch divides by
        norm + 1e-6, against a norm of 0; here X / 0 is infinite, and min makes it 1.

        Adam is MLX's own, as it comes without bias correction: the default learning rate and
        recipes for MLX are made for it. With the correction, step t of rate r is PyTorch's:
        r / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε), which is Adam without it, at a rate of
        r · √(1 − β₂ᵗ) / (1 − β₁ᵗ) and with ε · √(1 − β₂ᵗ); these are computed in float64, where
        MLX's own correction loses digits in float32. AdamW first multiplies the parameters by
        1 − r · decay (Loshchilov and Hutter, 2019), as PyTorch does.

        Args:
            gradient: of the mean loss, float32 (n,), as `parameters` and the moments are.
            moments: Adam's `m` and `v`, the `steps` that they are of, and the run's `iteration`,
                the last one done; those given stay as they are.
        """
        iteration, steps = moments["iteration"] + 1, moments["steps"] + 1
        moments = moments | {"iteration": iteration, "steps": steps}  # Adam changes it in place
        norm = mx.sqrt(mx.square(gradient).sum())
        if self.max_grad_norm is not None:
            gradient = gradient * mx.minimum(1, self.max_grad_norm / norm)
        rate, corrections = self.rate(iteration), (1.0, 1.0)
        if self.weight_decay:
            parameters = parameters * (1 - rate * self.weight_decay)
        if self.bias_correction:
            corrections = 1 - BETAS[0] ** steps, math.sqrt(1 - BETAS[1] ** steps)
        adam = optim.Adam(rate * corrections[1] / corrections[0], BETAS, EPS * corrections[1])
        # Not compiled: on a GPU that would take seconds, and operations on one array are few.
        return adam.apply_single(gradient, parameters, moments), moments, norm
