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
from collections.abc import Callable
from pathlib import Path

import torch

import rlhf_kernels as rk

from .clock import Clock, clock_of

STREAM_BYTES = 1 << 30  # far beyond any cache
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def environment(device: str) -> dict[str, str | int | float]:
    """What a reader needs to know to compare two results."""
    return {
        "device": device,
        **(_gpu() if device == "cuda" else {}),
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # before anything ran: should be near 0
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _first_line([*shlex.split(os.environ.get("CXX", "c++")), "--version"]),
        "extension": rk.backend.extension_info(),
        "commit": _first_line(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu() -> dict[str, str | int | float]:
    properties = torch.cuda.get_device_properties("cuda")
    triton = importlib.util.find_spec("triton")
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size // 2**20,
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "power_limit": _first_line(["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader"]),
        "cuda": torch.version.cuda or "none",
        "triton": importlib.import_module("triton").__version__ if triton else "none",
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # not there, or not allowed
        return f"no {command[0]}"
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else "unknown"


def ceilings(device: str, repetitions: int = 10) -> dict[str, float]:
    """The rates that an op is held against: bytes per second of memory, FLOP per second of matrix products.

    "read" reads; "copy" counts the bytes read and the bytes written. Operands are random: zeros use less power, so
    they are multiplied at a higher clock. "matmul fp32" is without tf32.
    """
    clock = clock_of(device)
    torch.set_float32_matmul_precision("highest")
    stream = torch.ones(STREAM_BYTES // 4, device=device)
    copy = torch.empty_like(stream)
    rates = {
        "read": STREAM_BYTES / _fastest(stream.sum, clock, repetitions),
        "copy": 2 * STREAM_BYTES / _fastest(lambda: copy.copy_(stream), clock, repetitions),
    }
    size = MATMUL_SIZE[device]
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(size, size, device=device).to(dtype)
        fastest = _fastest(lambda square=square: square @ square, clock, repetitions)
        rates[f"matmul {short(dtype)}"] = 2 * size**3 / fastest
    return rates


def _fastest(call: Callable[[], object], clock: Clock, repetitions: int) -> float:
    """Seconds of the fastest run: a ceiling is what was reached at all."""
    call()
    seconds = []
    for _ in range(repetitions):
        clock.evict()
        start = clock.mark()
        call()
        seconds.append(clock.seconds(start, clock.mark()))
    return min(seconds)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def peak_extra_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """How far memory rose above where it stood before `call`, results of the call included.

    On a GPU what torch's allocator handed out. On a CPU the process's resident memory by the kernel's own high-water
    mark, so it sees what any allocator takes, in whole pages; it is reset before the call and freed memory is handed
    back, so what an earlier call left behind cannot serve this one for nothing. None where this is not Linux with
    glibc.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        kept = call()
        rise = torch.cuda.max_memory_allocated() - allocated
        del kept
        return rise
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
