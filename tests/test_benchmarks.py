"""The benchmarks measure what they say: wrong results are never timed, and the README shows the files in results/."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rlhf_kernels as rk
from benchmarks import __main__ as command
from benchmarks import clock, harness, machine, profile, report
from benchmarks.__main__ import STEMS, main

CEILINGS = {"read": 10e9, "matmul fp32": 1e12}


# ----------------------------------------------------------------------------------------------------------- the gate


class Squares:
    """A bench module of x² with some peers."""

    def __init__(self, **peers):
        self.given = peers

    def inputs(self, case):
        return (torch.linspace(1, 2, case.sizes["N"]).requires_grad_(),)

    def ours(self, case):
        return lambda x: x * x

    def formula(self, case):
        return torch.square

    def peers(self, case):
        return self.given

    def work(self, case):
        return {phase: harness.Work(8 * case.sizes["N"]) for phase in ("fwd", "bwd", "fwd+bwd")}


def run_squares(**peers):
    case = harness.Case({"N": 100})
    # Any registered stem serves: it only says which backends of ours there are.
    rows = harness.run_case("gae", Squares(**peers), case, "cpu", CEILINGS, budget=0.01)
    return [row for row in rows if row.provider in peers]


def off_in_one_place(x):
    return x * x + torch.eye(100)[7] * 1e-3


def nan_in_one_place(x):
    return torch.where(torch.arange(100) == 7, torch.nan, x * x)


def wrong_gradient(x):
    return (x * x).detach() + (x - x.detach())


def does_not_run(x):
    raise RuntimeError("no C++ compiler")


def does_not_fit(x):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("peer", "status"),
    [
        (off_in_one_place, "wrong: result 0 is off in 1 of 100 places"),
        (nan_in_one_place, "wrong: result 0 is off in 1 of 100 places"),
        (wrong_gradient, "wrong: result 1 is off in"),
        (lambda x: (x * x)[None], "failed: Mismatch in shape"),
        (does_not_run, "failed: no C++ compiler"),
        (does_not_fit, "missing: CUDA out of memory."),
        ("not installed", "missing: not installed"),
    ],
)
def test_a_wrong_provider_is_named_and_never_timed(peer, status, capsys):
    calls = 0

    def counted(x):
        nonlocal calls
        calls += 1
        return peer(x)

    (row,) = run_squares(peer=peer if isinstance(peer, str) else counted)
    assert row.status.startswith(status)
    assert (row.median_ms, row.rounds, row.peak_extra_mib) == (None, 0, None)
    assert calls == (0 if isinstance(peer, str) else 1)
    assert f"peer: {status}" in capsys.readouterr().err


def test_a_wrong_shape_or_number_of_results_is_named():
    x, truth = torch.ones(3), [torch.ones(3, dtype=torch.float64)]
    broadcast = harness.Provider("peer", lambda x: x[:1])
    assert harness.fault(broadcast, [x], [], truth) == "wrong: shapes [(1,)] should be [(3,)]"
    two = harness.Provider("peer", lambda x: (x, x))
    assert harness.fault(two, [x], [], truth) == "wrong: shapes [(3,), (3,)] should be [(3,)]"


def test_a_right_provider_is_timed_in_every_pass():
    rows = run_squares(peer=torch.square)
    assert [(row.status, row.phase) for row in rows] == [("ok", "fwd"), ("ok", "bwd"), ("ok", "fwd+bwd")]
    assert all(row.median_ms > 0 and harness.MIN_ROUNDS <= row.rounds <= harness.MAX_ROUNDS for row in rows)


@pytest.mark.parametrize("stem", STEMS)
def test_every_provider_passes_its_gate(stem):
    bench = harness.load(stem)
    quick = [case for case in bench.cases() if case.quick]
    assert quick and len(quick) < len(bench.cases())
    for case in quick:
        inputs = bench.inputs(case)
        truth, upstream = harness.truth_of(bench.formula(case), inputs)
        for provider in harness.providers(stem, bench, case, "cpu"):
            if not provider.missing and provider.name != "torch.compile":  # compiling takes long
                assert harness.fault(provider, inputs, upstream, truth) == "", (provider.name, case)


def test_every_op_has_its_benchmark_and_states_its_limit():
    plain_torch = {"masked_mean", "masked_whiten", "use_backend", "backend"}
    with_entropy = {"token_logprobs_entropy", "linear_logprobs_entropy"}  # variants of their stems
    assert set(STEMS) == set(rk.__all__) - plain_torch - with_entropy
    for stem in STEMS:
        bench = harness.load(stem)
        assert "\nLimit: " in bench.__doc__, stem
        for device in ("cpu", "cuda"):
            assert any(case.runs(device, quick=False) for case in bench.cases()), (stem, device)
        for case in bench.cases():
            for phase, work in bench.work(case).items():
                assert work.bytes > 0 and (work.moved is None or work.moved > work.bytes), (stem, phase)


def test_matrix_products_of_the_model():
    """In units of 2·N·V·H; tests/test_linear_*.py count those that are issued."""
    for stem, variant, forward, both in (
        ("linear_logprobs", "", 1, 4),
        ("linear_logprobs", "frozen head", 1, 2),
        ("linear_ppo_loss", "", 1, 3),
    ):
        work = harness.load(stem).work(harness.Case({"N": 10, "H": 20, "V": 1000}, variant=variant))
        assert (work["fwd"].flops, work["fwd+bwd"].flops) == (forward * 400_000, both * 400_000)


def test_a_formula_in_slices_is_the_same_formula(monkeypatch):
    monkeypatch.setattr(harness, "SLICE_ELEMENTS", 3 * 11)
    logits, weight = torch.randn(10, 5).double().requires_grad_(), torch.randn(11, 5).double().requires_grad_()
    most = 0

    def formula(x, w):
        nonlocal most
        most = max(most, len(x))
        scores = x @ w.T
        return scores.logsumexp(-1), scores.amax(-1)

    results = []
    for call in (formula, lambda x, w: harness.sliced(formula, 11, x, whole=(w,))):
        most = 0
        outputs = call(logits, weight)
        results.append([*outputs, *torch.autograd.grad(sum(x.sin().sum() for x in outputs), (logits, weight))])
    assert most == 3  # of the slices
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rounding_of_one_row_excuses_no_other():
    """Where the plain formula is off by 1 an element may be off by 2, but not in a row where it is right."""
    exact = torch.full((3, 4), 100.0, dtype=torch.float64)
    rough, got = exact.clone(), exact.clone()
    rough[0, 0] += 1
    got[0, 3] += 1.9
    assert harness.places_off(got, exact) == 1
    assert harness.places_off(got, exact, rough) == 0
    got[2, 3] += 1.9
    assert harness.places_off(got, exact, rough) == 1
    got[0, 3] += 0.2
    assert harness.places_off(got, exact, rough) == 2
    assert harness.places_off(got, exact, relative=0.003) == 2
    got[1, 1] = torch.nan
    assert harness.places_off(got, exact, rough) == 3


def test_products_are_rounded_by_a_share_of_their_row():
    exact = torch.tensor([[100.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    for off, wrong in ((0.031, 0), (0.033, 2)):
        got = exact + off * exact.amax(1, keepdim=True) * torch.tensor([0.0, 1.0])
        assert harness.places_off(got, exact, relative=0.008) == wrong
        assert harness.places_off(got, exact) == 2
    assert harness.places_off(got[:, 1], exact[:, 1], relative=0.008) == 2  # values, not gradients


def test_plain_rounding_is_asked_for_only_where_the_truth_is_missed():
    x, truth = torch.ones(3), [torch.ones(3, dtype=torch.float64)]
    asked = []

    def rough():
        asked.append(True)
        return [torch.full((3,), 1.5)]

    assert harness.fault(harness.Provider("peer", lambda x: x * 1), [x], [], truth, rough) == "" and not asked
    assert harness.fault(harness.Provider("peer", lambda x: x * 1.9), [x], [], truth, rough) == "" and asked
    off = harness.fault(harness.Provider("peer", lambda x: x * 2.1), [x], [], truth, rough)
    assert off == "wrong: result 0 is off in 3 of 3 places"


# --------------------------------------------------------------------------------------------------------- the timing


class LoggingClock:
    captures = True

    def __init__(self):
        self.log, self.now = [], 0

    def evict(self):
        self.log.append("evict")

    def mark(self):
        self.log.append("mark")
        self.now += 1
        return self.now

    def seconds(self, start, end):
        return (end - start) / 10

    def replay(self):
        self.log.append("replay")


def test_every_pass_starts_from_cold_caches_which_are_not_timed():
    log = LoggingClock()

    def call(x):
        log.log.append("call")
        return x * x

    x = torch.ones(3, requires_grad=True)
    seconds = harness.timed(harness.Provider("peer", call), [x], [torch.ones(3)], log, log)
    assert seconds == {"fwd": 0.1, "bwd": 0.1, "fwd+bwd": 0.2, "graph": 0.1}
    forward, whole, graph = ["call", "mark"], ["call", "mark", "mark"], ["replay", "mark"]
    assert log.log == [x for part in (forward, whole, graph) for x in ("evict", "mark", *part)]


def test_events_of_a_gpu(monkeypatch):
    """The L2 is overwritten twice over, and no time is read before the last event has happened."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            log.append("elapsed")
            return 2500.0  # milliseconds

    gpu = SimpleNamespace(Event=Event, get_device_properties=lambda device: SimpleNamespace(L2_cache_size=300 << 20))
    given = []
    fake = SimpleNamespace(cuda=gpu, int8=torch.int8, empty=lambda *size, **rest: given.append((size, rest)))
    monkeypatch.setattr(clock, "torch", fake)
    timer = clock.clock_of("cuda")
    assert given == [((600 << 20,), {"dtype": torch.int8, "device": "cuda"})]
    assert timer.seconds(timer.mark(), timer.mark()) == 2.5
    assert log == ["record", "record", "synchronize", "elapsed"]
    assert isinstance(clock.clock_of("cpu"), clock.CpuClock)


def test_graphs_are_a_pass_of_their_own(monkeypatch, capsys):
    """Of the whole call, where the bench module asks for it; who cannot be captured is named and timed without."""

    def captured(provider, *_):
        if provider.name == "stubborn":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return None if provider.name == "slow" else SimpleNamespace(replay=lambda: None)

    monkeypatch.setattr(harness, "captured", captured)
    monkeypatch.setattr(harness, "clock_of", lambda device: LoggingClock())
    monkeypatch.setattr(Squares, "GRAPHED", True, raising=False)
    rows = run_squares(peer=torch.square, slow=torch.square, stubborn=torch.square)
    phases = [(row.provider, row.phase) for row in rows if row.status == "ok"]
    passes = ("fwd", "bwd", "fwd+bwd")
    assert phases == [
        *(("peer", phase) for phase in (*passes, "graph")),
        *(("slow", phase) for phase in passes),
        *(("stubborn", phase) for phase in passes),
    ]
    (refused,) = (row for row in rows if row.status != "ok")
    assert refused.status.endswith(
        "it cannot be captured in a CUDA graph: operation not permitted when stream is capturing"
    )
    assert command.refused(vars(refused) | {"provider": "ours triton"})
    assert {stem for stem in STEMS if getattr(harness.load(stem), "GRAPHED", False)} == {
        "rollout_advantages",
        "gae",
        "ppo_loss",
        "attention_row",
        "token_rewards",
    }


def test_a_slow_round_is_repeated_less_often(monkeypatch):
    rounds = 0

    def slow(*_):
        nonlocal rounds
        rounds += 1
        monkeypatch.setattr(harness.time, "perf_counter", lambda: 20.0 * rounds)
        return {"fwd": 1.0}

    monkeypatch.setattr(harness, "timed", slow)
    peer = harness.Provider("peer", torch.square)
    for budget, wanted in ((1.0, 2), (4.0, 3), (30.0, harness.MIN_ROUNDS)):
        rounds = 0
        monkeypatch.setattr(harness.time, "perf_counter", lambda: 0.0)
        samples = harness.interleaved([peer], [], [], budget, clock.CpuClock(), {})
        assert len(samples["peer"]) == wanted, budget


# -------------------------------------------------------------------------------------------------------- the numbers


def test_known_rates():
    row = harness.Row("op", "case", "peer", "ok", "fwd")
    work = harness.Work(bytes=40_000_000, flops=1_000_000_000)  # 4 ms of reading, 1 ms of products
    harness.measured(row, [0.005, 0.008, 0.009], work, harness.Case({}), CEILINGS)
    assert (row.median_ms, row.quartiles_ms, row.rounds) == (8, pytest.approx([6.5, 8.5]), 3)
    assert (row.gb_per_s, row.tflop_per_s) == (pytest.approx(5), None)
    assert (row.limit_ms, row.share) == (pytest.approx(4), pytest.approx(0.5))


def test_matrix_products_set_the_limit():
    row = harness.Row("op", "case", "peer", "ok", "fwd")
    work = harness.Work(bytes=10_000_000, flops=4_000_000_000)  # 1 ms of reading, 4 ms of products
    harness.measured(row, [0.008] * 5, work, harness.Case({}), CEILINGS)
    assert (row.gb_per_s, row.tflop_per_s, row.share) == (None, pytest.approx(0.5), pytest.approx(0.5))


def test_least_bytes_of_a_known_case():
    case = harness.Case({"N": 10, "V": 1000}, torch.bfloat16)
    work = harness.load("token_logprobs").work(case)
    assert [work[phase].bytes for phase in ("fwd", "bwd", "fwd+bwd")] == [20_120, 40_120, 60_240]
    assert harness.load("gae").work(harness.Case({"B": 2, "T": 5}))["fwd"].bytes == 170


def test_peak_extra_memory_is_what_was_held_at_once():
    rise = machine.peak_extra_bytes(lambda: torch.ones(4 << 20).exp().sum())  # two tensors of 16 MiB
    if rise is None:
        pytest.skip("resident memory can be watched only on Linux with glibc")
    assert rise / 2**20 == pytest.approx(32, abs=2)


# ------------------------------------------------------------------------------------------------------- the commands


def test_quick_run_of_one_op_writes_json(tmp_path):
    file = tmp_path / "quick.json"
    root = Path(report.__file__).parent.parent
    command = [sys.executable, "-m", "benchmarks", "gae", "--quick", "--threads", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert {"cpu", "cores", "torch", "python", "compiler", "commit", "date"} < set(results["machine"])
    assert results["machine"]["threads"] == 1
    assert results["ceilings"]["read"] > 1e8 and results["ceilings"]["matmul fp32"] > 1e8
    assert {row["op"] for row in results["rows"]} == {"gae"}
    found = {row["provider"]: row for row in results["rows"]}
    torchrl = {"torchrl vectorised", "torchrl loop"}
    assert set(found) == {"ours native", "ours torch", "loop as in verl", "torch.compile"} | torchrl
    assert found["torch.compile"]["status"].startswith("missing")
    there = importlib.util.find_spec("torchrl") is not None
    assert {found[name]["status"] == "ok" for name in torchrl} == {there}
    assert (found["ours native"]["status"] == "ok") == rk.backend.has("gae", "native", "cpu")
    for name in ("ours torch", "loop as in verl"):
        low, high = found[name]["quartiles_ms"]
        assert 0 < low <= found[name]["median_ms"] <= high
    assert report.table(results) == done.stdout.strip()
    assert not list(tmp_path.glob("*.tmp"))


def test_first_cases_come_first_and_what_finds_no_time_is_named(monkeypatch, tmp_path, capsys):
    """And what was measured by then is on disk."""
    ran, file = [], tmp_path / "results.json"

    def run_case(stem, bench, case, device, *_):
        assert case.device == device == "cuda" and not case.quick
        ran.append(stem)
        if len(ran) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        monkeypatch.setattr(command.time, "perf_counter", lambda: 100.0 * len(ran))
        return [harness.Row(stem, str(case), "peer", "ok", "fwd")]

    monkeypatch.setattr(harness, "run_case", run_case)
    monkeypatch.setattr(machine, "environment", lambda device: {"device": device})
    monkeypatch.setattr(machine, "ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(command.time, "perf_counter", lambda: 0.0)
    results = command.run(["token_logprobs", "gae"], "cuda", torch.get_num_threads(), False, 350.0, file)
    assert ran == ["token_logprobs", "gae", "token_logprobs", "gae"]
    assert results == report.read(file)
    assert [(row["op"], row["status"]) for row in results["rows"]] == [
        ("token_logprobs", "ok"),
        ("token_logprobs", "missing: CUDA out of memory. Tried to allocate"),
        ("token_logprobs", "missing: no time was left"),
        ("gae", "ok"),
        ("gae", "ok"),
    ]


def run_gpu_script(out, *ops, **environment):
    root = Path(report.__file__).parent.parent
    variables = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), **environment}
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", *ops], cwd=root, env=variables, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def test_gpu_script_runs_dry(tmp_path):
    """What a CPU can do of it; a step that fails is named and stops no other."""
    steps = "wheels gputests memcheck benchmarks profile"
    status, said = run_gpu_script(tmp_path, "gae", DRY_RUN="1", STEPS=steps, WHEELS=str(tmp_path))
    assert status == 1 and said.endswith("failed: wheels\n"), said  # there are none in the folder
    for name, reason in (("gputests", "they need a GPU"), ("memcheck", "it needs a GPU"), ("ncu", "it needs a GPU")):
        assert f"left out: {name}: {reason}" in said
    assert not re.search("== (machine|build|tests|racecheck)", said)
    results = report.read(tmp_path / "dry-run.json")
    assert {row["op"] for row in results["rows"]} == {"gae"} and results["machine"]["device"] == "cpu"
    assert {path.stem for path in tmp_path.glob("*.log")} == {"wheels", "benchmarks", "profile-gae"}


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *is_available* | *find_spec* | *"import torch") ;;
    *get_device_capability*) echo 9.0 ;;
    *get_device_name*) echo nvidia-x ;;
    *"profile worst"*) printf 'gae\\tB=1 T=2\\nppo_loss\\tB=3 T=4\\n' ;;
    *) echo "$TORCH_CUDA_ARCH_LIST" "$RLHF_TEST_DEVICE" "$*"; [ "${*: -2:1}" = --json ] && echo > "${*: -1}"; true ;;
esac
"""
FAKE_TOOL = """#!/usr/bin/env bash
echo "$(basename "$0")" "$@"
"""


def test_gpu_script_with_a_gpu_that_is_played(tmp_path):
    """Every step's command, with time for all of them."""
    for name, text in (("python", FAKE_PYTHON), ("compute-sanitizer", FAKE_TOOL), ("ncu", FAKE_TOOL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    out, wheels = tmp_path / "out", tmp_path / "a folder"
    wheels.mkdir()
    (wheels / "trl.whl").touch()
    path = f"{tmp_path}:{os.environ['PATH']}"
    given = {"PYTHON": str(tmp_path / "python"), "PATH": path, "WHEELS": str(wheels)}
    status, said = run_gpu_script(out, "gae", "rm_listwise_loss", "ppo_loss", **given)
    assert status == 0, said
    log = {path.stem: path.read_text() for path in out.glob("*.log")}
    assert list(log) and "left out" not in said
    assert log["machine"] == " cuda -\n"
    assert log["wheels"].rstrip().endswith(f"/site {wheels}/trl.whl")
    assert log["build"] == "9.0 cuda setup.py -q build_ext --inplace\n"
    files = "tests/test_gae.py tests/test_ppo_loss.py tests/test_rm_losses.py"
    words = "gae or test_gae or ppo_loss or test_ppo_loss or rm_listwise_loss or test_rm_losses"
    pytest_ = "-m pytest -q -p no:cacheprovider --tb short --maxfail 50"
    assert re.fullmatch(rf"9.0 cuda {pytest_} -n [1-8] -k {words} tests/test_gpu.py\n", log["gputests"])
    assert re.fullmatch(rf"9.0 cuda {pytest_} -n [1-8] -k {words} {files} tests/test_registration.py\n", log["tests"])
    for tool in ("memcheck", "racecheck"):
        command_ = f"compute-sanitizer --tool {tool} --error-exitcode 1 {tmp_path}/python {pytest_} -p no:xdist"
        assert log[tool] == f"{command_} -k native and known_values and ({words}) {files}\n"
    timed_ops = "gae rm_listwise_loss ppo_loss --device cuda"
    results = f"--json {out}/nvidia-x.json"
    assert re.fullmatch(rf"9.0 cuda -m benchmarks {timed_ops} --seconds \d+ {results}\n", log["benchmarks"])
    assert log["profile-gae"].endswith(f"{tmp_path}/python -m benchmarks.profile run gae B=1 T=2\n")
    assert log["profile-ppo_loss"].startswith("ncu --clock-control none")
    limits = dict(re.findall(r"== (\S+), at most (\d+) s", said))
    assert set(limits) == set(log)
    benchmarks = int(limits.pop("benchmarks"))  # what is left when it begins
    assert sum(map(int, limits.values())) <= 455 and 500 <= benchmarks <= 600


def test_gpu_script_says_what_it_lacks(tmp_path):
    assert run_gpu_script(tmp_path, "grpo") == (2, "gpu.sh: there is no op grpo\n")
    if not torch.cuda.is_available():
        assert run_gpu_script(tmp_path) == (2, "gpu.sh: torch sees no GPU; DRY_RUN=1 runs what a CPU can\n")


def test_the_worst_cases_are_profiled_first():
    def rows(op, ours, peer, case="N=1", phase="fwd"):
        return [timing(name, median, op=op, case=case, phase=phase) for name, median in (("ours native", ours), peer)]

    measured = [
        *rows("gae", 2.0, ("loop", 8.0)),
        *rows("ppo_loss", 4.0, ("torch.compile", 1.0)),
        *rows("ppo_loss", 1.0, ("torch.compile", 9.0), phase="fwd+bwd"),
        *rows("token_logprobs", 4.0, ("torch eager", 4.0), case="N=2"),
    ]
    assert profile.worst(measured, 2) == [("ppo_loss", "N=1"), ("token_logprobs", "N=2")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grpo"], f"op must be one of {', '.join(STEMS)}, got grpo"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--json", "/nowhere/at/all.json"], "--json: /nowhere/at must be an existing folder"),
        (["--table", "/nowhere/at/all.json"], "--table: /nowhere/at/all.json must be a file that --json wrote"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("provider", ["ours torch", "peer"])
def test_exit_status_tells_of_a_wrong_result_of_ours(provider, monkeypatch, capsys):
    row = {"op": "gae", "case": "B=1", "provider": provider, "status": "wrong: off", "phase": ""}
    monkeypatch.setattr("benchmarks.__main__.run", lambda *_: RESULTS | {"rows": [row]})
    assert main(["gae"]) == (1 if provider == "ours torch" else 0)
    assert f"- gae, {provider}: wrong: off" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- the README


def timing(provider, median, **more):
    row = harness.Row("gae", "B=2 T=3 fp32", provider, "ok", "fwd", median, [median - 1, median + 3])
    return vars(row) | {"gb_per_s": 5.0, "share": 0.5, "peak_extra_mib": median} | more


RESULTS = {
    "machine": {
        "device": "cpu",
        "cpu": "A processor",
        "instructions": "AVX512",
        "threads": 2,
        "cores": 2,
        "torch": "2.13.0",
        "python": "3.11.7",
        "commit": "abc",
        "date": "2026-01-02T03:04:05+00:00",
    },
    "ceilings": {"read": 32e9, "matmul fp32": 0.2e12},
    "rows": [
        timing("ours native", 4.0),
        timing("ours torch", 160.0),
        timing("torch eager", 120.0),
        timing("loop", 80.0),
        {"op": "gae", "case": "B=2 T=3 fp32", "provider": "Liger", "status": "missing: not installed", "phase": ""},
    ],
}

GPU_RESULTS = {
    "machine": RESULTS["machine"]
    | {
        "device": "cuda",
        "gpu": "NVIDIA X",
        "memory_gib": 139.8,
        "l2_mib": 50,
        "power_limit": "700.00 W",
        "driver": "570.1",
        "cuda": "12.8",
        "triton": "3.6.0",
    },
    "ceilings": {"read": 4.0e12, "copy": 4.1e12, "matmul fp32": 50e12, "matmul bf16": 700e12},
    "rows": [timing("ours triton", 4.0), timing("ours native", 8.0), timing("torch eager", 6.0)],
}


def test_table_of_a_gpu():
    lines = report.table(GPU_RESULTS).splitlines()
    assert lines[0] == (
        "NVIDIA X (140 GiB, L2 50 MiB, 700.00 W), driver 570.1, CUDA 12.8, Triton 3.6.0, torch 2.13.0, Python 3.11.7, "
        "commit abc, 2026-01-02. Ceilings measured in the same run: reading 4000.0 GB/s, copying 4100.0 GB/s, "
        "matmul fp32 50.0 TFLOP/s, matmul bf16 700 TFLOP/s."
    )
    assert (
        "| `gae` | B=2 T=3 fp32 | fwd | 4.0 ± 2.0 | 8.0 ± 2.0 | – | 6.0 ± 2.0 | – | – | 1.5× | 5.0 GB/s | 50% "
        "| 4.0 / 6.0 |"
    ) in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_table_of_known_numbers():
    lines = report.table(RESULTS).splitlines()
    assert lines[0] == (
        "A processor (AVX512), 2 threads on 2 cores, torch 2.13.0, Python 3.11.7, commit abc, 2026-01-02. "
        "Ceilings measured in the same run: reading 32.0 GB/s, matmul fp32 0.2 TFLOP/s."
    )
    assert (
        "| `gae` | B=2 T=3 fp32 | fwd | 4.0 ± 2.0 | 160 ± 2.0 | 120 ± 2.0 | – | 80.0 ± 2.0 loop "
        "| 20.0× | 5.0 GB/s | 50% | 4.0 / 80.0 |"
    ) in lines
    assert lines[-1] == "- gae, Liger: missing: not installed"
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_readme_is_written_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"README\.md must exist"):
        report.update_readme()
    report.README.write_text(f"before\n{report.BEGIN}\nafter\n")
    with pytest.raises(ValueError, match=re.escape(f"must have one line {report.END}, got 0")):
        report.update_readme()
    report.README.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(tmp_path / "cpu.json", RESULTS)
    assert main(["--readme"]) == 0
    cpu = f"\n### CPU\n\n{report.table(RESULTS)}\n"
    wanted = f"before\n{report.BEGIN}{cpu}\n### GPU\n\n{report.NO_GPU}\n{report.END}\nafter\n"
    assert report.README.read_text() == wanted
    report.write(tmp_path / "gpu.json", GPU_RESULTS)
    assert main(["--readme"]) == 0
    gpu = f"\n### NVIDIA X\n\n{report.table(GPU_RESULTS)}\n"
    assert report.README.read_text() == f"before\n{report.BEGIN}{cpu}{gpu}{report.END}\nafter\n"


def test_readme_says_that_no_gpu_was_measured_as_long_as_none_was():
    measured = [report.read(path)["machine"]["device"] for path in report.FOLDER.glob("*.json")]
    assert report.README.read_text().count(report.NO_GPU) == ("cuda" not in measured)


def test_readme_is_in_step_with_the_results():
    assert report.split_readme()[1] == report.rendered(), "run: python -m benchmarks --readme"
