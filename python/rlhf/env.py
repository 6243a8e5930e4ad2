"""What a bug report needs: `rlhf env`, and the versions in run.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from . import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "accelerate", "datasets", "peft", "triton")
VARIABLES = ("RLHF_", "OMP_", "MKL_", "CUDA_", "TRITON_", "PYTORCH_", "HF_HUB_OFFLINE", "HF_HOME")
"""Beginnings of the environment variables that are shown."""
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""What is in the names of those that are not, such as RLHF_JUDGE_KEY: this goes into a public bug report."""


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what is installed of PACKAGES."""
    found = {"rlhf": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def print_environment() -> None:
    """Versions, CPU, GPUs, threads, settings, and the backend of each op."""
    import torch

    import rlhf_kernels.__main__

    for name, version in versions().items():
        print(f"{name:14} {version}")
    print(f"{'CPU':14} {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        print(f"{f'GPU {index}':14} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    for name in sorted(os.environ):
        if name.startswith(VARIABLES):
            hidden = any(word in name.upper() for word in SECRETS)
            print(f"{name} = {'(set, not shown)' if hidden else os.environ[name]}")
    print()
    rlhf_kernels.__main__.main()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
