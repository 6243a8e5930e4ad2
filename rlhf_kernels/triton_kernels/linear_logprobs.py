"""linear_logprobs: chunks of rows, cuBLAS products with fp32 results, one row kernel a chunk."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import check_range, compute_dtype, valid_tokens, without_room
from . import token_logprobs
from .common import at_place, inner, launch, number, power_of_2, rows
from .fused_ppo_loss import launch_rows
from .token_logprobs import block_of, load_block, logit_gradient

MEMORY_BUDGET = 2 << 30  # bytes of logits at a time: 4096 rows of 128k; fewer make ∂weight's sum the bottleneck


@triton.jit
def _gather_rows_kernel(hidden, stride_h, index_ptr, inner, H, out_ptr, BLOCK_H: tl.constexpr):
    """Rows in the order of the index; zeros where it is −1, since 0 · NaN would reach ∂L/∂weight."""
    row, place = tl.program_id(0), tl.load(index_ptr + tl.program_id(0))
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    there = (h < H) & (tl.zeros((BLOCK_H,), tl.int64) + place >= 0)
    x = tl.load(at_place(hidden, place, inner) + h.to(tl.int64) * stride_h, mask=there, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * H + h, x, mask=h < H)


@triton.jit
def _scatter_rows_kernel(compact_ptr, index_ptr, H, out_ptr, BLOCK_H: tl.constexpr):
    row, place = tl.program_id(0), tl.load(index_ptr + tl.program_id(0))
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    x = tl.load(compact_ptr + row.to(tl.int64) * H + h, mask=h < H, other=0.0)
    there = (h < H) & (tl.zeros((BLOCK_H,), tl.int64) + place >= 0)
    tl.store(out_ptr + place * H + h, x.to(out_ptr.dtype.element_ty), mask=there)


class LiveRows(NamedTuple):
    """The rows that count, moved together on the device; at most `max_tokens` of them, on the CPU as many as there are.

    A GPU's products need a size that the host knows, so without `max_tokens` they take every row there.
    """

    places: Tensor  # [C] place of each row, −1 for none
    hidden: Tensor  # [C, H]
    tokens: Tensor  # [C], −1 for none
    missed: Tensor  # [...] bool: counts, but found no room

    @classmethod
    def of(cls, op: str, hidden: Tensor, tokens: Tensor, mask: Tensor | None, max_tokens: int | None) -> "LiveRows":
        valid = valid_tokens(tokens, mask)
        missed = without_room(op, valid, max_tokens)
        live = valid.reshape(-1)
        capacity = len(live) if max_tokens is None else min(len(live), max_tokens)
        seen = host_count(live)
        capacity = capacity if seen is None else min(capacity, seen)
        places = torch.arange(len(live), device=live.device)
        if capacity < len(live):
            places = live.logical_not().to(torch.uint8).argsort(stable=True)[:capacity]
            live = live[places]
        index = torch.where(live, places, -1)
        compact = hidden.new_empty(capacity, hidden.shape[-1])
        width, block = hidden.shape[-1], power_of_2(hidden.shape[-1], 16, 4096)
        grid = (capacity, triton.cdiv(width, block))
        source = (rows(hidden, 1), hidden.stride(-1), index, inner(tokens))
        launch(_gather_rows_kernel, grid, *source, width, compact, BLOCK_H=block)
        result = cls(index, compact, tokens, missed)
        return result._replace(tokens=torch.where(index < 0, -1, result.gather(tokens)))

    def gather(self, x: Tensor) -> Tensor:
        """Per-token values in the order of the rows; any value where the place is −1."""
        return x.reshape(-1)[self.places.clamp(min=0)]

    def scatter(self, compact: Tensor) -> Tensor:
        """Per-token results back in their places: 0 where nothing counts, NaN where a token found no room."""
        places = torch.where(self.places < 0, self.missed.numel(), self.places)
        out = compact.new_zeros(self.missed.numel() + 1).index_copy_(0, places, compact)
        return torch.where(self.missed, torch.nan, out[:-1].view(self.missed.shape))

    def scatter_rows(self, compact: Tensor, part: slice | Tensor, out: Tensor) -> None:
        """[n, H] rows to their places in out [..., H]."""
        block = power_of_2(compact.shape[-1], 16, 4096)
        grid = (compact.shape[0], triton.cdiv(compact.shape[-1], block))
        launch(_scatter_rows_kernel, grid, compact, self.places[part], compact.shape[-1], out, BLOCK_H=block)

    def chunks(self, vocabulary: int, memory_budget: int | None) -> list[slice]:
        """Chunks of equal size whose logits fit the budget, a multiple of 128 rows for the sake of the products."""
        n = len(self.places)
        most = max((memory_budget or MEMORY_BUDGET) // (vocabulary * compute_dtype(self.hidden).itemsize), 1)
        size = triton.cdiv(n, triton.cdiv(n, most)) if n else 1
        size = min(triton.cdiv(size, 128) * 128, most)
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def host_count(flags: Tensor) -> int | None:
    """How many are True, where the host can see it without waiting for a device."""
    return int(flags.sum()) if flags.device.type == "cpu" else None


@functools.cache
def _gives_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies such matrices there into an fp32 result; tried once, without waiting for the device."""
    if device.type == "cpu":
        return False
    a, out = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=torch.mm(a, a, out_dtype=torch.float32, out=out))
    except (RuntimeError, TypeError):
        return False
    return True


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """Of the logits' gradient: fp16 would lose what is below 6e-8 / token count; bf16 has the range of fp32."""
    return torch.bfloat16 if weight.dtype == torch.bfloat16 else compute_dtype(weight)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a · b, or out += a · b, in the dtype of a and b or wider: 16-bit operands go to the tensor cores as they
    are where torch sums them in fp32."""
    if a.dtype in (torch.bfloat16, torch.float16) and out.dtype == torch.float32 and _gives_fp32(a.dtype, a.device):
        if accumulate:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    a, b = a.to(out.dtype), b.to(out.dtype)
    return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)


class Chunk:
    """The logits of some rows in a buffer that is used again and again, and their gradient in the same memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows_: int) -> None:
        self.weight, self.bias = weight, bias
        self.buffer = weight.new_empty(rows_, weight.shape[0], dtype=compute_dtype(weight))
        self.dtype = gradient_dtype(weight)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = product(hidden, self.weight.T, self.buffer[: hidden.shape[0]])
        return logits if self.bias is None else logits.add_(self.bias)

    def copy(self, logits: Tensor) -> Tensor:
        return self.buffer[: logits.shape[0]].copy_(logits)

    def gradient(self, logits: Tensor) -> Tensor:
        """[n, V] over the memory of the logits; rows of a narrower dtype keep their distance."""
        return logits.view(self.dtype)[:, : logits.shape[1]]


class LinearGrads:
    """∂L/∂hidden, ∂L/∂weight and ∂L/∂bias, chunk by chunk: products with fp32 sums, rounded once."""

    def __init__(
        self, live: LiveRows, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], chunks: int
    ) -> None:
        self.live, self.weight, self.needs = live, weight, needs
        dtype = compute_dtype(weight)
        self.dhidden = torch.zeros(hidden.shape if needs[0] else 0, dtype=hidden.dtype, device=hidden.device)
        sum_dtype = gradient_dtype(weight) if chunks == 1 else dtype
        self.dweight = weight.new_empty(weight.shape if needs[1] else 0, dtype=sum_dtype)
        self.dbias = weight.new_zeros(weight.shape[0] if needs[2] else 0, dtype=dtype)
        self.bias_dtype = weight.dtype if bias is None else bias.dtype
        self.started = False

    def add(self, part: slice, dlogits: Tensor, nonzero: Tensor | None = None) -> None:
        """`nonzero`: the rows of the chunk that have a gradient; the others are left out where the host knows them."""
        index: slice | Tensor = part
        if nonzero is not None and (seen := host_count(nonzero)) is not None and seen < len(nonzero):
            kept = nonzero.nonzero().flatten()
            dlogits, index = dlogits[kept], kept + part.start
        if self.needs[0]:
            weight = self.weight.to(dlogits.dtype)
            out = weight.new_empty(dlogits.shape[0], weight.shape[1], dtype=compute_dtype(weight))
            self.live.scatter_rows(product(dlogits, weight, out), index, self.dhidden)
        if self.needs[1]:
            product(dlogits.T, self.live.hidden[index].to(dlogits.dtype), self.dweight, accumulate=self.started)
            self.started = True
        if self.needs[2]:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.needs[1] and not self.started:
            self.dweight.zero_()
        return self.dhidden, self.dweight.to(self.weight.dtype), self.dbias.to(self.bias_dtype)


def fwd(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    with_unit: bool,
    memory_budget: int | None,
    max_tokens: int | None,
    keep_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_range("token_logprobs", tokens, valid_tokens(tokens, mask), weight.shape[0])
    live = LiveRows.of("linear_logprobs", hidden, tokens, mask, max_tokens)
    chunks = live.chunks(weight.shape[0], memory_budget)
    outputs = hidden.new_empty(3, len(live.places), dtype=compute_dtype(hidden))
    unit = torch.zeros(hidden.shape if with_unit else 0, dtype=hidden.dtype, device=hidden.device)
    chunk = Chunk(weight, bias, chunks[0].stop if chunks else 0)
    kept = outputs.new_zeros((tokens.numel(), weight.shape[0]) if keep_logits else 0)
    for part in chunks:
        logits, chosen = chunk.logits(live.hidden[part]), live.tokens[part]
        if keep_logits:
            kept[part] = logits
        if with_unit:
            dlogits = chunk.gradient(logits)
            launch_rows(
                logits, chosen, None, temperature, softcap, outputs[0, part], None, dlogits, lse=outputs[2, part]
            )
            head = weight.to(dlogits.dtype)
            out = head.new_empty(dlogits.shape[0], head.shape[1], dtype=compute_dtype(head))
            live.scatter_rows(product(dlogits, head, out), part, unit)
        else:
            results = token_logprobs.fwd(logits, chosen, None, temperature, softcap, with_entropy)
            for output, result in zip(outputs, results):
                if result.numel():
                    output[part] = result
    logprobs, entropy, lse = outputs.unbind()
    return (
        live.scatter(logprobs),
        live.scatter(entropy) if with_entropy else entropy.new_empty(0),
        live.scatter(lse),
        unit,
        kept,
    )


@triton.jit
def _linear_logprobs_bwd_kernel(
    logits_ptr,
    tokens_ptr,
    V,
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    lse_ptr,
    entropy_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    dlogits_ptr,
    stride_gradient,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A row's gradient over its own logits, in a dtype that may be narrower: so one program a row, block by block."""
    row = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    token = tl.load(tokens_ptr + row)
    g, g_entropy, h = number(0.0, DTYPE), number(0.0, DTYPE), number(0.0, DTYPE)
    if grad_logprobs_ptr is not None:
        g = tl.load(grad_logprobs_ptr + row).to(DTYPE)
    if grad_entropy_ptr is not None:
        g_entropy = tl.load(grad_entropy_ptr + row).to(DTYPE)
        h = tl.load(entropy_ptr + row)
    lse, scale, cap = tl.load(lse_ptr + row), number(inverse_temperature, DTYPE), number(softcap, DTYPE)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        dx = tl.zeros((BLOCK_V,), DTYPE)
        if token >= 0:
            x = load_block(logits_ptr + row * V, start, 1, V, DTYPE, BLOCK_V, "")
            dx = logit_gradient(x, v, token, lse, h, g, g_entropy, scale, cap, SOFTCAP, grad_entropy_ptr is not None)
        tl.debug_barrier()  # every thread has read its block before one of them writes there
        tl.store(dlogits_ptr + row * stride_gradient + v, dx.to(dlogits_ptr.dtype.element_ty), mask=v < V)


def launch_gradient(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    softcap: float | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    dlogits: Tensor,
) -> None:
    """The gradient of [n, V] logits over themselves; per-row tensors are contiguous [n]."""
    block, warps = block_of(logits)
    launch(
        _linear_logprobs_bwd_kernel,
        (logits.shape[0],),
        logits,
        tokens,
        logits.shape[1],
        1 / temperature,
        softcap or 0.0,
        lse,
        entropy,
        grad_logprobs,
        grad_entropy,
        dlogits,
        dlogits.stride(0),
        warps=warps,
        SOFTCAP=softcap is not None,
        BLOCK_V=block,
    )


def bwd(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    needs: list[bool],
    memory_budget: int | None,
    max_tokens: int | None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    live = LiveRows.of("linear_logprobs", hidden, tokens, mask, max_tokens)
    chunks = live.chunks(weight.shape[0], memory_budget)
    grads = LinearGrads(live, hidden, weight, bias, needs, len(chunks))
    chunk = Chunk(weight, bias, chunks[0].stop if chunks else 0)
    totals = live.gather(lse)
    entropies = None if grad_entropy is None else live.gather(entropy)
    upstream = [None if grad is None else live.gather(grad) for grad in (grad_logprobs, grad_entropy)]
    for part in chunks:
        logits = chunk.logits(live.hidden[part]) if kept is None else chunk.copy(kept[part])
        dlogits = chunk.gradient(logits)
        entropy_, g, g_entropy = (None if x is None else x[part] for x in (entropies, *upstream))
        launch_gradient(logits, live.tokens[part], temperature, softcap, totals[part], entropy_, g, g_entropy, dlogits)
        grads.add(part, dlogits)
    return grads.result()
