"""What the optimizer does with a gradient, and the learning rate of each iteration."""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

SCHEDULES = ("constant", "linear", "cosine")


class Optimizer(NamedTuple):
    """Adam, with a learning rate by the iteration and a limit to the gradient.

    Attributes:
        learning_rate: the highest.
        iters: the last iteration of the run.
        warmup: iterations in which the rate rises, "100", or their share of the run, "5%".
        max_grad_norm: the largest L2 norm of all gradients together; None for no limit.
    """

    learning_rate: float
    iters: int = 1
    schedule: str = "constant"
    warmup: str = "0"
    max_grad_norm: float | None = None

    @property
    def varies(self) -> bool:
        """Whether the learning rate does, or might."""
        return (self.schedule, self.warmup) != ("constant", "0")

    @property
    def depends_on_length(self) -> bool:
        return self.schedule != "constant" or self.warmup.endswith("%")

    def rate(self, iteration: int) -> float:
        """The learning rate of iteration k of n, from 1 on, with a warmup of w iterations.

        It is peak · k / w for k = 1 … w; then, with d = (k − w) / (n − w), it is peak (constant),
        peak · (1 − d) (linear) or peak · (1 + cos πd) / 2 (cosine): 0 at k = n.
        """
        number = float(self.warmup.removesuffix("%"))
        warmup = math.ceil(number * self.iters / 100) if "%" in self.warmup else int(number)
        if iteration <= warmup:
            return self.learning_rate * iteration / warmup
        done = (iteration - warmup) / max(self.iters - warmup, 1)
        factors = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * factors[self.schedule]

    def update(
        self, gradient: mx.array, parameters: mx.array, moments: dict
    ) -> tuple[mx.array, dict, mx.array]:
        """The parameters and moments after an iteration, and the norm of its gradient.

        With a limit X the gradient is first multiplied by min(1, X / norm). PyTorch divides by
        norm + 1e-6, against a norm of 0; here X / 0 is infinite, and min makes it 1.

        Adam is MLX's own as it comes, without bias correction: the default learning rate and
        recipes for MLX are made for it.

        Args:
            gradient: of the mean loss, float32 (n,), as `parameters` and the moments are.
            moments: Adam's `m` and `v`, and the run's `iteration`, the last one done; those given
                stay as they are.
        """
        iteration = moments["iteration"] + 1
        moments = moments | {"iteration": iteration}  # a copy: Adam changes it in place
        norm = mx.sqrt(mx.square(gradient).sum())
        if self.max_grad_norm is not None:
            gradient = gradient * mx.minimum(1, self.max_grad_norm / norm)
        # Not compiled: on a GPU that would take seconds, and operations on one array are few.
        adam = optim.Adam(self.rate(iteration))
        return adam.apply_single(gradient, parameters, moments), moments, norm
