"""Builds rlhf_kernels._C from csrc/.

C++ for the CPU always; CUDA as well where nvcc and a CUDA build of torch are there (a GPU need not be). Install with
`pip install --no-build-isolation .`, so that the extension is built against the torch that will load it.

    RLHF_KERNELS_PORTABLE=1   code for AVX-512, AVX2 and neither, chosen when it is loaded (wheels), instead of for this
                              machine
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
    # -fopenmp only when compiling: the runtime is the one torch has already loaded, so there is one thread pool.
    flags = ["-O3", "-std=c++20", "-fopenmp", "-fno-trapping-math", "-fno-math-errno", *WARNINGS]
    shared = {
        "include_dirs": [str(Path("csrc").resolve())],
        "depends": sorted(str(path) for path in Path("csrc").glob("**/*") if path.suffix in (".h", ".cuh")),
    }
    sources = ["csrc/module.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    modules = [
        CppExtension(f"rlhf_kernels.{name}", sources, extra_compile_args={"cxx": [*flags, *target]}, **shared)
        for name, target in targets().items()
    ]
    cuda = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    if cuda and CUDA_HOME and torch.version.cuda:
        arguments = {"cxx": flags, "nvcc": ["-O3", "-std=c++20", "-lineinfo"]}
        sources = ["csrc/module.cpp", *cuda]
        modules.append(CUDAExtension("rlhf_kernels._cuda", sources, extra_compile_args=arguments, **shared))
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


def targets() -> dict[str, list[str]]:
    """Modules of CPU kernels and what each is compiled for; the package loads the first that the machine can run."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"_C": []}
    wide = "-mprefer-vector-width=512"  # GCC keeps to 256 bits; 512 halve the time of an exponential
    if os.environ.get("RLHF_KERNELS_PORTABLE") != "1":
        return {"_C": ["-march=native", wide]}
    return {"_C_avx512": ["-march=x86-64-v4", wide], "_C_avx2": ["-march=x86-64-v3"], "_C": ["-march=x86-64-v2"]}


setup(**extension())
