"""The command line: flags from a config dataclass, mistakes named, exit codes."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

import rlhf
from rlhf import cli
from rlhf.cli import STAGES, Stage, main
from rlhf.config import CommonConfig, UserError, option, range_text
from rlhf.flags import _kind


@dataclass(frozen=True, kw_only=True)
class ToyConfig(CommonConfig):
    kl_coef: float = option(0.05, "weight of the KL (nats⁻¹), 5 % of the reward")
    lam: float = option(0.95, "λ of GAE", low=0, high=1)
    fractions: tuple[float, ...] = option((), "shares to hold out", above=0, below=1)
    clip: float | None = option(None, "bound of the ratio", above=1)
    num_mini_batches: int = option(4, "minibatches a step")
    reward_shaping: str = option("terminal", "where the score goes", choices=("terminal", "abc"))
    whiten: bool = option(True, "whiten the advantages")
    ref: str | None = option(None, "reference model")
    max_steps: int | None = option(None, "steps at most")
    target: float | None = option(6.0, "KL to steer to (nats)")
    data: tuple[str, ...] = option((), "data files")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_mini_batches < 1:
            raise UserError(f"num_mini_batches must be at least 1, got {self.num_mini_batches}")


@pytest.fixture
def toy(monkeypatch):
    """`rlhf ppo` with ToyConfig; the list it gives collects the configs that main was called with."""
    calls: list[ToyConfig] = []

    def stage_main(config):
        calls.append(config)
        return Path(config.out)

    module = types.ModuleType("toy_stage")
    module.ToyConfig, module.main = ToyConfig, stage_main
    monkeypatch.setitem(sys.modules, "toy_stage", module)
    monkeypatch.setitem(STAGES, "ppo", Stage("toy_stage", "ToyConfig", "a stage for tests"))
    monkeypatch.delenv("RLHF_TRACEBACK", raising=False)
    return calls


def refused(capsys, *argv: str) -> str:
    """The one line on stderr of a command that must end with 2."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("\n") and captured.err.count("\n") == 1
    return captured.err.rstrip("\n")


# --- parsing ---


def test_defaults(toy, capsys):
    assert main(["ppo", "--out", "runs/x"]) == 0
    assert toy == [ToyConfig(out="runs/x")]
    assert re.fullmatch(r"rlhf ppo: done in 0 s, see runs/x\n", capsys.readouterr().out)


def test_no_progress_bars_of_transformers_in_a_log(toy, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    assert main(["ppo", "--out", "o"]) == 0
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_every_type(toy):
    argv = "--out o --kl-coef 1e-3 --num-mini-batches 2 --reward-shaping abc --no-whiten --ref runs/sft --max-steps 7"
    assert main(["ppo", *argv.split(), "--target", "none", "--data", "a.jsonl", "b.jsonl", "--resume"]) == 0
    expected = ToyConfig(
        out="o",
        kl_coef=0.001,
        num_mini_batches=2,
        reward_shaping="abc",
        whiten=False,
        ref="runs/sft",
        max_steps=7,
        target=None,
        data=("a.jsonl", "b.jsonl"),
        resume=True,
    )
    assert toy == [expected]
    assert type(toy[0].kl_coef) is float


def test_underscores_equals_signs_and_repeated_flags(toy):
    argv = ["ppo", "--out=a_b", "--kl_coef=1", "--no_whiten", "--data", "x_y", "--data=z"]
    assert main(argv) == 0
    assert toy == [ToyConfig(out="a_b", kl_coef=1.0, whiten=False, data=("x_y", "z"))]


def test_stage_names_take_underscores(monkeypatch, toy):
    monkeypatch.setitem(STAGES, "best-of-n", STAGES["ppo"])
    assert main(["best_of_n", "--out", "o"]) == 0
    assert len(toy) == 1


# --- mistakes ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--kl-ceof", "1"], "unknown flag --kl-ceof; did you mean --kl-coef?"),
        (["--kl_ceof=1"], "unknown flag --kl-ceof; did you mean --kl-coef?"),
        (["--kl-coe", "1"], "unknown flag --kl-coe; did you mean --kl-coef?"),  # no silent prefix matching
        (["--zzz"], "unknown flag --zzz"),
        (["stray"], "'stray' belongs to no flag"),
        (["--kl-coef", "high"], "--kl-coef must be a number, got 'high'"),
        (["--num-mini-batches", "1.5"], "--num-mini-batches must be a whole number, got '1.5'"),
        (["--max-steps", "x"], "--max-steps must be a whole number or none, got 'x'"),
        (["--kl-coef"], "argument --kl-coef: expected one argument"),
        (["--reward-shaping", "dense"], "reward_shaping must be one of terminal, abc, got 'dense'"),
        (["--num-mini-batches", "0"], "num_mini_batches must be at least 1, got 0"),
        (["--lam", "1.01"], "lam must be at least 0 and at most 1, got 1.01"),
        (["--lam", "nan"], "lam must be at least 0 and at most 1, got nan"),
        (["--fractions", "0.5", "0"], "fractions must be greater than 0 and less than 1, got 0.0"),
        (["--clip", "1"], "clip must be greater than 1, got 1.0"),
        (["--resume", "--overwrite"], "resume and overwrite exclude each other, got both"),
    ],
)
def test_mistakes_are_named(toy, capsys, argv, message):
    assert refused(capsys, "ppo", "--out", "o", *argv) == f"rlhf ppo: {message}"
    assert toy == []


def test_required_flag(toy, capsys):
    assert refused(capsys, "ppo") == "rlhf ppo: --out is required: run folder to write"


def test_unknown_command(capsys):
    assert refused(capsys, "pp0") == "rlhf: unknown command pp0; did you mean ppo?; see rlhf --help"


# --- config files ---


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_config_file_and_flags_that_win(toy, tmp_path, name):
    values = {"out": "o", "kl-coef": 1, "whiten": False, "max_steps": None, "data": ["a"], "num_mini_batches": 8}
    text = (
        json.dumps(values) if name.endswith("json") else "\n".join(f"{k}: {json.dumps(v)}" for k, v in values.items())
    )
    (tmp_path / name).write_text(text)
    assert main(["ppo", "--config", str(tmp_path / name), "--num-mini-batches", "2"]) == 0
    assert toy == [ToyConfig(out="o", kl_coef=1.0, whiten=False, data=("a",), num_mini_batches=2)]


def test_yaml_number_without_a_dot_is_a_number(toy, tmp_path):
    (tmp_path / "c.yaml").write_text("out: o\nkl_coef: 1e-5\n")  # YAML 1.1 reads this as a text
    assert main(["ppo", "--config", str(tmp_path / "c.yaml")]) == 0
    assert toy[0].kl_coef == 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl_ceof: 1", "unknown flag kl_ceof; did you mean kl_coef?"),
        ("out: 5", "--out must be a text, got 5"),
        ("whiten: 1", "--whiten must be true or false, got 1"),
        ("num_mini_batches: true", "--num-mini-batches must be a whole number, got True"),
        ("num_mini_batches: 1.5", "--num-mini-batches must be a whole number, got 1.5"),
        ("- a\n- b", "must hold one object with flags and values, got list"),
        ("a: [", "is not valid"),
    ],
)
def test_mistakes_in_a_config_file(toy, capsys, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert message in refused(capsys, "ppo", "--config", str(tmp_path / "c.yaml"))


def test_missing_config_file(toy, capsys, tmp_path):
    assert "No such file or directory" in refused(capsys, "ppo", "--config", str(tmp_path / "none.yaml"))


# --- errors of a stage, Ctrl-C ---


def raising(monkeypatch, error: BaseException) -> None:
    def stage_main(config):
        raise error

    monkeypatch.setattr(sys.modules["toy_stage"], "main", stage_main)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("data has no prompts"), "rlhf ppo: data has no prompts"),
        (FileExistsError("runs/x is not empty"), "rlhf ppo: runs/x is not empty (RLHF_TRACEBACK=1 shows where)"),
        (OSError("no such model\nlook there"), "rlhf ppo: no such model look there (RLHF_TRACEBACK=1 shows where)"),
    ],
)
def test_errors_of_a_stage_are_one_line(toy, capsys, monkeypatch, error, message):
    raising(monkeypatch, error)
    assert refused(capsys, "ppo", "--out", "o") == message
    monkeypatch.setenv("RLHF_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["ppo", "--out", "o"])


def test_bugs_keep_their_traceback(toy, monkeypatch):
    raising(monkeypatch, AttributeError("no such attribute"))
    with pytest.raises(AttributeError):
        main(["ppo", "--out", "o"])


def test_missing_package_is_named(toy, capsys, monkeypatch):
    raising(monkeypatch, ModuleNotFoundError("No module named 'matplotlib.figure'", name="matplotlib.figure"))
    message = 'rlhf ppo: needs matplotlib: pip install "rlhf-kernels[pipeline]"'
    assert refused(capsys, "ppo", "--out", "o") == message


def test_ctrl_c(toy, capsys, monkeypatch, tmp_path):
    raising(monkeypatch, KeyboardInterrupt())
    assert main(["ppo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nrlhf ppo: interrupted\n"
    (tmp_path / "checkpoints" / "step-000010").mkdir(parents=True)
    assert main(["ppo", "--out", str(tmp_path)]) == 130
    assert f"--resume continues from the last checkpoint in {tmp_path}" in capsys.readouterr().err


# --- help ---


def test_stage_help_shows_every_flag_with_its_default(toy, capsys):
    assert main(["ppo", "--out", "o", "--help"]) == 0
    out = capsys.readouterr().out
    flags = re.findall(r"^  (--[\w-]+)", out, flags=re.M)
    assert flags[:4] == ["--config", "--preset", "--out", "--kl-coef"] and flags[-1] == "--report-to"
    text = " ".join(out.split())
    for flag in (
        "--out STR",
        "--kl-coef FLOAT",
        "--reward-shaping {terminal,abc}",
        "--whiten, --no-whiten",
        "--data STR",
    ):
        assert flag in text
    assert "weight of the KL (nats⁻¹), 5 % of the reward (default: 0.05)" in text
    assert "λ of GAE (default: 0.95; at least 0 and at most 1)" in text
    assert "run folder to write (required)" in text
    assert "whiten the advantages (default: on)" in text and "data files (default: none)" in text
    assert toy == []


SIGNED = {"attention_layers", "attention_heads", "token_reward_weight"}
"""Numbers that may be anything: indices from either end, weights of either sign."""


@pytest.mark.parametrize("name", STAGES)
def test_every_number_has_a_range(name):
    """Without one a flag would take NaN, and its mistakes would show somewhere inside the run."""
    stage = STAGES[name]
    config = getattr(importlib.import_module(stage.module), stage.config)
    kinds = typing.get_type_hints(config)
    numbers = [
        field.name
        for field in dataclasses.fields(config)
        if _kind(kinds[field.name])[0] in (int, float) and not field.metadata.get("choices")
    ]
    without = [name for name in numbers if not range_text(config.__dataclass_fields__[name])]
    assert set(without) <= SIGNED, f"options without low, above, high or below: {without}"


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: rlhf {name}" in text and "--out" in text and "--config FILE" in text
    assert not re.search(r"^ +--[\w-]+ \S+ +\((default|required)", text, flags=re.M), "a flag without help text"


def test_overview_and_version(capsys):
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and stage.help in text for name, stage in STAGES.items())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf {rlhf.__version__}\n"


def run_module(*argv: str) -> subprocess.CompletedProcess:
    source = Path(cli.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, timeout=60)


def test_help_is_fast_and_imports_no_torch():
    start = time.monotonic()
    assert "usage: rlhf" in run_module("-m", "rlhf", "--help").stdout
    assert time.monotonic() - start < 2
    code = "import sys; from rlhf.cli import main; main(['report', '--help']); print('torch' in sys.modules)"
    assert run_module("-c", code).stdout.endswith("False\n")


@pytest.mark.parametrize("argv", [["--help"], ["env"]])
def test_a_reader_that_has_gone_is_no_error(argv):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "rlhf", *argv], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_exit_code_of_the_process():
    done = run_module("-m", "rlhf", "report", "--rusn", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rlhf report: unknown flag --rusn; did you mean --runs?\n"


def test_version_is_the_package_version():
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert f'version = "{rlhf.__version__}"' in project.read_text()
