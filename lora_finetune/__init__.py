"""The rooms behind the scripts. Import this before mlx: on a Linux CPU it loads a fast BLAS."""

from lora_finetune import linux_cpu  # noqa: F401
