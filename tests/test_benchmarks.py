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
from benchmarks import clock, curves, harness, machine, plots, profile, report, targets
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
    rows = harness.run_case("gae", Squares(**peers), case, "cpu", CEILINGS, budget=1.0)
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
        ("linear_logprobs", "", 1, 3),
        ("linear_logprobs", "frozen head", 1, 2),
        ("linear_ppo_loss", "", 1, 3),
    ):
        work = harness.load(stem).work(harness.Case({"N": 10, "H": 20, "V": 1000}, variant=variant))
        assert (work["fwd"].flops, work["fwd+bwd"].flops) == (forward * 400_000, both * 400_000)


def test_a_formula_in_slices_is_the_same_formula(monkeypatch):
    monkeypatch.setitem(harness.SLICE_ELEMENTS, "cpu", 3 * 11)
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


def test_a_peer_may_round_what_ours_may_not():
    """A small probability from a log-probability in bf16, by one rounding of the row's largest value."""
    x, exact = torch.ones(2, 3).bfloat16(), torch.tensor([[1.0, 0.1, 1e-3]] * 2, dtype=torch.float64)
    for off, wrong in ((7e-3, ""), (9e-3, "wrong: result 0 is off in 2 of 6 places")):
        got = exact + off * torch.tensor([0.0, 0.0, 1.0])
        peer = harness.Provider("peer", lambda x, got=got: got.bfloat16())
        assert harness.fault(peer, [x], [], [exact]) == wrong
    for off, wrong in ((0.06, ""), (0.065, "wrong: result 0 is off in 2 of 6 places")):
        peer = harness.Provider("peer", lambda x, off=off: exact + off * torch.eye(3)[2])
        assert harness.fault(peer, [x], [], [exact], relative=0.0078) == wrong
    ours = harness.Provider("ours torch", lambda x: (exact + 7e-3 * torch.eye(3)[2]).bfloat16(), "torch")
    assert harness.fault(ours, [x], [], [exact]) == "wrong: result 0 is off in 2 of 6 places"


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


def test_a_slow_provider_is_repeated_less_often(monkeypatch):
    """Of a budget of 4 s: seconds a run → rounds, beside one that takes nothing."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def timed(provider, *_):
        now[0] += seconds if provider.name == "slow" else 0.0
        return {"fwd": 1.0}

    monkeypatch.setattr(harness, "timed", timed)
    peers = [harness.Provider(name, torch.square) for name in ("fast", "slow")]
    for seconds, rounds in ((0.01, harness.MAX_ROUNDS), (0.2, 10), (0.5, 5), (2.0, 3), (30.0, 2)):
        samples = harness.interleaved(peers, [], [], 4.0, clock.CpuClock(), {})
        assert (len(samples["slow"]), len(samples["fast"])) == (rounds, harness.MAX_ROUNDS), seconds


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
    command = [sys.executable, "-m", "benchmarks", "gae", "--quick", "--threads", "1", "--plot", "--json", str(file)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert {"cpu", "cores", "torch", "python", "compiler", "commit", "date"} < set(results["machine"])
    assert results["machine"]["threads"] == 1
    assert results["ceilings"]["read"] > 1e8 and results["ceilings"]["matmul fp32"] > 1e8
    assert {row["op"] for row in results["rows"]} == {"gae"}
    found = {row["provider"]: row for row in results["rows"]}
    torchrl = {"torchrl vectorised", "torchrl loop"}
    native = rk.backend.has("gae", "native", "cpu")
    ours = {"ours native"} if native else {"ours native", "ours torch"}
    assert set(found) == {"loop as in verl", "torch.compile"} | torchrl | ours
    assert found["torch.compile"]["status"].startswith("missing")
    there = importlib.util.find_spec("torchrl") is not None
    assert {found[name]["status"] == "ok" for name in torchrl} == {there}
    assert (found["ours native"]["status"] == "ok") == native
    for name in ("ours native" if native else "ours torch", "loop as in verl"):
        low, high = found[name]["quartiles_ms"]
        assert 0 < low <= found[name]["median_ms"] <= high
    assert {(row["axis"], row["x"]) for row in results["curves"]} == {("T", 64), ("T", 128)}
    assert (results["failed"], results["not_reached"]) == ([], [])
    assert report.table(results) == done.stdout.strip()
    assert plots.complaints(tmp_path, "quick", results) == []
    assert not list(tmp_path.glob("*.tmp"))


def test_what_matters_most_comes_first(monkeypatch):
    """Cases with a target, the first case of every op, curves, the rest; and a point of a curve is not a case."""
    work = command.jobs(["token_logprobs", "gae"], "cpu", 2, False, True, False)
    names = [job.name for job in work]
    assert names[:4] == [
        "token_logprobs N=1024 V=50257 fp32",
        "token_logprobs N=1024 V=50257 bf16",
        "token_logprobs N=1024 V=50257 fp32 given buffer",
        "gae B=512 T=2048 fp32",
    ]
    assert names[4] == "token_logprobs over V: N=128 V=1000 fp32"
    assert "token_logprobs over threads: N=512 V=50257 fp32 threads=2" in names
    assert names[-1] == "token_logprobs N=1024 V=50257 fp32 entropy"
    assert len(set(names)) == len(names)
    assert [job.part for job in command.jobs(["gae"], "cuda", 2, False, True, False)][:2] == ["rows", "rows"]
    assert {job.part for job in command.jobs(["gae"], "cpu", 2, False, False, False)} == {"rows"}


def test_what_finds_no_time_is_named_and_can_be_resumed(monkeypatch, tmp_path, capsys):
    """What was measured by then is on disk."""
    ran, file = [], tmp_path / "results.json"
    monkeypatch.setattr(command.time, "perf_counter", lambda: 100.0 * len(ran))

    def run_case(stem, bench, case, device, *_):
        ran.append(stem)
        if len(ran) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return [harness.Row(stem, str(case), "peer", "ok", "fwd", 1.0, [1.0, 1.0])]

    monkeypatch.setattr(harness, "run_case", run_case)
    monkeypatch.setattr(machine, "ceilings", lambda *_: CEILINGS)
    assert main(["gae", "ppo_loss", "--no-curves", "--seconds", "50", "--json", str(file)]) == 0
    results = report.read(file)
    assert (ran, [row["op"] for row in results["rows"]]) == (["gae"], ["gae"])
    assert results["not_reached"] == ["ppo_loss B=512 T=2048 fp32"]
    assert "- ppo_loss B=512 T=2048 fp32: no time was left" in capsys.readouterr().out
    assert main(["gae", "ppo_loss", "--no-curves", "--json", str(file), "--resume"]) == 0
    results = report.read(file)
    assert ran == ["gae", "ppo_loss"] and results["not_reached"] == []
    assert results["failed"] == ["ppo_loss B=512 T=2048 fp32: CUDA out of memory. Tried to allocate"]
    assert command.same("abc", "abc-dirty") and command.same(2, 2) and not command.same("abc-dirty", "abd")
    file.write_text(json.dumps(results | {"machine": results["machine"] | {"cpu": "A processor"}}))
    with pytest.raises(SystemExit):
        main(["--json", str(file), "--resume"])
    assert f"--resume: {file} was measured with another cpu" in capsys.readouterr().err


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
        (["--json", "/tmp/none.json", "--resume"], "--resume: /tmp/none.json must be a file that --json wrote"),
        (["--plot"], "--plot needs --json, the file that it belongs to"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("provider", ["ours torch", "peer"])
def test_exit_status_tells_of_a_wrong_result_of_ours(provider, monkeypatch, capsys):
    row = {"op": "gae", "case": "B=1", "provider": provider, "status": "wrong: off", "phase": ""}
    monkeypatch.setattr(machine, "ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(command, "run", lambda work, results, *_: results["rows"].append(row))
    assert main(["gae"]) == (1 if provider == "ours torch" else 0)
    assert f"- gae, {provider}: wrong: off" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- tables and plots


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
    "curves": [],
    "failed": [],
    "not_reached": [],
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
    "curves": [],
    "failed": [],
    "not_reached": [],
}


def test_table_of_a_gpu():
    lines = report.table(GPU_RESULTS).splitlines()
    assert lines[0] == (
        "NVIDIA X (140 GiB, L2 50 MiB, 700.00 W), driver 570.1, CUDA 12.8, Triton 3.6.0, torch 2.13.0, Python 3.11.7, "
        "commit abc, 2026-01-02. Ceilings measured in the same run: reading 4000.0 GB/s, copying 4100.0 GB/s, "
        "matmul fp32 50.0 TFLOP/s, matmul bf16 700 TFLOP/s."
    )
    assert (
        "| `gae` | B=2 T=3 fp32 | fwd | 4.0 ± 2.0 | 8.0 ± 2.0 | 6.0 ± 2.0 | – | 1.5× | 5.0 GB/s | 50% | 4.0 / 6.0 |"
    ) in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_table_of_known_numbers():
    lines = report.table(RESULTS).splitlines()
    assert lines[0] == (
        "A processor (AVX512), 2 threads on 2 cores, torch 2.13.0, Python 3.11.7, commit abc, 2026-01-02. "
        "Ceilings measured in the same run: reading 32.0 GB/s, matmul fp32 0.2 TFLOP/s."
    )
    assert (
        "| `gae` | B=2 T=3 fp32 | fwd | 4.0 ± 2.0 | 160 ± 2.0 | 120 ± 2.0 | 80.0 ± 2.0 loop "
        "| 20.0× | 5.0 GB/s | 50% | 4.0 / 80.0 |"
    ) in lines
    assert lines[-1] == "- gae, Liger: missing: not installed"
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def growing(op, axis, sizes):
    """Rows of a curve: ours takes 1 ms and 2 MiB a unit, a peer ten times as much, the limit a half."""
    return [
        timing(name, factor * x, op=op, case=f"B=2 {axis}={x} fp32", axis=axis, x=x, limit_ms=x / 2, results_mib=x)
        for x in sizes
        for name, factor in (("ours native", 1.0), ("loop", 10.0))
    ]


def test_plots_are_small_and_the_same_for_the_same_rows(tmp_path):
    pytest.importorskip("matplotlib")
    rows = growing("gae", "T", (64, 256, 1024))
    text = plots.drawn("gae", "T", rows)
    assert text == plots.drawn("gae", "T", rows) and len(text) < 60_000
    for word in ("gae  B=2 fp32", "fwd, ms", "extra memory, MiB", "ours native", "loop", "limit", "1024"):
        assert f">{word}</text>" in text or f"-->{word}" in text or word in text, word
    assert str(tmp_path) not in text and "2026" not in text.replace("-2026", "")
    (tmp_path / "cpu-gae-N.svg").touch()  # of a curve that is no longer measured
    results = RESULTS | {"curves": [*rows, *growing("rollout_advantages", "T", (64,))]}  # a point is no curve
    assert plots.complaints(tmp_path, "cpu", results) == ["cpu-gae-N.svg", "cpu-gae-T.svg"]
    plots.write(tmp_path, "cpu", results)
    assert [path.name for path in tmp_path.iterdir()] == ["cpu-gae-T.svg"]
    assert plots.complaints(tmp_path, "cpu", results) == []
    results["curves"][0]["median_ms"] += 1
    assert plots.complaints(tmp_path, "cpu", results) == ["cpu-gae-T.svg"]


def test_curves_are_of_cases_that_can_be_run():
    """The quick test runs one; here names and sizes."""
    for curve in curves.CURVES:
        bench = harness.load(curve.op)
        known = next(case for case in bench.cases() if case.quick)
        assert list(curve.base.sizes) == list(known.sizes), curve
        assert set(curve.peers) <= set(bench.peers(curve.case(1) if curve.axis != curves.THREADS else curve.base)), (
            curve
        )
    assert [curves.counts(threads) for threads in (0, 1, 2, 6)] == [[], [1], [1, 2], [1, 2, 4, 6]]


def test_threads_are_set_for_a_point_and_put_back(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(harness, "run_case", lambda *_: seen.append(torch.get_num_threads()) or [])
    monkeypatch.setattr(machine, "ceilings", lambda device: CEILINGS)
    curve = next(curve for curve in curves.CURVES if curve.axis == curves.THREADS)
    for x in (before, before + 1):
        assert curves.measure(curve, x, "cpu", 1.0, CEILINGS) == []
    assert (seen, torch.get_num_threads()) == ([before, before + 1], before)


# --------------------------------------------------------------------------------------------------------- the targets


def test_targets_are_of_cases_that_are_run():
    for target in targets.TARGETS:
        bench = harness.load(target.op)
        (case,) = (case for case in bench.cases() if str(case) == target.case)
        assert case.runs("cpu", quick=False) and target.phase in bench.work(case)
        assert target.peer in {None, targets.FASTEST, *bench.peers(case)}


def test_targets_are_judged_by_the_measured_rows():
    ours = timing("ours native", 4.0, share=0.7, limit_ms=3.0)
    found = {"ours native": ours, "torch.compile": timing("torch.compile", 12.0), "loop": timing("loop", 9.0)}
    place = "gae", "B=2 T=3 fp32", "fwd"
    for target, wanted in (
        (targets.faster(*place, 3, "torch.compile"), ("3.0 ×", "yes")),
        (targets.faster(*place, 3.1, "torch.compile"), ("3.0 ×", "no")),
        (targets.faster(*place, 2.2), ("2.2 × (loop)", "yes")),
        (targets.faster(*place, 2.3), ("2.2 × (loop)", "no")),
        (targets.faster(*place, 2, "Liger"), ("not measured", "–")),
        (targets.leaner(*place, 0.34, "torch.compile"), ("0.33 (4 of 12 MiB)", "yes")),
        (targets.leaner(*place, 0.4, "loop"), ("0.44 (4 of 9 MiB)", "no")),
        (targets.near_the_limit(*place, 0.7, "reading"), ("70%", "yes")),
        (targets.near_the_limit(*place, 0.71, "reading"), ("70%", "no")),
        (targets.within(*place, 4, "products"), ("4 ms, where they take 3 ms", "yes")),
        (targets.within(*place, 3.9, "products"), ("4 ms, where they take 3 ms", "no")),
        (targets.below(*place, 4.1, "a map"), ("4.00 MiB", "yes")),
        (targets.below(*place, 4, "a map"), ("4.00 MiB", "no")),
    ):
        assert targets.judged(target, found) == wanted, target.goal
    assert targets.judged(targets.faster(*place, 3), {}) == ("not measured", "–")
    unknown = {"ours native": ours | {"peak_extra_mib": None}}
    assert targets.judged(targets.below(*place, 4, "a map"), unknown) == ("not measured", "–")
    assert len(targets.table({}).splitlines()) == 2 + len(targets.TARGETS)


def test_summary_has_a_line_an_op_and_the_targets():
    rows = [
        timing(name, median, op=op, case=case, phase=phase)
        for op, case, phase in (
            ("token_logprobs", "N=1024 V=50257 fp32", "fwd"),  # a target
            ("token_logprobs", "N=1024 V=50257 fp32", "bwd"),
            ("token_logprobs", "N=1024 V=50257 fp32", "fwd+bwd"),
            ("token_logprobs", "N=1024 V=50257 fp32 entropy", "fwd"),
            ("gae", "B=2 T=3 fp32", "fwd"),
        )
        for name, median in (("ours native", 4.0), ("torch eager", 120.0), ("loop", 80.0))
    ]
    assert report.summary(RESULTS | {"rows": rows}).splitlines()[2:] == [
        f"| {place} | 4.0 | 80.0 loop | 20.0× | 50% | 4.0 / 80.0 |"
        for place in (
            "`token_logprobs` | N=1024 V=50257 fp32 | fwd",
            "`token_logprobs` | N=1024 V=50257 fp32 | fwd+bwd",
            "`gae` | B=2 T=3 fp32 | fwd",
        )
    ]


# --------------------------------------------------------------------------------------------------------- the README


def test_readme_tables_and_plots_are_written_from_the_results(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"README\.md must exist"):
        report.update()
    report.README.write_text(f"before\n{report.BEGIN}\nafter\n")
    with pytest.raises(ValueError, match=re.escape(f"must have one line {report.END}, got 0")):
        report.update()
    report.README.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    grown = RESULTS | {"curves": growing("gae", "T", (1, 2)), "not_reached": ["gae B=9 T=9 fp32"]}
    report.write(tmp_path / "cpu.json", grown)
    (tmp_path / "another.json").write_text('{"rows": []}')  # not of this kind
    assert report.out_of_step() == ["README.md", "cpu.md", "cpu-gae-T.svg"]
    assert main(["--readme"]) == 0
    assert report.out_of_step() == []
    text, document = report.README.read_text(), (tmp_path / "cpu.md").read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n### CPU\n") and text.endswith(f"{report.END}\nafter\n")
    for wanted in (report.summary(grown), targets.table(report.groups(grown["rows"])), report.NO_GPU):
        assert wanted in text
    assert "![gae over T](benchmarks/results/cpu-gae-T.svg)" in text and "[benchmarks/results/cpu.md]" in text
    assert report.table(grown) in document and "![gae over T](cpu-gae-T.svg)" in document
    assert "- gae B=9 T=9 fp32: no time was left" in document
    report.write(tmp_path / "gpu.json", GPU_RESULTS)
    assert report.out_of_step() == ["README.md", "gpu.md"]
    assert main(["--readme"]) == 0
    assert "\n### NVIDIA X\n" in report.README.read_text() and report.NO_GPU not in report.README.read_text()


def test_readme_says_that_no_gpu_was_measured_as_long_as_none_was():
    measured = [results["machine"]["device"] for results in report.measured().values()]
    assert report.README.read_text().count(report.NO_GPU) == ("cuda" not in measured)


def test_readme_tables_and_plots_are_in_step_with_the_results():
    assert report.out_of_step() == [], "run: python -m benchmarks --readme"
    assert all(path.stat().st_size < 60_000 for path in report.FOLDER.glob("*.svg"))
