"""The run folder: what is written survives crashes, what is there is not lost."""

import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest
import torch

from rlhf import files
from rlhf.config import MISSING, CommonConfig, UserError, option
from rlhf.run import (
    ProgressLines,
    Run,
    resolve_device,
    resolve_model,
    rng_state,
    seed_everything,
    set_rng_state,
)


@dataclass(frozen=True, kw_only=True)
class StageConfig(CommonConfig):
    steps: int = option(4, "training steps")
    init: str = option("tiny", "start model")
    save_total_limit: int | None = option(2, "checkpoints kept")


class FakeModel:
    """Writes two files, as save_pretrained does; `fails` breaks off between them."""

    def __init__(self, weights: str, fails: BaseException | None = None) -> None:
        self.weights, self.fails = weights, fails

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "config.json").write_text("{}")
        if self.fails:
            raise self.fails
        (Path(folder) / "model.safetensors").write_text(self.weights)


def create(out: Path, stage: str = "sft", **options) -> Run:
    config = StageConfig(out=str(out), **options)
    return Run.create(out, stage, config, resume=config.resume, overwrite=config.overwrite)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- creating ---


def test_run_json_before_and_after(tmp_path):
    run = create(tmp_path / "a" / "run")
    info = json.loads((run.folder / "run.json").read_text())
    assert info["stage"] == "sft" and info["config"]["steps"] == 4 and info["config"]["init"] == "tiny"
    assert info["finished"] is False and info["seconds"] is None and info["versions"]["torch"] == torch.__version__
    assert run.finish({"loss": torch.tensor(0.5), "worst": float("nan")}) == run.folder
    info = json.loads((run.folder / "run.json").read_text())
    assert info["finished"] is True and info["seconds"] >= 0 and info["summary"] == {"loss": 0.5, "worst": None}


def test_existing_folder_is_refused_and_left_alone(tmp_path):
    create(tmp_path).log(1, {"loss": 1.0})
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match=r"not empty; --resume continues the run there, --overwrite deletes it"):
        create(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_folder_that_is_no_run_is_never_touched(tmp_path, option):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"has no run\.json"):
        create(tmp_path, **{option: True})
    assert content(tmp_path) == {"thesis.tex": "years of work"}


def test_kill_while_the_first_file_was_written(tmp_path):
    (tmp_path / ".run.json.tmp").write_text('{"sta')
    create(tmp_path)
    assert list(content(tmp_path)) == ["run.json"]


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("text")
    with pytest.raises(FileExistsError, match="is a file"):
        create(tmp_path / "out", overwrite=True)


def test_overwrite_removes_the_old_run(tmp_path):
    run = create(tmp_path)
    run.log(1, {"loss": 1.0})
    run.save_model(FakeModel("old"), None)
    create(tmp_path, "ppo", overwrite=True)
    assert list(content(tmp_path)) == ["run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["stage"] == "ppo"


def test_overwrite_refuses_to_delete_what_the_run_reads(tmp_path):
    create(tmp_path).save_model(FakeModel("start model"), None)
    before = content(tmp_path)
    for init in (tmp_path, tmp_path / "model"):
        with pytest.raises(UserError, match=r"--overwrite would delete .* which init reads"):
            create(tmp_path, overwrite=True, init=str(init))
    assert content(tmp_path) == before


def test_resume_of_another_stage_is_refused(tmp_path):
    create(tmp_path, "rm")
    with pytest.raises(UserError, match="holds a rm run, which sft cannot resume"):
        create(tmp_path, resume=True)


def test_resume_where_nothing_is_starts_a_run(tmp_path):
    run = create(tmp_path / "new", resume=True)
    assert run.load_checkpoint() is None
    assert (run.folder / "run.json").exists()


def test_resume_names_changed_settings(tmp_path, capsys):
    create(tmp_path)
    create(tmp_path, resume=True, steps=9)
    assert capsys.readouterr().err == "sft: resumed with steps = 9; the run began with 4\n"


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(UserError, match="exclude each other"):
        StageConfig(out="x", resume=True, overwrite=True)


# --- metrics ---


def test_log_writes_one_line_a_step(tmp_path):
    run = create(tmp_path)
    record = run.log(1, {"loss": torch.tensor(0.25), "eps": 64, "kl": numpy.float32(0.5), "bad": float("inf")})
    run.log(2, {"loss": 0.125})
    assert record == {"loss": 0.25, "eps": 64, "kl": 0.5, "bad": None}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, **record}, {"step": 2, "loss": 0.125}]


def test_log_refuses_what_is_no_number(tmp_path):
    with pytest.raises(TypeError, match="log: loss must be a number or a one-element tensor, got str"):
        create(tmp_path).log(1, {"loss": "high"})


def test_timers_add_up_and_reset(tmp_path):
    run = create(tmp_path)
    for _ in range(2):
        with run.timer("train"):
            time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), run.timer("failed"):
        raise ZeroDivisionError
    first, second = run.log(1, {}), run.log(2, {})
    assert set(first) == {"time/train", "time/failed"} and second == {}
    assert 0.04 <= first["time/train"] < 1 and 0 <= first["time/failed"] < 0.02


def test_samples_take_tensors(tmp_path):
    create(tmp_path).sample({"step": 1, "tokens": ["a", "b"], "credit": torch.tensor([0.5, -1.0]), "gold": None})
    line = json.loads((tmp_path / "samples.jsonl").read_text())
    assert line == {"step": 1, "tokens": ["a", "b"], "credit": [0.5, -1.0], "gold": None}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = create(tmp_path, report_to="tensorboard")
    run.log(3, {"objective/kl": 1.5})
    run.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("objective/kl")] == [(3, 1.5)]


# --- resuming ---


def test_resume_drops_lines_after_the_checkpoint(tmp_path):
    run = create(tmp_path)
    for step in range(1, 4):
        run.log(step, {"loss": float(step)})
        run.sample({"step": step, "prompt": "p"})
        if step == 2:
            run.save_checkpoint(step, {}, {"n": 2})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    resumed = create(tmp_path, resume=True)
    checkpoint = resumed.load_checkpoint()
    assert (checkpoint.step, checkpoint.folder.name, checkpoint.state) == (2, "step-000002", {"n": 2})
    resumed.go_on(checkpoint)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [line["step"] for line in files.read_lines(tmp_path / name)] == [1, 2]
    resumed.log(3, {"loss": 3.0})
    assert [line["step"] for line in files.read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_resume_without_a_checkpoint_starts_over(tmp_path):
    create(tmp_path).log(1, {"loss": 1.0})
    run = create(tmp_path, resume=True)
    assert run.load_checkpoint() is None
    run.go_on(None)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_nothing_changes_before_a_resumed_run_goes_on(tmp_path):
    run = create(tmp_path)
    run.save_checkpoint(1, {}, {})
    run.log(2, {"loss": 1.0})
    before = content(tmp_path)
    resumed = create(tmp_path, resume=True, steps=9)
    checkpoint = resumed.load_checkpoint()
    assert content(tmp_path) == before
    resumed.go_on(checkpoint)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["steps"] == 9


def test_bad_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2 is not a JSON object"):
        files.read_lines(tmp_path / "m.jsonl")


def test_seconds_go_on_after_a_resume(tmp_path):
    run = create(tmp_path)
    run._start -= 100  # as if the run had begun 100 s ago
    run.save_checkpoint(1, {}, {})
    resumed = create(tmp_path, resume=True)
    resumed.go_on(resumed.load_checkpoint())
    resumed.finish({})
    assert 100 <= json.loads((tmp_path / "run.json").read_text())["seconds"] < 110


# --- models and checkpoints ---


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_crash_while_saving_keeps_the_old_model(tmp_path, error):
    run = create(tmp_path)
    run.save_model(FakeModel("old"), None)
    before = content(tmp_path)
    with pytest.raises(type(error)):
        run.save_model(FakeModel("new", fails=error), None)
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]
    run.save_model(FakeModel("new"), None)
    assert (tmp_path / "model" / "model.safetensors").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]


def test_kill_between_the_two_renames_is_repaired_on_resume(tmp_path, monkeypatch):
    run = create(tmp_path)
    run.save_model(FakeModel("old"), None)
    rename = files.os.rename

    def killed(source, target):
        if str(source).endswith(".tmp"):
            raise SystemExit
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "rename", killed)
        with pytest.raises(SystemExit):
            run.save_model(FakeModel("new"), None)
    assert not (tmp_path / "model").exists()
    create(tmp_path, resume=True)
    assert (tmp_path / "model" / "model.safetensors").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_crash_while_saving_a_checkpoint_keeps_the_last_one(tmp_path):
    run = create(tmp_path)
    run.save_checkpoint(1, {"model": (FakeModel("one"), None)}, {"n": 1})
    with pytest.raises(OSError, match="disk full"):
        run.save_checkpoint(2, {"model": (FakeModel("two", fails=OSError("disk full")), None)}, {"n": 2})
    checkpoint = create(tmp_path, resume=True).load_checkpoint()
    assert (checkpoint.step, checkpoint.state) == (1, {"n": 1})
    assert (checkpoint.folder / "model" / "model.safetensors").read_text() == "one"


@pytest.mark.parametrize(("limit", "kept"), [(1, [10]), (2, [9, 10]), (None, [1, 8, 9, 10])])
def test_checkpoint_rotation(tmp_path, limit, kept):
    run = create(tmp_path, save_total_limit=limit)
    for step in (1, 8, 9, 10):
        run.save_checkpoint(step, {"value": (FakeModel("v"), None)}, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-{s:06d}" for s in kept]
    assert run.load_checkpoint().step == 10


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, change_a_byte, Path.unlink])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "model/model.safetensors"])
def test_unreadable_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, name, damage):
    run = create(tmp_path)
    for step in (1, 2):
        run.log(step, {"loss": 0.0})
        run.save_checkpoint(step, {"model": (FakeModel("m"), None)}, {"n": torch.tensor(step)})
    damage(tmp_path / "checkpoints" / "step-000002" / name)
    resumed = create(tmp_path, resume=True)
    checkpoint = resumed.load_checkpoint()
    assert (checkpoint.step, checkpoint.state) == (1, {"n": torch.tensor(1)})
    assert "step-000002 cannot be read, going back to the checkpoint before it" in capsys.readouterr().err
    resumed.go_on(checkpoint)
    assert [line["step"] for line in files.read_lines(tmp_path / "metrics.jsonl")] == [1]
    resumed.save_checkpoint(2, {}, {})
    kept = ["step-000001", "step-000002", "unreadable-step-000002"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_no_readable_checkpoint_leaves_everything_as_it_was(tmp_path):
    run = create(tmp_path)
    run.log(1, {"loss": 0.0})
    cut(run.save_checkpoint(1, {}, {}) / "state.json")
    before = content(tmp_path)
    with pytest.raises(UserError, match="no checkpoint can be read; nothing was changed"):
        create(tmp_path, resume=True).load_checkpoint()
    assert content(tmp_path) == before


def test_optimizer_state_survives(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.arange(3.0)
    optimizer.step()
    create(tmp_path).save_checkpoint(1, {}, {"optimizer": optimizer.state_dict()})
    loaded = create(tmp_path, resume=True).load_checkpoint().state["optimizer"]
    assert torch.equal(loaded["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    optimizer.load_state_dict(loaded)


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn(), torch.rand(()).item()]


def test_rng_state_survives_a_checkpoint(tmp_path):
    seed_everything(3)
    draw()  # leaves a second Gaussian waiting in random and in numpy
    create(tmp_path).save_checkpoint(1, {}, {"rng": rng_state()})
    expected = draw()
    seed_everything(4)
    assert draw() != expected
    set_rng_state(create(tmp_path, resume=True).load_checkpoint().state["rng"])
    assert draw() == expected


def test_seed_everything_repeats():
    seed_everything(2**40 + 1)
    first = draw()
    seed_everything(2**40 + 1)
    assert draw() == first


# --- progress ---


def test_progress_off_a_terminal_is_ten_plain_lines(tmp_path, capsys):
    with create(tmp_path).progress(40, "ppo") as progress:
        assert isinstance(progress, ProgressLines)
        for step in range(40):
            progress.set_postfix(score=step / 4, note="ok")
            progress.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "ppo: 4/40 (10 %), 0 s, score 0.75, note ok"
    assert lines[-1].startswith("ppo: 40/40 (100 %)")


@pytest.mark.parametrize(("total", "initial", "lines"), [(3, 0, 3), (40, 20, 5), (0, 0, 0)])
def test_progress_lines_for_short_and_resumed_runs(tmp_path, capsys, total, initial, lines):
    progress = create(tmp_path).progress(total, "sft", initial)
    for _ in range(total - initial):
        progress.update()
    progress.close()
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_progress_bar_when_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RLHF_PROGRESS", "bar")
    with create(tmp_path).progress(2, "ppo") as progress:
        progress.update(2)
    assert "100%" in capsys.readouterr().err


# --- arguments ---


def test_resolve_model(tmp_path, monkeypatch):
    run = create(tmp_path / "runs" / "sft")
    with pytest.raises(UserError, match=r"is a run folder without model/"):
        resolve_model(str(run.folder))
    run.save_model(FakeModel("m"), None)
    run.save_model(FakeModel("v"), None, "value")
    checkpoint = run.save_checkpoint(1, {"model": (FakeModel("c"), None)}, {})
    assert resolve_model(str(run.folder)) == str(run.folder / "model")
    assert resolve_model(str(run.folder), "value") == str(run.folder / "value")
    assert resolve_model(str(run.folder / "model")) == str(run.folder / "model")
    assert resolve_model(str(checkpoint)) == str(checkpoint / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("runs/sft") == "runs/sft/model"
    for name in ("gpt2", "Qwen/Qwen3-0.6B"):
        assert resolve_model(name) == name
    for path in ("./gpt2", "/no/such", "~/no-such-folder", "runs/stf", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {path}"):
            resolve_model(path)
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_resolve_device():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device must be auto, cpu"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="device cuda:99 is not there"):
        resolve_device("cuda:99")


def test_config_checks_choices():
    config = StageConfig(out="x")
    assert replace(config, dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, got 'float8'"):
        replace(config, dtype="float8")
    with pytest.raises(TypeError, match="out"):
        StageConfig()
    assert StageConfig.__dataclass_fields__["out"].default is MISSING
