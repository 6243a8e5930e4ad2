"""Every Triton kernel compiles for an A100, an H100 and a B200, spills nothing and takes what the record says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from benchmarks import triton_resources as resources

FOLDER = Path(__file__).parents[1]
FILES = [
    path for path in (FOLDER / "rlhf_kernels/triton_kernels").glob("*.py") if path.stem not in ("__init__", "common")
]
STEMS = sorted(path.stem for path in FILES)


def run(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.triton_resources", *arguments]
    return subprocess.run(command, cwd=FOLDER, env=clean | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def record():
    return json.loads(resources.FILE.read_text())


@pytest.mark.parametrize("stem", STEMS)
def test_kernels_compile_and_take_what_the_record_says(stem, record):
    done = run("--check", stem)
    assert done.stdout, done.stderr
    rows = json.loads(done.stdout)
    assert {(row["stem"], row["target"]) for row in rows} == {(stem, f"sm_{target}") for target in (80, 90, 100)}
    wrong = resources.complaints(rows, record, triton.__version__)
    assert not wrong, "\n".join([*wrong, "if this is meant: python -m benchmarks.triton_resources"])
    assert done.returncode == 0, done.stderr


def test_the_record_has_every_kernel(record):
    kernels = {
        name for path in FILES for name in re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert kernels and {row["kernel"] for row in record["rows"]} == kernels
    assert {row["stem"] for row in record["rows"]} == set(STEMS)
    assert set(STEMS) <= set(resources.CALLS)


ROW = {"stem": "gae", "kernel": "_gae_kernel", "call": "gae fp32", "constants": "BLOCK_T=32", "target": "sm_90"}
ROW |= {"warps": 1, "shared": 64, "registers": 40, "stack": 0, "local": 0}
RECORD = {"triton": "3.9.0", "rows": [ROW]}


@pytest.mark.parametrize(
    ("change", "version", "complaint"),
    [
        ({}, "3.9.0", None),
        ({"registers": 41}, "3.9.0", "registers were 40"),
        ({"registers": 39}, "3.9.0", "registers were 40"),
        ({"shared": 65}, "3.9.0", "shared were 64"),
        ({"stack": 8}, "3.9.0", "spills"),
        ({"local": 4}, "3.9.0", "spills"),
        ({"warps": 2}, "3.9.0", "not in the record"),
        ({"registers": 128, "shared": 80, "warps": 2}, "3.10.0", None),
        ({"stack": 64}, "3.10.0", None),
        ({"stack": 72}, "3.10.0", "spills"),
    ],
)
def test_complaints(change, version, complaint):
    found = resources.complaints([ROW | change], RECORD, version)
    assert bool(found) == bool(complaint)
    assert complaint is None or any(line.startswith(complaint) for line in found)


def test_a_kernel_that_vanished_or_wants_too_much_is_named():
    other = ROW | {"target": "sm_80"}
    (line,) = resources.complaints([ROW], {"triton": "3.9.0", "rows": [ROW, other]}, "3.9.0")
    assert line == f"only in the record: {other}"
    large = {"triton": "3.9.0", "rows": [ROW | {"shared": 200_000}]}
    (line,) = resources.complaints(large["rows"], large, "3.9.0")
    assert line.startswith("too much shared memory: ")


def test_a_typing_error_in_a_call_is_named(monkeypatch):
    monkeypatch.setitem(resources.CALLS, "gae", "gae fp32 gama=1.0")
    with pytest.raises(ValueError, match=r"^gae fp32 gama=1\.0: no size and no argument of gae is called gama$"):
        list(resources.calls("gae"))


def test_the_interpreter_is_refused():
    done = run("gae", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.endswith("TRITON_INTERPRET must not be set: it replaces the compiler\n")
