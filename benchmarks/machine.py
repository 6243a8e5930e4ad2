"""What the machine is, how fast it can go, and how much memory a call takes."""

import ctypes
import datetime
import importlib
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

STREAM_BYTES = 1 << 30  # far beyond any cache
MATMUL_SIZE = 2048


def environment(device: str) -> dict[str, str | int | float]:
    """What a reader needs to know to compare two results."""
    return {
        "device": device,
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # before anything ran: should be near 0
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _first_line([*shlex.split(os.environ.get("CXX", "c++")), "--version"]),
        "extension": _extension(),
        "commit": _first_line(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _extension() -> str:
    if importlib.util.find_spec("rlhf_kernels._C") is None:
        return "not built"
    info = importlib.import_module("rlhf_kernels._C").build_info()
    return ", ".join(f"{key} {value}" for key, value in info.items())


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return f"no {command[0]}"
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else "unknown"


def ceilings(device: str) -> dict[str, float]:
    """The rates that an op is held against: bytes per second of reading memory, FLOP per second of matrix products."""
    stream = torch.ones(STREAM_BYTES // 4, device=device)
    rates = {"read": STREAM_BYTES / _fastest(stream.sum)}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=device)
        rates[f"matmul {short(dtype)}"] = 2 * MATMUL_SIZE**3 / _fastest(lambda square=square: square @ square)
    return rates


def _fastest(call: Callable[[], object], repetitions: int = 10) -> float:
    """Seconds of the fastest run: a ceiling is what was reached at all."""
    call()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def peak_extra_bytes(call: Callable[[], object]) -> int | None:
    """How far the process's resident memory rose above where it stood before `call`, results of the call included.

    The kernel's own high-water mark, so it sees what any allocator takes, in whole pages. It is reset before the call
    and freed memory is handed back, so what an earlier call left behind cannot serve this one for nothing. None where
    this is not Linux with glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    kept = call()
    rise = _high_water() - before
    del kept
    return rise


def _high_water() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
