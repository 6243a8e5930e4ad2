"""A model on a CPU computes the same function after `speed_up`, whichever library multiplies."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from rlhf import cpu

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def outcome(model, dtype=torch.float32):
    """Logits and every gradient of one loss."""
    model = copy.deepcopy(model).to(dtype)
    tokens = torch.arange(24).view(2, 12)
    logits = model(tokens, use_cache=False).logits
    logits.logsumexp(-1).square().sum().backward()
    return [logits.detach(), *(each.grad for each in model.parameters())]


@pytest.mark.parametrize("products", [pytest.param(True, marks=onednn), False])
def test_same_function_and_gradients(model, products, monkeypatch):
    monkeypatch.setattr(cpu, "MIN_PRODUCT", 0)
    truth, plain = outcome(model, torch.float64), outcome(model)
    names = list(model.state_dict())
    cpu.speed_up(model, onednn=products)
    kinds = {type(module) for module in model.modules()}
    assert nn.GELU in kinds and (cpu.OneDnnConv1D in kinds) == (cpu.OneDnnLinear in kinds) == products
    assert list(model.state_dict()) == names and model.lm_head.weight is model.transformer.wte.weight
    for exact, before, after in zip(truth, plain, outcome(model)):
        scale = exact.abs().max()
        assert (after - exact).abs().max() < 2 * (before - exact).abs().max() + 1e-6 * scale
    assert all(each.dtype == torch.bfloat16 for each in outcome(model, torch.bfloat16))


@onednn
@pytest.mark.parametrize("layer", [nn.Linear(40, 24), nn.Linear(40, 24, bias=False), Conv1D(24, 40)])
def test_products_in_fp64(layer, monkeypatch):
    monkeypatch.setattr(cpu, "MIN_PRODUCT", 0)
    torch.manual_seed(0)
    exact = copy.deepcopy(layer).double()
    layer.__class__ = cpu.OneDnnConv1D if type(layer) is Conv1D else cpu.OneDnnLinear
    x = torch.randn(3, 40, 5).transpose(1, 2).requires_grad_()
    x64 = x.detach().double().contiguous().requires_grad_()
    weights = torch.randn(3, 5, 24)
    # A sum expands its gradient: not every gradient that comes back is contiguous.
    for call, given in ((layer, x), (exact, x64)):
        y = call(given)
        ((y * weights.to(y)).sum() + y.sum()).backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    for one, other in zip(layer.parameters(), exact.parameters()):
        assert one.grad.stride() == one.stride()
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@onednn
def test_frozen_weights_get_no_gradient(monkeypatch):
    monkeypatch.setattr(cpu, "MIN_PRODUCT", 0)
    layer = nn.Linear(8, 4).requires_grad_(False)
    layer.__class__ = cpu.OneDnnLinear
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1))


def test_small_products_and_other_dtypes_stay_with_torch(monkeypatch):
    monkeypatch.setattr(cpu, "multiply", None)
    layer = nn.Linear(8, 4)
    layer.__class__ = cpu.OneDnnLinear
    layer(torch.randn(3, 8))
    monkeypatch.setattr(cpu, "MIN_PRODUCT", 0)
    layer.double()(torch.randn(3, 8).double())


def test_only_where_mkl_leaves_avx512_unused(monkeypatch):
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for backend in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    for vendor, wanted in (("AuthenticAMD", True), ("GenuineIntel", False)):
        monkeypatch.setattr(cpu.Path, "exists", lambda _: True)
        monkeypatch.setattr(cpu.Path, "read_text", lambda _, vendor=vendor: f"vendor_id\t: {vendor}\n")
        assert cpu.mkl_lacks_avx512() is wanted
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(cpu.Path, "read_text", lambda _: "vendor_id\t: AuthenticAMD\n")
    assert not cpu.mkl_lacks_avx512()
