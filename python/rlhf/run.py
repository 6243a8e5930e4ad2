"""The run folder: metrics, samples, models and checkpoints, written so that a crash loses nothing that was there.

run.json          stage, config, versions, start, seconds, summary
metrics.jsonl     one JSON object a logged step
rollouts.jsonl    ppo: scores, lengths and KL by position of some steps' responses
samples.jsonl     sampled responses with the credit of each token
labels.jsonl      online: the rankings that were labelled
model/            save_pretrained folder with a model card and training_args.json; ppo also writes value/
checkpoints/      step-000040/{model, value, state.safetensors, state.json}, the last few
skipped/          step-000012/…: what a step was given that was skipped because a number was not finite
"""

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from tqdm import tqdm

from .card import command_of, write_card
from .chat import renderer_hash
from .checkpoint import Unreadable, read_state, write_state
from .config import UserError
from .env import versions
from .files import append_line, clear, new_folder, plain, read_lines, recover, write_atomically, write_json
from .lora import has_adapter, save_adapter


class Checkpoint(NamedTuple):
    """A checkpoint on disk. folder: has the models' folders; seconds: of the run up to it."""

    step: int
    folder: Path
    seconds: float
    state: dict[str, Any]


class Run:
    """One run folder, opened for writing by `Run.create`."""

    def __init__(self, folder: Path, stage: str, config: dict[str, Any]) -> None:
        self.folder = folder
        self.stage = stage
        self.config = config
        self.command = ""
        self._info: dict[str, Any] = {}
        self._timers: dict[str, float] = {}
        self._start = time.monotonic()
        self._writer: Any = None

    @classmethod
    def create(
        cls, out: str | Path, stage: str, config: Any, *, resume: bool = False, overwrite: bool = False
    ) -> "Run":
        """Start a run in the folder `out`, or continue the one that is there.

        config: the stage's config dataclass. resume: continue from the last checkpoint; starts from nothing where
        `out` does not exist yet. overwrite: delete what is in `out`, which must be a run folder.

        Raises FileExistsError where `out` has content and neither is given, or where the content is not a run;
        UserError where the run in `out` is of another stage, or where overwriting would delete the run's own input.
        """
        run = cls(Path(out), stage, plain(dataclasses.asdict(config)))
        run.command = command_of(stage, config)
        tensorboard = run.config.get("report_to") == "tensorboard"
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("report_to=tensorboard needs the tensorboard package: pip install tensorboard")
        run._open_folder(resume, overwrite)
        if tensorboard:
            run._writer = _summary_writer(run.folder / "tensorboard", run._last_step())
        return run

    def _open_folder(self, resume: bool, overwrite: bool) -> None:
        folder, info = self.folder, self.folder / "run.json"
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file; the run folder must be a new or an empty folder")
        # The first thing that is ever written here may have been cut off by a kill.
        started = {path.name for path in folder.iterdir()} - {f".{info.name}.tmp"} if folder.exists() else set()
        if started:
            if not (resume or overwrite):
                raise FileExistsError(
                    f"{folder} is not empty; --resume continues the run there, --overwrite deletes it"
                )
            if not info.exists():
                raise FileExistsError(f"{folder} is not empty and has no run.json: it is no run, and is left alone")
            if overwrite:
                self._refuse_deleting_inputs()
                clear(folder, last=info.name)
        folder.mkdir(parents=True, exist_ok=True)

        previous = json.loads(info.read_text(encoding="utf-8")) if info.exists() else {}
        if previous:
            self._take_over(previous)
        self._info = {
            "stage": self.stage,
            "config": self.config,
            "command": self.command,
            "versions": versions(),
            "started": previous.get("started") or datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": None,
            "finished": False,
            "summary": {},
        }
        if not previous:  # a resumed run writes it when it goes on: one that is refused leaves everything as it was
            write_json(info, self._info)

    def _take_over(self, previous: dict[str, Any]) -> None:
        if previous["stage"] != self.stage:
            raise UserError(f"{self.folder} holds a {previous['stage']} run, which {self.stage} cannot resume")
        for folder in (self.folder, self.folder / "checkpoints"):
            recover(folder)
        old, new = previous["config"], self.config
        for name in sorted(old.keys() | new.keys()):
            if name not in ("out", "resume", "overwrite") and old.get(name) != new.get(name):
                self.say(f"resumed with {name} = {new.get(name)!r}; the run began with {old.get(name)!r}")

    def _refuse_deleting_inputs(self) -> None:
        folder = self.folder.resolve()
        for name, value in self.config.items():
            for text in value if isinstance(value, list) else [value]:
                if name == "out" or not isinstance(text, str) or not text or not Path(text).exists():
                    continue
                if folder in (Path(text).resolve(), *Path(text).resolve().parents):
                    raise UserError(f"--overwrite would delete {text}, which {name} reads; choose another --out")

    def say(self, message: str) -> None:
        """A line on stderr, with the stage's name in front."""
        print(f"{self.stage}: {message}", file=sys.stderr, flush=True)

    # Metrics, samples, timers

    def log(self, step: int, metrics: dict[str, Any]) -> dict[str, float | None]:
        """Append one line to metrics.jsonl, together with the timers since the last call; returns what was written.

        Values are numbers or one-element tensors. A value that is not finite becomes null: JSON has no NaN.
        Log a step before saving its checkpoint: resuming drops the lines after the checkpoint's step.
        """
        timings = {f"time/{name}": seconds for name, seconds in self._timers.items()}
        self._timers = {}
        record = {name: _number(name, value) for name, value in {**metrics, **timings}.items()}
        append_line(self.folder / "metrics.jsonl", {"step": int(step), **record})
        if self._writer:
            for name, value in record.items():
                self._writer.add_scalar(name, math.nan if value is None else value, step)
            self._writer.flush()
        return record

    def sample(self, record: dict[str, Any]) -> None:
        """Append one line to samples.jsonl: step, prompt, tokens, credit, rewards, score, gold."""
        append_line(self.folder / "samples.jsonl", record)

    def rollout(self, record: dict[str, Any]) -> None:
        """Append one line to rollouts.jsonl: step, scores, lengths, terminated, kl, kl_by_position."""
        append_line(self.folder / "rollouts.jsonl", record)

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the block's seconds to `time/<name>` of the next logged line; waits for the GPU at the block's end."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._timers[name] = self._timers.get(name, 0.0) + time.perf_counter() - start

    def progress(self, total: int, description: str, initial: int = 0) -> "tqdm[Any] | ProgressLines":
        """A progress bar on stderr with update(), set_postfix() and close(), also a context manager.

        Where stderr is not a terminal: a plain line every tenth of the way. RLHF_PROGRESS=bar forces the bar.
        """
        if sys.stderr.isatty() or os.environ.get("RLHF_PROGRESS") == "bar":
            return tqdm(total=total, desc=description, initial=initial, dynamic_ncols=True, file=sys.stderr)
        return ProgressLines(total, description, initial)

    # Models and checkpoints

    def save_model(self, model: Any, tokenizer: Any, name: str = "model") -> Path:
        """Write `<out>/<name>` with save_pretrained; what was there stays whole until the new folder is complete."""
        with new_folder(self.folder / name) as folder, _shown(self.folder / name):
            _save_pretrained(folder, model, tokenizer)
            metrics = self.folder / "metrics.jsonl"
            write_card(folder, self._info, read_lines(metrics) if metrics.exists() else [], name)
        return self.folder / name

    def save_checkpoint(self, step: int, models: dict[str, tuple[Any, Any]], state: dict[str, Any]) -> Path:
        """Write `<out>/checkpoints/step-<step>`: a folder for each (model, tokenizer), and the state.

        state: tensors, numbers, strings, lists and dicts only (optimizer.state_dict(), rng_state() …).
        Then older checkpoints go, down to the config's `save_total_limit` (2 where it has none; None keeps all).
        """
        target = self.folder / "checkpoints" / f"step-{step:06d}"
        with new_folder(target) as folder, _shown(target):
            for name, (model, tokenizer) in models.items():
                _save_pretrained(folder / name, model, tokenizer)
            write_state(folder, {"step": step, "seconds": self._seconds(), "state": state})
        limit = self.config.get("save_total_limit", 2)
        if limit is not None:
            for old in self._checkpoints()[: -max(limit, 1)]:
                shutil.rmtree(old)
        return target

    def load_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint that can be read, its tensors on the CPU; None where there is none.

        One that cannot be read is named on stderr and passed over for the one before it. Raises UserError where none of
        several can be: starting over would delete what may yet be saved. Nothing is changed until `go_on`.
        """
        folders = self._checkpoints()
        for folder in reversed(folders):
            try:
                saved = read_state(folder)
                return Checkpoint(saved["step"], folder, saved["seconds"], saved["state"])
            except Unreadable as error:
                self.say(f"{folder} cannot be read, going back to the checkpoint before it: {error}")
        if folders:
            raise UserError(f"{self.folder}: no checkpoint can be read; nothing was changed, --overwrite starts over")
        return None

    def go_on(self, checkpoint: Checkpoint | None) -> None:
        """Continue after this checkpoint, or from the start: forgets the steps that will be run again."""
        if checkpoint is not None:
            self._start = time.monotonic() - checkpoint.seconds
        step = checkpoint.step if checkpoint else None
        for folder in self._checkpoints():
            if step is None or _step(folder) > step:
                aside = folder.with_name(f"unreadable-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(folder, aside)
        self._drop_after(step)
        write_json(self.folder / "run.json", self._info)

    def finish(self, summary: dict[str, Any]) -> Path:
        """Mark run.json as finished, with the run's seconds and its summary; returns the run folder."""
        self._info |= {"seconds": self._seconds(), "finished": True, "summary": summary}
        write_json(self.folder / "run.json", self._info)
        if self._writer:
            self._writer.close()
        return self.folder

    def _seconds(self) -> float:
        return round(time.monotonic() - self._start, 3)

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"), key=_step)

    def _last_step(self) -> int | None:
        return max(map(_step, self._checkpoints()), default=None)

    def _drop_after(self, step: int | None) -> None:
        """Forget the lines of steps that will be run again; without a step, all of them."""
        for name in ("metrics.jsonl", "rollouts.jsonl", "samples.jsonl", "labels.jsonl"):
            path = self.folder / name
            if path.exists():
                kept = [line for line in read_lines(path) if step is not None and line["step"] <= step]
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


class ProgressLines:
    """tqdm's update(), set_postfix() and close() as plain lines for a log file, about ten in all."""

    def __init__(self, total: int, description: str, initial: int = 0) -> None:
        self.total, self.description, self.n = total, description, initial
        self._postfix = ""
        self._printed = self._tenths()
        self._start = time.monotonic()

    def _tenths(self) -> int:
        return 10 * self.n // max(self.total, 1)

    def update(self, n: int = 1) -> None:
        self.n += n
        if self._tenths() > self._printed:
            self._printed = self._tenths()
            seconds, percent = time.monotonic() - self._start, 100 * self.n // max(self.total, 1)
            line = f"{self.description}: {self.n}/{self.total} ({percent} %), {seconds:.0f} s{self._postfix}"
            print(line, file=sys.stderr, flush=True)

    def set_postfix(self, values: dict[str, Any] | None = None, **named: Any) -> None:
        pairs = {**(values or {}), **named}.items()
        self._postfix = "".join(f", {k} {v:.3g}" if isinstance(v, float) else f", {k} {v}" for k, v in pairs)

    def close(self) -> None:
        """Nothing to close; here so that a bar and its lines are used alike."""

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resolve_model(path: str, name: str = "model") -> str:
    """The folder or hub name that from_pretrained takes, from a run folder, a model folder or a hub name.

    name: which model of a run folder or checkpoint is meant ("model", "value"). Raises FileNotFoundError for a local
    path that does not exist, UserError for a folder without a model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        for candidate in (folder / name, folder):
            if any((candidate / file).exists() for file in ("config.json", "adapter_config.json")):
                return str(candidate)
        if (folder / "run.json").exists():
            raise UserError(f"{path} is a run folder without {name}/: the run has not finished, or saves no {name}")
        raise UserError(f"{path} is neither a run folder nor a model folder: it has no config.json")
    # "org/name" may be a hub name, unless org/ is a folder here: then runs/sft is a typing error, not a download.
    parts = Path(path).parts
    if path.startswith((".", "/", "~")) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir()):
        raise FileNotFoundError(f"there is no folder {path}")
    return path


def resolve_device(device: str) -> torch.device:
    """The torch device of a `--device`; "auto" is a GPU where there is one. Raises UserError for one not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu, cuda or cuda:<index>, got {device!r}") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device} is not there: this machine shows {torch.cuda.device_count()} CUDA devices")
    return resolved


def seed_everything(seed: int) -> None:
    """Seeds random, numpy and torch (all devices)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of random, numpy and torch's generators, of types that a checkpoint holds."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = dict(numpy.random.get_state(legacy=False))
    state["state"] = {"key": torch.from_numpy(state["state"]["key"].astype("int64")), "pos": state["state"]["pos"]}
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned; GPU generators only as far as this machine has them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    key, position = state["numpy"]["state"]["key"], state["numpy"]["state"]["pos"]
    numpy.random.set_state({**state["numpy"], "state": {"key": key.numpy().astype("uint32"), "pos": position}})
    torch.set_rng_state(state["torch"])
    for index, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, index)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _number(name: str, value: Any) -> float | None:
    if isinstance(value, torch.Tensor | numpy.generic):
        value = value.item()
    if not isinstance(value, int | float):
        raise TypeError(f"log: {name} must be a number or a one-element tensor, got {type(value).__name__}")
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _shown(target: Path) -> Iterator[None]:
    """A full disk is an OSError here, also where safetensors finds it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{target} could not be written, what was there before is as it was: {error}") from error


def _save_pretrained(folder: Path, model: Any, tokenizer: Any) -> None:
    if tokenizer is not None:
        model.config.renderer_hash = renderer_hash(tokenizer)  # what later stages must render messages with
        tokenizer.save_pretrained(folder)
    if has_adapter(model):
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)


def _summary_writer(folder: Path, resumed_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=None if resumed_step is None else resumed_step + 1)
