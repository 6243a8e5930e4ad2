"""The time of a call: the CPU's by its clock, a GPU's by events in its stream."""

import time
from typing import Any

import torch

EVICTION_BYTES = 256 << 20  # at least; more where the L2 is larger


class CpuClock:
    captures = False

    def evict(self) -> None:
        """A CPU's caches are left as they are: the cases are larger, or say what they are."""

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        return end - start


class CudaClock:
    """Events, so that what is counted is the GPU's time and not that of the calls that queue its work.

    The GPU is still at the eviction when a call's first launches are queued, as it is at earlier work in training; of
    a call that launches more slowly than the GPU works the launches show. A captured graph has none.
    """

    captures = True  # there are CUDA graphs

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
        self.buffer = torch.empty(max(EVICTION_BYTES, 2 * l2), dtype=torch.int8, device="cuda")

    def evict(self) -> None:
        """Nothing of the inputs is left in the L2."""
        self.buffer.zero_()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


Clock = CpuClock | CudaClock


def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()
