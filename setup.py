"""Builds rlhf_kernels._C from csrc/.

C++ for the CPU always; CUDA as well where nvcc and a CUDA build of torch are there (a GPU need not be). Install with
`pip install --no-build-isolation .`, so that the extension is built against the torch that will load it.

    RLHF_KERNELS_PORTABLE=1   code for any x86-64-v3 machine (wheels) instead of for this one
    RLHF_KERNELS_NO_EXT=1     no extension: every op runs on the torch backend
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]  # torch's headers have unused ones


def without_extension(reason: str) -> dict:
    print(f"rlhf_kernels: no C++ extension ({reason}); the torch backend will be used.", file=sys.stderr)
    return {}


def extension() -> dict:
    if os.environ.get("RLHF_KERNELS_NO_EXT") == "1":
        return without_extension("RLHF_KERNELS_NO_EXT=1")
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        return without_extension("torch is not visible to the build; install torch, then use --no-build-isolation")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return without_extension(f"no C++ compiler: {compiler} was not found")

    # Without -fno-trapping-math GCC keeps a branch for each comparison, and then no loop with a select is vectorised.
    maths = ["-fno-trapping-math", "-fno-math-errno"]
    arguments = {"cxx": ["-O3", "-std=c++20", "-fopenmp", *maths, *WARNINGS, *target_flags()]}
    cuda = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    kind = CppExtension
    if cuda and CUDA_HOME and torch.version.cuda:
        kind = CUDAExtension
        arguments["nvcc"] = ["-O3", "-std=c++20", "-lineinfo"]
    else:
        cuda = []
    # -fopenmp only when compiling: the runtime is the one torch has already loaded, so there is one thread pool.
    sources = ["csrc/module.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp"))), *cuda]
    headers = sorted(str(path) for path in Path("csrc").glob("**/*") if path.suffix in (".h", ".cuh"))
    module = kind(
        "rlhf_kernels._C",
        sources,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("RLHF_KERNELS_CUDA", None)] if cuda else [],
        depends=headers,
        extra_compile_args=arguments,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def target_flags() -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    if os.environ.get("RLHF_KERNELS_PORTABLE") == "1":
        return ["-march=x86-64-v3"]
    return ["-march=native", "-mprefer-vector-width=512"]  # GCC keeps to 256 bits; 512 halve the time of an exponential


setup(**extension())
