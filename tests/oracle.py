"""The formulas in the plainest torch, independent of the package, and the comparison of an op with its formula.

Formulas work in the dtype they are given; `compare` gives them fp64 for the truth. Masked places are selected away by
indexing, so what stands there cannot matter.
"""

import contextlib
import math

import pytest
import torch
from hypothesis import HealthCheck, settings

import rlhf_kernels as rk

DEVICE = torch.get_default_device().type  # "cpu", or what RLHF_TEST_DEVICE says
BACKENDS = ("torch", "native", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "sliced", "transposed")
# [leading dimensions, V]: no row, T = 1, V = 1, off every block size, one row with a real vocabulary
LOGIT_SHAPES = ((0, 3, 7), (3, 0, 7), (2, 1, 7), (2, 3, 1), (3, 5, 7), (2, 2, 4097), (1, 1, 151936))
ROW_SHAPES = ((0, 4), (3, 0), (3, 1), (1, 9), (5, 33))

# The backend fixture holds for a whole test, so for every example of it.
property_test = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@contextlib.contextmanager
def on_backend(name, *ops):
    for op in ops:
        if not rk.backend.has(op, name, DEVICE):
            pytest.skip(f"no {name} kernel for {op} on {DEVICE}")
    with rk.use_backend(name):
        yield


# ---------------------------------------------------------------------------------------------------- making inputs


def masks(*shape):
    """One mask of each kind: random (with an empty and a full row if there is room), all masked, everything valid."""
    random = torch.rand(shape) < 0.6
    if shape[0] > 2:
        random[0], random[1] = False, True
    else:
        random[..., :1] = True
    return {"random": random, "none": torch.zeros(shape, dtype=torch.bool), "all": torch.ones(shape, dtype=torch.bool)}


def random_mask(*shape):
    return masks(*shape)["random"]


def relayout(x, layout):
    """The same values in other strides: "sliced" out of a tensor of NaN, or with the "transposed" order of memory."""
    if layout == "sliced":
        surround = torch.full([n + 2 for n in x.shape], math.nan if x.is_floating_point() else 1).to(x.dtype)
        return surround[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.clone()


def poison(x, mask, value=math.nan):
    """x with `value` where masked; mask may have fewer dimensions than x."""
    return x.masked_fill(~mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim)), value)


def rearrange(x, order, left, right):
    """Rows in another order, columns added on both sides: NaN in floats, 0 in the rest (False in a mask)."""
    fill = math.nan if x.is_floating_point() else 0
    if x.ndim == 1:
        return x[order]
    shape = list(x.shape)
    shape[1] += left + right
    wide = torch.full(shape, fill).to(x.dtype)
    wide[:, left : left + x.shape[1]] = x[order]
    return wide


def restore(x, order, left, right):
    """Undoes `rearrange` on a result."""
    back = torch.empty_like(x)
    back[order] = x
    return back if x.ndim == 1 else back[:, left : x.shape[1] - right]


# --------------------------------------------------------------------------------------------------------- comparing


def flatten(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flatten(part)]


def evaluate(function, inputs, wrt, scalars, differentiable=None, grad_layout="contiguous"):
    """Outputs of `function`, and the gradients of Σ weights · output by the inputs named in `wrt`."""
    leaves = {name: x.detach().requires_grad_() if name in wrt else x for name, x in inputs.items()}
    outputs = flatten(function(**leaves, **scalars))
    if differentiable is None:
        differentiable = [i for i, output in enumerate(outputs) if output.requires_grad]
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = [torch.randint(1, 9, x.shape, generator=generator).to(x.dtype) / 8 for x in outputs]
    gradients = []
    if wrt:
        assert differentiable, "nothing to differentiate"
        gradients = torch.autograd.grad(
            [outputs[i] for i in differentiable],
            [leaves[name] for name in wrt],
            [relayout(weights[i], grad_layout) for i in differentiable],
            allow_unused=True,
            materialize_grads=True,
        )
    return [x.detach() for x in outputs], list(gradients), differentiable


def compare(
    op,
    formula,
    inputs,
    *,
    wrt=(),
    dtype=torch.float64,
    layout="contiguous",
    rtol=1e-5,
    atol=1e-6,
    products=False,
    **scalars,
):
    """Values and gradients of `op` against its formula in fp64 on the same rounded inputs.

    An element may be off by rtol · |exact| + atol (both times 1e-6 for fp64; a gradient in a narrow dtype may be off
    by its last place) plus twice the largest error that the formula itself makes in the op's compute dtype, which is
    fp32 for narrow inputs; for gradients that are matrix products (`products`) in the narrow dtype itself.
    """
    compute = torch.promote_types(dtype, torch.float32)
    if dtype == torch.float64:
        rtol, atol = 1e-6 * rtol, 1e-6 * atol

    def cast(to):
        return {name: x.to(dtype).to(to) if x.is_floating_point() else x for name, x in inputs.items()}

    given = {name: relayout(x, layout) for name, x in cast(dtype).items()}
    values, gradients, which = evaluate(op, given, wrt, scalars, grad_layout=layout)
    exact_values, exact_gradients, _ = evaluate(formula, cast(torch.float64), wrt, scalars, which)
    eager_values, eager_gradients, _ = evaluate(formula, cast(compute), wrt, scalars, which)
    if products and dtype != compute:
        _, eager_gradients, _ = evaluate(formula, cast(dtype), wrt, scalars, which)
    assert len(values) == len(exact_values)
    for i, triple in enumerate(zip(values, exact_values, eager_values)):
        assert triple[0].dtype == compute, f"output {i} is {triple[0].dtype}"
        _assert_within(f"output {i}", *triple, rtol, atol)
    for name, *triple in zip(wrt, gradients, exact_gradients, eager_gradients):
        assert triple[0].dtype == dtype, f"the gradient of {name} is {triple[0].dtype}"
        _assert_within(f"gradient of {name}", *triple, max(rtol, torch.finfo(dtype).eps), atol)


def _assert_within(what, actual, exact, eager, rtol, atol):
    assert actual.shape == exact.shape, f"{what} has shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    actual = actual.double()
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(), exact[~finite].nan_to_num()), f"{what}: not finite in other places"
    actual, exact, eager = actual[finite], exact[finite], eager[finite].double()
    slack = 2 * (eager - exact).abs().nan_to_num(0, 0, 0).max() if exact.numel() else 0
    error = (actual - exact).abs()
    allowed = atol + rtol * exact.abs() + slack
    worst = (error - allowed).nan_to_num(math.inf).max() if exact.numel() else -1
    assert worst <= 0, f"{what}: off by {error.max():.3g}, allowed {allowed.max():.3g}"


def refuses(message):
    """A ValueError that needs a look at the data: the host sees a CPU's, for a GPU's it would have to wait."""
    return pytest.raises(ValueError, match=message) if DEVICE == "cpu" else contextlib.nullcontext()


def close(actual, expected, **tolerance):
    """`torch.testing.assert_close` with NaN equal, whatever the dtypes; rtol 1e-5, atol 1e-6 unless given."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True, "check_dtype": False, **tolerance}
    expected = torch.as_tensor(expected, dtype=None if isinstance(expected, torch.Tensor) else actual.dtype)
    torch.testing.assert_close(actual, expected, **tolerance)


def product_flops(function):
    """Floating-point operations of the matrix products that a call really issues, backward passes included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    flops = 0
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            flops += 2 * a[0] * a[1] * b[1]
    return flops


# ---------------------------------------------------------------------------------------------------------- formulas


def scatter(mask, selected, shape=None):
    """A tensor that is 0 but for `selected` at the True places of the mask."""
    return torch.zeros(shape or mask.shape, dtype=selected.dtype).masked_scatter(mask, selected)


def token_logprobs_entropy(logits, tokens, mask=None, *, temperature=1.0, softcap=None):
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    u = logits[mask]
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    logp = torch.log_softmax(u / temperature, -1)
    logprobs = logp.gather(-1, tokens[mask][:, None].long()).squeeze(-1)
    return scatter(mask, logprobs), scatter(mask, -(logp.exp() * logp).sum(-1))


def token_logprobs(logits, tokens, mask=None, *, temperature=1.0, softcap=None):
    return token_logprobs_entropy(logits, tokens, mask, temperature=temperature, softcap=softcap)[0]


KL = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: (-d).exp() - 1 + d,
    "abs": lambda d: d.abs(),
    "pos": lambda d: d * (d > 0),
}


def token_rewards(scores, logprobs, ref_logprobs, mask, attention=None, *, kl_coef, beta, kl_estimator="k1"):
    rewards, kl = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    for b in range(len(scores)):
        places = mask[b].nonzero().flatten()
        if len(places) == 0:
            continue
        kl[b, places] = KL[kl_estimator](logprobs[b, places] - ref_logprobs[b, places])
        if scores.ndim == 2:
            rewards[b, places] = scores[b, places]
            continue
        share = 1.0
        if attention is not None:
            share = 1 - beta
            rewards[b, places] += beta * scores[b] * attention[b, places] / attention[b, places].sum()
        rewards[b, places[-1]] += share * scores[b]
    return rewards - kl_coef * kl, kl


def gae(rewards, values, mask, *, gamma=1.0, lam=0.95):
    """A_t = Σ_l (γλ)^l δ_{t+l} over the True places, as a sum and not as a scan."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(len(rewards)):
        r, v = rewards[b, mask[b]], values[b, mask[b]]
        delta = r + gamma * torch.cat([v[1:], v.new_zeros(1)])[: len(v)] - v
        for i, t in enumerate(mask[b].nonzero().flatten()):
            weight = (gamma * lam) ** torch.arange(len(v) - i, dtype=v.dtype)
            advantages[b, t] = (weight * delta[i:]).sum()
        returns[b, mask[b]] = advantages[b, mask[b]] + v
    return advantages, returns


def masked_whiten(x, mask, *, shift_mean=True):
    selected = x[mask]
    if len(selected) == 0:
        return torch.zeros_like(x)
    mean = selected.mean()
    whitened = (selected - mean) / (selected.var(correction=0) + 1e-8).sqrt()
    return scatter(mask, whitened if shift_mean else whitened + mean)


def rollout_advantages(
    scores, logprobs, ref_logprobs, values, mask, attention=None, *, gamma=1.0, lam=0.95, whiten=True, **scalars
):
    rewards, kl = token_rewards(scores, logprobs, ref_logprobs, mask, attention, **scalars)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    return masked_whiten(advantages, mask) if whiten else advantages, returns, rewards, kl


def mean(x):
    return x.sum() / max(len(x), 1)


def policy_loss(logprobs, old_logprobs, advantages, *, cliprange=0.2, cliprange_high=None, dual_clip=None):
    """Per-token clipped loss of selected tokens, and the statistics of the ratio."""
    high = 1 + (cliprange if cliprange_high is None else cliprange_high)
    low = 1 - cliprange
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    ratio = log_ratio.exp()
    gain = advantages >= 0
    loss = torch.where(gain, -advantages * ratio.clamp(max=high), -advantages * ratio.clamp(min=low))
    if dual_clip is not None:
        loss = torch.where(gain, loss, torch.minimum(loss, -dual_clip * advantages))
    stats = {
        "approx_kl": mean(log_ratio**2) / 2,
        "clipfrac_high": mean(((advantages > 0) & (ratio > high)).to(ratio)),
        "clipfrac_low": mean(((advantages < 0) & (ratio < low)).to(ratio)),
        "ratio_mean": mean(ratio),
        "ratio_max": ratio.max() if len(ratio) else ratio.sum(),
        "tokens": ratio.new_tensor(len(ratio)),
    }
    return loss, stats


def ppo_loss(
    logprobs,
    old_logprobs,
    advantages,
    values,
    old_values,
    returns,
    mask,
    *,
    cliprange_value=0.2,
    vf_coef=0.1,
    normalizer=None,
    **clips,
):
    """(loss, stats in the order of PPOStats)."""
    v, old, ret = values[mask], old_values[mask], returns[mask]
    policy, stats = policy_loss(logprobs[mask], old_logprobs[mask], advantages[mask], **clips)
    error, clipfrac = (v - ret) ** 2, torch.zeros_like(v)
    if cliprange_value is not None:
        clipped = (old + (v - old).clamp(-cliprange_value, cliprange_value) - ret) ** 2
        clipfrac = (((v - old).abs() > cliprange_value) & (clipped > error)).to(v)
        error = torch.maximum(error, clipped)
    total = max(len(v), 1) if normalizer is None else normalizer
    policy, value = policy.sum() / total, error.sum() / 2 / total
    stats |= {"policy_loss": policy, "value_loss": value, "clipfrac_value": mean(clipfrac)}
    spread = ret.var(correction=0) if len(ret) else ret.sum()
    stats["explained_variance"] = 1 - (ret - v).var(correction=0) / spread if spread > 0 else spread * 0
    return policy + vf_coef * value, tuple(stats[name].detach() for name in rk.stats.PPOStats._fields)
