import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import backend

PACKAGE = Path(rk.__file__).parent
GAE = "import torch, rlhf_kernels as rk; x = torch.zeros(1, 2); print(rk.gae(x + 1, x, x + 1)[0].tolist())"


def run(*code, where=PACKAGE.parent, **environment):
    """A fresh interpreter that imports the package found in `where`."""
    clean = {name: x for name, x in os.environ.items() if name not in ("RLHF_KERNELS_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, *(("-c", *code) if code[0] != "-m" else code)]
    return subprocess.run(
        command, cwd=where, env={**clean, "PYTHONPATH": str(where), **environment}, capture_output=True, text=True
    )


@pytest.fixture
def new_op():
    """Registers `rlhf_kernels::<name>`, x → x + 1, and forgets it afterwards."""
    made = []

    def make(name, **implementations):
        made.append(name)
        return backend.register(
            f"{name}(Tensor x) -> Tensor",
            fake=torch.empty_like,
            **{"torch_impl": lambda x: x + 1, **implementations},
        )

    yield make
    for name in made:
        del backend._pickers[name]


def test_unknown_backend():
    with pytest.raises(ValueError) as caught, rk.use_backend("cuda"):
        pass
    assert str(caught.value) == "use_backend: name must be one of triton, native, torch, got 'cuda'"
    with pytest.raises(ValueError, match=r"^backend.has: backend must be one of triton, native, torch, got 'jax'$"):
        backend.has("gae", "jax", "cpu")
    with pytest.raises(ValueError, match=r"^backend.has: no op is called 'gea'$"):
        backend.has("gea", "torch", "cpu")


def test_explicit_choice_never_falls_back(new_op):
    op = new_op("only_torch")
    for name in ("triton", "native"):
        assert not backend.has("only_torch", name, "cpu")
        with pytest.raises(NotImplementedError) as caught, rk.use_backend(name):
            op(torch.zeros(2))
        assert str(caught.value) == f"only_torch: no {name} implementation on cpu"
    assert op(torch.zeros(2)).tolist() == [1, 1]


@pytest.fixture
def no_interpreter(monkeypatch):
    """The triton backend without Triton's interpreter: no kernel of it runs on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for pick in backend._pickers.values():  # they remember their choices
        pick.cache_clear()
    yield
    for pick in backend._pickers.values():
        pick.cache_clear()


def test_message_for_an_absent_kernel(no_interpreter):
    x = torch.zeros(1, 2)
    with pytest.raises(NotImplementedError) as caught, rk.use_backend("triton"):
        rk.gae(x, x, x)
    assert str(caught.value) == "gae: no triton implementation on cpu"


def test_use_backend_nests_and_is_undone_by_an_error():
    seen = []
    with rk.use_backend("torch"):
        with pytest.raises(KeyError), rk.use_backend("native"):
            seen.append(set(backend.table("cpu").values()))
            raise KeyError
        seen.append(set(backend.table("cpu").values()))
    assert seen[0] <= {"native", "none"}
    assert seen[1] == {"torch"}


def test_backward_runs_on_the_chosen_backend(no_interpreter):
    logits = torch.zeros(1, 3, requires_grad=True)
    logprobs = rk.token_logprobs(logits, torch.tensor([1]))
    with rk.use_backend("triton"), pytest.raises(NotImplementedError, match="token_logprobs_bwd: no triton"):
        logprobs.sum().backward()


def test_automatic_choice_takes_the_first_that_exists(new_op, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(backend.PREFERENCE, "cpu", ("triton", "native", "torch"))
    monkeypatch.setattr(backend, "_forced", None)
    assert new_op("with_triton", triton=lambda x: x + 2)(torch.zeros(1)) == 2
    assert new_op("without_triton")(torch.zeros(1)) == 1
    assert backend.table("cpu")["with_triton"] == "triton"
    assert backend.table("cpu")["without_triton"] == "torch"


def test_preference_of_one_op(new_op, monkeypatch):
    """A (device, op) entry stands before the device's row."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "_forced", None)
    monkeypatch.setitem(backend.PREFERENCE, ("cpu", "preferred"), ("triton", "torch"))
    implementations = {"triton": lambda x: x + 2}
    assert new_op("preferred", **implementations)(torch.zeros(1)) == 2
    assert new_op("ordinary", **implementations)(torch.zeros(1)) == 1


def test_preference_that_nothing_meets(new_op, monkeypatch):
    monkeypatch.setattr(backend, "_forced", None)
    monkeypatch.setitem(backend.PREFERENCE, ("cpu", "wishful"), ("triton", "native"))
    with pytest.raises(NotImplementedError) as caught:
        new_op("wishful")(torch.zeros(1))
    assert str(caught.value) == "wishful: no triton or native implementation on cpu"
    assert backend.table("cpu")["wishful"] == "none"


def test_register_defines_the_native_twin(new_op):
    """C++ (here Python in its place) fills the twin, and the op is native from then on."""
    op = new_op("twin")
    assert str(torch.ops.rlhf_kernels_native.twin.default._schema) == "rlhf_kernels_native::twin(Tensor x) -> Tensor"
    filled = torch.library.Library("rlhf_kernels_native", "IMPL")
    filled.impl("twin", lambda x: x + 3, "CPU")
    with rk.use_backend("native"):
        assert op(torch.zeros(1)) == 3
    assert backend.has("twin", "native", "cpu")
    assert torch.library.opcheck(op, (torch.zeros(2),))
    assert op(torch.zeros(2, device="meta")).shape == (2,)  # the fake


def test_products_inside_an_op_ignore_autocast(new_op):
    op = new_op("product", torch_impl=lambda x: x @ x)
    x = torch.tensor([[1.001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).item() == 1
        assert op(x).item() == pytest.approx(1.002001)


def test_environment_variable():
    assert run(GAE, RLHF_KERNELS_BACKEND="torch").stdout == "[[1.9500000476837158, 1.0]]\n"
    wrong = run(GAE, RLHF_KERNELS_BACKEND="cudnn").stderr.splitlines()[-1]
    assert wrong == "ValueError: RLHF_KERNELS_BACKEND must be one of triton, native, torch, got 'cudnn'"
    absent = run(GAE, RLHF_KERNELS_BACKEND="triton").stderr.splitlines()[-1]
    assert absent == "NotImplementedError: gae: no triton implementation on cpu"


@pytest.fixture
def without_extension(tmp_path):
    """A folder with a copy of the package that lacks the extension."""
    shutil.copytree(PACKAGE, tmp_path / "rlhf_kernels", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    # An editable install finds the submodules that a copy lacks.
    hide = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    return tmp_path


def test_without_the_extension_it_warns_once_and_works(without_extension):
    result = run(f"{GAE}\n{GAE}", where=without_extension)
    assert result.stdout == "[[1.9500000476837158, 1.0]]\n" * 2
    assert result.stderr.count("rlhf_kernels: the C++ extension is not built, so ops run on the slower torch") == 1
    assert result.stderr.count("UserWarning") == 1
    forced = run(GAE, where=without_extension, RLHF_KERNELS_BACKEND="native").stderr.splitlines()[-1]
    assert forced == "NotImplementedError: gae: no native implementation on cpu"


def test_report(without_extension):
    report = run("-m", "rlhf_kernels", where=without_extension).stdout.splitlines()
    assert report[0].startswith(f"rlhf_kernels {rk.__version__}, torch {torch.__version__}, Python 3.")
    assert "extension: not built" in report
    chosen = dict(line.split(maxsplit=1) for line in report[3:])
    assert set(chosen) == set(backend.table("cpu"))
    assert all(choice.startswith("cpu: torch") for choice in chosen.values())


@pytest.mark.parametrize(
    ("capability", "built", "chosen"),
    [
        ("AVX512", "_C _C_avx2 _C_avx512", "_C_avx512"),
        ("AVX2", "_C _C_avx2 _C_avx512", "_C_avx2"),
        ("DEFAULT", "_C _C_avx2 _C_avx512", "_C"),
        ("AVX512", "_C", "_C"),
        ("AVX512", "_C _cuda", "_C _cuda"),
        ("AVX2", "", ""),
    ],
)
def test_module_for_this_cpu(monkeypatch, capability, built, chosen):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name.split(".")[1] in built.split() or None)
    assert backend.extension_modules() == [f"rlhf_kernels.{name}" for name in chosen.split()]


@pytest.mark.skipif(importlib.util.find_spec("rlhf_kernels._C") is None, reason="the extension is not built")
def test_report_of_the_extension():
    (line,) = [line for line in run("-m", "rlhf_kernels").stdout.splitlines() if line.startswith("extension:")]
    assert f"torch {torch.__version__.split('+')[0]}" in line
    assert "compiler" in line


def test_fresh_memory_is_poisoned():
    """What conftest.py promises; `torch.empty` is C++'s at::empty."""
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.zeros(1).new_empty(2, 2).isnan().all()
    assert (torch.empty(2, dtype=torch.int64) == 2**63 - 1).all()


def test_device_of_the_tests():
    """RLHF_TEST_DEVICE: tensors of the tests are made there, and nothing interprets Triton's kernels off the CPU."""
    probe = (
        "import sys; sys.path.insert(0, 'tests'); import conftest, oracle, os, torch; "
        "print(oracle.DEVICE, torch.zeros(1).device.type, os.environ['TRITON_INTERPRET'])"
    )
    assert run(probe, RLHF_TEST_DEVICE="meta").stdout == "meta meta 0\n"
    assert run(probe, RLHF_TEST_DEVICE="cpu").stdout == run(probe, RLHF_TEST_DEVICE="").stdout == "cpu cpu 1\n"
