"""The README's promises: every snippet runs, every command exists, the op table says what is so."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import rlhf_kernels as rk
from rlhf import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)

# What makes a stage small enough for a test; the commands are otherwise the README's.
SMALL = {
    "sft": "--max-steps 3 --batch-size 8",
    "rm": "--max-steps 3 --batch-size 4",
    "ppo": "--steps 1 --batch-size 4 --eval-samples 4 --response-length 6",
    "online": "--steps 2 --batch-size 4 --eval-samples 4 --response-length 6 --refresh-every 1 --label-prompts 4",
    "rrhf": "--rounds 1 --num-prompts 4 --eval-samples 4 --response-length 6",
    "dpo": "--max-steps 1 --batch-size 4 --pairs sampled --num-prompts 4 --eval-samples 4 --response-length 6",
    "rft": "--rounds 1 --num-prompts 4 --eval-samples 4 --response-length 6",
    "best-of-n": "--num-prompts 4 --eval-samples 8 --epochs 1 --response-length 6",
    "evaluate": "--samples 4 --response-length 6",
    "report": "",
}


@pytest.mark.parametrize("code", [code for language, code in SNIPPETS if language == "python"])
def test_python_snippet(code, capsys):
    exec(compile(code, "README.md", "exec"), {})


def commands():
    lines = "".join(code for language, code in SNIPPETS if language == "bash").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_stages_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = [words[1:] for words in commands() if words[0] == "rlhf" and words[1] != "demo"]
    assert [words[0] for words in stages] == list(SMALL)
    for words in stages:
        assert cli.main([*words, *shlex.split(SMALL[words[0]])]) == 0, words
    assert (tmp_path / "runs/report/report.html").stat().st_size > 10_000


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    wanted = {words[1] for words in commands() if words[0] == "make"}
    assert wanted == {"demo", "test", "bench", "end-to-end"} and wanted <= targets


def test_op_table_is_true():
    rows = re.findall(
        r"^\| (`.*?) \| .* \| (CPU|CPU, CUDA|–) \|$", README.split("<!-- benchmarks:begin -->")[0], flags=re.MULTILINE
    )
    listed = [name for names, _ in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted(listed) == sorted(set(rk.__all__) - {"use_backend", "backend"})
    if importlib.util.find_spec("rlhf_kernels._C") is None:
        pytest.skip("the C++ extension is not built: its column cannot be checked")
    ops = rk.backend.table("cpu")
    cuda = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    for names, native in rows:
        for name in re.findall(r"`(\w+)`", names):
            stem = name.removesuffix("_entropy")
            registered = [op for op in ops if op in (stem, f"{stem}_fwd", f"{stem}_bwd")]
            has = bool(registered) and rk.backend.has(stem, "native", "cpu")
            assert has == native.startswith("CPU"), name
            assert bool(re.search(rf'm\.impl\("{stem}(_fwd)?"', cuda)) == native.endswith("CUDA"), name
