"""The loop's guard: bad steps, checkpoints, signals, failures, resuming, on one weight and without a language model."""

import json
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from rlhf.checkpoint import read_state, write_state
from rlhf.config import CommonConfig, UserError
from rlhf.data import collate
from rlhf.files import read_lines
from rlhf.guard import MAX_WRITTEN, Guard, Interrupted, NonFinite, Values, _as_state, check_finite
from rlhf.run import Run, seed_everything

TOTAL = 8


class Model(torch.nn.Module):
    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))
        self.config = SimpleNamespace()
        if folder:
            self.weight.data.fill_(json.loads((folder / "weight.json").read_text()))

    def save_pretrained(self, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "weight.json").write_text(json.dumps(self.weight.item()))


class Letters:
    """Token 0 is "a", 1 is "b" …"""

    special_tokens_map: ClassVar[dict] = {}

    def decode(self, ids, **_):
        return "".join(chr(97 + each) for each in ids)

    def save_pretrained(self, folder):
        pass


@dataclass(frozen=True, kw_only=True)
class Config(CommonConfig):
    pass


def train(out, *, loss_of=None, before=None, after=None, constant="same", **options):
    """Weight 1 walks at random for TOTAL steps; step → loss_of, before and after the weight changes → callbacks."""
    options = {"save_steps": 2, "max_bad_steps": 3, **options}
    config = Config(out=str(out), **options)
    run = Run.create(out, "sft", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(0)
    checkpoint = run.load_checkpoint()
    model = Model(checkpoint.folder / "model" if checkpoint else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    count = Values(drawn=0.0)
    with Guard(
        run,
        config,
        TOTAL,
        models={"model": (model, Letters())},
        parts={"optimizer": optimizer, "count": count},
        constants={"data": constant},
        checkpoint=checkpoint,
    ) as guard:
        for step in guard.steps("test"):
            metrics = {"lr": 0.1}
            batch = collate([[step]], [[1, 2]], pad_id=9)
            with guard.attempt(batch=batch) as seen:
                noise = torch.randn(())
                count["drawn"] += noise.item()
                seen["noise"] = noise
                if before:
                    before(step)
                loss = model.weight * noise * (loss_of or {}).get(step, 1.0)
                loss.backward()
                check_finite(loss=loss.detach(), gradient=model.weight.grad)
                optimizer.step()
                metrics |= {"loss": loss.item(), "drawn": count["drawn"]}
                if after:
                    after(step)
            optimizer.zero_grad()
            guard.log(metrics, "loss")
    run.save_model(model, None)
    run.finish({"weight": model.weight.item()})
    return model.weight.item()


def metrics(out):
    return read_lines(out / "metrics.jsonl")


def checkpoints(out):
    return [path.name for path in sorted((out / "checkpoints").iterdir())]


@pytest.fixture
def whole(tmp_path):
    """An uninterrupted run: its metrics and the last weight."""
    weight = train(tmp_path / "whole", save_steps=0)
    return metrics(tmp_path / "whole"), weight


def at(number, error):
    """A callback that raises in that step."""

    def callback(step):
        if step == number:
            raise error

    return callback


# --- steps whose numbers are not finite ---


def test_check_finite():
    check_finite(loss=1.0, gradient=torch.zeros(3), empty=torch.zeros(0), count=torch.tensor(3))
    with pytest.raises(NonFinite, match="the value gradient is inf"):
        check_finite(loss=torch.tensor(0.5), value_gradient=torch.tensor([1.0, math.inf]))
    with pytest.raises(NonFinite, match="the loss is nan"):
        check_finite(loss=math.nan)


def test_a_bad_step_is_skipped_counted_and_written_aside(tmp_path, capsys):
    train(tmp_path, loss_of={3: math.nan, 6: math.inf})
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert "loss" not in lines[2] and math.isfinite(lines[3]["loss"])
    written = read_state(tmp_path / "skipped" / "step-000003")
    assert written["step"] == 3 and written["why"] == "the loss is nan"
    assert written["batch"]["texts"] == ["dbc"] and written["batch"]["tokens"].tolist() == [[3, 1, 2]]
    assert torch.isfinite(written["noise"])
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == ["step-000003", "step-000006"]
    error = capsys.readouterr().err
    assert f"sft: step 3 is skipped, because the loss is nan; what it was given is in {tmp_path}/skipped/step" in error


def test_a_bad_step_changes_no_weight(tmp_path):
    train(tmp_path, loss_of={2: math.nan, 3: math.nan}, save_steps=1, save_total_limit=9)
    saved = [read_state(tmp_path / "checkpoints" / name) for name in checkpoints(tmp_path)]
    assert [each["step"] for each in saved] == [1, 4, 5, 6, 7]  # none while steps fail
    updates = [each["state"]["parts"]["optimizer"]["state"][0]["step"].item() for each in saved]
    assert updates == [1, 2, 3, 4, 5]


def test_too_many_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    bad = dict.fromkeys((4, 6, 7, 8), math.nan)
    message = "3 steps in a row were skipped, the last one because the loss is nan; what they were given is in"
    with pytest.raises(UserError, match=message):
        train(tmp_path, loss_of=bad, save_total_limit=1)
    # Due at step 4, which failed, it was written at step 5.
    assert checkpoints(tmp_path) == ["step-000005"]
    assert [line["skipped_steps"] for line in metrics(tmp_path)] == [0, 0, 0, 1, 1, 2, 3]


def test_only_some_are_written_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.guard.MAX_WRITTEN", 2)
    train(tmp_path, loss_of=dict.fromkeys((1, 2, 4, 5), math.nan))
    assert len(list((tmp_path / "skipped").iterdir())) == 2 < MAX_WRITTEN
    assert metrics(tmp_path)[-1]["skipped_steps"] == 4


def test_the_count_goes_on_after_a_resume(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, loss_of={1: math.nan}, before=at(4, SystemExit()))
    train(tmp_path, resume=True)
    assert metrics(tmp_path)[-1]["skipped_steps"] == 1


# --- failures ---


def test_a_step_that_fails_before_it_changed_the_weights_loses_nothing(tmp_path, whole, capsys):
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        train(out, save_steps=0, before=at(6, ZeroDivisionError()))
    assert checkpoints(out) == ["step-000005"]
    assert "step 6 failed; --resume continues from the end of step 5" in capsys.readouterr().err
    assert train(out, resume=True) == whole[1]
    assert metrics(out) == whole[0]


def test_a_step_that_fails_after_that_leaves_the_last_checkpoint(tmp_path, whole):
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        train(out, after=at(6, ZeroDivisionError()))
    assert checkpoints(out) == ["step-000002", "step-000004"]
    assert train(out, resume=True) == whole[1]
    assert metrics(out) == whole[0]


def test_the_first_error_is_shown_when_no_checkpoint_can_be_written(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "save_checkpoint", full)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, save_steps=0, before=at(6, ZeroDivisionError()))
    assert "no checkpoint could be written: [Errno 28] No space left on device" in capsys.readouterr().err


def test_changed_inputs_are_refused_and_nothing_is_touched(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, before=at(6, SystemExit()))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"step-000004 cannot be continued: its data had other content then"):
        train(tmp_path, resume=True, constant="other")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- Ctrl-C and SIGTERM ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 5, TOTAL])
def test_a_signal_ends_after_the_step_with_a_checkpoint(tmp_path, whole, number, step, capfd):
    out = tmp_path / "run"
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stop:
        train(out, save_steps=0, before=lambda now: now == step and os.kill(os.getpid(), number))
    assert stop.value.signal_number == number
    assert checkpoints(out) == [f"step-00000{step}"]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "stopping after this step, with a checkpoint" in capfd.readouterr().err
    assert train(out, resume=True) == whole[1]
    assert metrics(out) == whole[0]


def test_a_second_signal_stops_at_once(tmp_path):
    def twice(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stop:
        train(tmp_path, before=twice)
    assert not isinstance(stop.value, Interrupted)
    assert checkpoints(tmp_path) == ["step-000002", "step-000004"]


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(tmp_path, before=lambda _: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(metrics(tmp_path)) == TOTAL


def test_tensors_that_share_their_memory_are_written_aside(tmp_path):
    x = torch.arange(3.0)
    write_state(tmp_path, _as_state([x, x, x[:2]], None))
    assert [part.tolist() for part in read_state(tmp_path)] == [[0, 1, 2], [0, 1, 2], [0, 1]]
