"""`python -m rlhf_kernels`: what a bug report needs."""

import importlib.util
import platform

import torch

import rlhf_kernels


def main() -> None:
    print(f"rlhf_kernels {rlhf_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    triton = importlib.util.find_spec("triton") is not None
    print(f"CUDA {torch.version.cuda or 'none'}, Triton {'found' if triton else 'none'}, {platform.platform()}")
    print("extension:", rlhf_kernels.backend.extension_info())
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    tables = {device: rlhf_kernels.backend.table(device) for device in devices}
    for op in tables["cpu"]:
        print(f"  {op:28}", "  ".join(f"{device}: {table[op]}" for device, table in tables.items()))


if __name__ == "__main__":
    main()
