"""The modules behind the scripts. Import this before mlx: it loads a fast BLAS on a Linux CPU."""

import sys

from lora_finetune.base import errors, linux_cpu  # noqa: F401

sys.excepthook = errors.report_uncaught
if sys.platform == "win32":
    raise ImportError("this does not run on Windows; run it in WSL2, its Linux (`wsl --install`)")
