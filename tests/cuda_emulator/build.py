"""Builds the CUDA kernels for the CPU: `python tests/cuda_emulator/build.py FOLDER [compiler flag …]` → FOLDER/_C.*.so.

    RLHF_TEST_EXTENSION=FOLDER/_C.….so python -m pytest tests/test_gae.py -k native

then runs the tests of an op on its CUDA kernels.
"""

import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def main(folder: Path, flags: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sources = [SOURCES / "module.cpp"]
    for source in sorted((SOURCES / "cuda").glob("*.cu")):
        wrapper = folder / f"{source.stem}.cpp"  # a C++ compiler asks for the ending
        wrapper.write_text(f'#include "cuda_runtime.h"\n#include "{source}"\n')
        sources.append(wrapper)
    extension = CppExtension(
        "_C",
        [str(source) for source in sources],
        include_dirs=[str(HERE), str(SOURCES)],
        extra_compile_args=[
            "-std=c++20",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unused-parameter",
            "-Wno-unknown-pragmas",
            *flags,
        ],
        extra_link_args=[flag for flag in flags if flag.startswith("-fsanitize")],
    )
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": BuildExtension},
        script_args=["-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
