"""What every test runs under: NaN in fresh memory, fixed seeds, one of the three backends.

RLHF_TEST_DEVICE=cuda makes the tensors of the tests on a GPU, where Triton's kernels are compiled, not interpreted.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads OpenMP; waiting threads spin otherwise

import pytest
import torch

if device := os.environ.get("RLHF_TEST_DEVICE"):
    torch.set_default_device(device)  # before the modules of the tests make tensors
if torch.get_default_device().type == "cpu":  # read when a kernel is defined; the triton backend then takes CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        import triton_interpreter  # noqa: F401
else:
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not promise the same bits

if library := os.environ.get("RLHF_TEST_EXTENSION"):  # another build of the extension (tests/test_builds.py)
    spec = importlib.util.spec_from_file_location("rlhf_kernels._C", library)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

from oracle import BACKENDS, on_backend

pytest_plugins = ["pipeline_fixtures"]

# A shell that runs the tests in its background has Ctrl-C ignored in all that it starts; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A kernel that leaves part of an output unwritten then shows NaN, not yesterday's right answer. C++'s at::empty too.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; OpenMP threads that wait spin
    torch.set_num_threads(1)


LONG = ("test_builds.py", "test_triton_resources.py")  # minutes each; begun last, they would run alone at the end


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend_name(request):
    """Runs the test once a backend; the module's OPS say which ops that backend must have."""
    with on_backend(request.param, *request.module.OPS):
        yield request.param


@pytest.fixture
def threads():
    """`torch.set_num_threads` that is undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_folder():
    """Folder of the real data sets, from RLHF_DATA or beside the repository."""
    folder = Path(os.environ.get("RLHF_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}")
    return folder
