"""Other builds of csrc/: by nvcc, by the emulator that runs CUDA kernels on a CPU, and under the sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CPU_SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
MAX_SPILL = 256  # bytes a thread, in the kernels for unaligned inputs and for fp64


def run(*command, **environment):
    # Of what this process runs under, these would make a child believe that it is a worker of pytest-xdist.
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=mine | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def run_op_tests(library, sources, *arguments, **environment):
    """The tests of the ops that these sources implement, on the native backend of this build of the extension."""
    files = [path for path in (ROOT / "tests" / f"test_{source.stem}.py" for source in sources) if path.exists()]
    assert files
    output = run(
        *(sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files, *arguments),
        **(environment | {"OMP_NUM_THREADS": "2", "RLHF_TEST_EXTENSION": str(library)}),
    )
    assert " passed" in output
    assert " skipped" not in output, "a kernel is missing in this build"
    return output


def preloaded():
    """The sanitizers' libraries, which must come before those of the interpreter."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"the C++ compiler has no {name}")
        libraries.append(path)
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}  # the interpreter never frees all


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda source: source.stem)
def test_cuda_compiles_without_warnings(source, tmp_path):
    includes = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    output = run(
        *("nvcc", "-c", "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-v"),
        *(flag for target in targets for flag in ("-gencode", target)),
        *(*includes, "-I", ROOT / "csrc"),
        *([] if torch.version.cuda else ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]),  # a header that only CUDA builds have
        *(source, "-o", tmp_path / "object.o"),
    )
    spills = [int(line.split(" bytes spill stores")[0].split()[-1]) for line in output.splitlines() if "spill" in line]
    assert spills, "the assembler's report has changed"
    assert max(spills) <= MAX_SPILL


# Left out: what takes long here, and a token outside of the vocabulary, for which a kernel on a GPU cannot raise.
MOST = "native and not out_of_range and not gradcheck and not batch_makes and not float64 and not float16"


def test_cuda_kernels_on_a_cpu(tmp_path):
    """The CUDA kernels, built for the CPU by a C++ compiler, under the sanitizers, with threads in either order."""
    run(sys.executable, "tests/cuda_emulator/build.py", tmp_path, "-O1", *SANITIZE)
    (library,) = tmp_path.glob("_C*.so")
    for order, selection in (("forward", MOST), ("reverse", "native and matches_formula and float32")):
        run_op_tests(library, CUDA_SOURCES, "-k", selection, CUDA_EMULATOR_ORDER=order, **preloaded())


def test_cpu_kernels_under_sanitizers(tmp_path):
    flags = " ".join(SANITIZE)
    run(
        *(sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "objects"),
        **{"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": "-fsanitize=address,undefined"},
    )
    (library,) = (tmp_path / "rlhf_kernels").glob("_C*.so")
    run_op_tests(library, CPU_SOURCES, "-k", "native", **preloaded())
