"""The modules behind the scripts. Import this before mlx: it loads a fast BLAS on a Linux CPU."""

from lora_finetune.base import linux_cpu  # noqa: F401
