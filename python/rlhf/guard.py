"""What every stage's loop has in common: steps that may fail, checkpoints, and an orderly end.

with Guard(run, config, total, models=…, parts=…, constants=…, checkpoint=run.load_checkpoint()) as guard:
    for step in guard.steps("sft"):
        metrics = {"lr": …}
        with guard.attempt(batch=batch):  # a number that is not finite ends this block, not the run
            metrics |= train_step(…)
        guard.log(metrics, "loss")
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from .checkpoint import write_state
from .config import CommonConfig, UserError
from .data import decode
from .files import new_folder
from .fingerprint import fingerprint
from .run import Checkpoint, Run, rng_state, set_rng_state

MAX_WRITTEN = 20
"""Skipped steps whose batch is written aside; the ones after them are only counted."""


class NonFinite(UserError):
    """A loss, a reward or a gradient that is NaN or infinite, found before it changed any weights."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the step was finished and its checkpoint written."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class Stateful(Protocol):
    """What a checkpoint carries besides models: optimisers, controllers, normalisers.

    A state that was given out must not change with the next step, except an optimiser's.
    """

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Values(dict[str, Any]):
    """Named values of a stage that a checkpoint carries."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clear()
        self.update(state_dict)


def check_finite(**values: float | torch.Tensor) -> None:
    """Raises NonFinite naming the first value that is NaN or infinite (anywhere in it, if it is a tensor)."""
    for name, value in values.items():
        flat = torch.as_tensor(value).flatten()
        bad = flat[~flat.isfinite()]
        if len(bad):
            raise NonFinite(f"the {name.replace('_', ' ')} is {bad[0].item()}")


class Guard:
    """The steps `checkpoint.step + 1 … total` of a run.

    Args:
        total: steps in all; a stage that learns it as it goes sets `guard.total` anew.
        models: name → (model, tokenizer), saved in each checkpoint; loaded from `checkpoint.folder` where there is one.
        parts: what else the run changes; loaded from the checkpoint here, as the random generators are.
        constants: name → a model, tokenizer or data that the run needs to be the same as before. Raises UserError where
            a hash differs from the checkpoint's.
        checkpoint: where the run goes on; None starts it.
    """

    def __init__(
        self,
        run: Run,
        config: CommonConfig,
        total: int,
        *,
        models: dict[str, tuple[Any, Any]],
        parts: dict[str, Stateful],
        constants: dict[str, Any],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.run, self.config, self.total = run, config, total
        self.models, self.parts, self.constants = models, parts, constants
        self.step = checkpoint.step if checkpoint else 0
        self.skipped = self.streak = 0
        self._saved = self.step
        self._due = self._changed = False
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        if checkpoint:
            self._refuse_changes(checkpoint)
            self._restore(checkpoint.state)
        run.go_on(checkpoint)
        for part in parts.values():
            if isinstance(part, torch.optim.Optimizer):
                self.track(part)

    def track(self, optimizer: torch.optim.Optimizer) -> None:
        """Know when this optimiser changes weights; those of `parts` are known by themselves."""
        optimizer.register_step_post_hook(self._weights_changed)

    # The loop

    def steps(self, description: str) -> Iterator[int]:
        """The numbers of the steps, from 1, with a progress bar; checkpoints are written between them."""
        with self.run.progress(self.total, description, initial=self.step) as self._progress:
            while self.step < self.total:
                self._before, self._changed = self._state(), False
                yield self.step + 1
                self.step += 1
                every = self.config.save_steps
                self._due = self._due or bool(every and self.step % every == 0)
                # While steps fail the weights are in doubt: the last good checkpoint must not be rotated away.
                if self._due and self.step < self.total and not self.streak:
                    self._save(self._state())
                self._end_if_asked()

    @contextmanager
    def attempt(self, **seen: Any) -> Iterator[dict[str, Any]]:
        """A block that a NonFinite leaves: the step is counted and `seen`, to which the block may add, written aside.

        seen: batches and other dataclasses, tensors, strings, numbers. Raises UserError where too many steps in a row
        are skipped.
        """
        try:
            yield seen
        except NonFinite as error:
            self.skipped += 1
            self.streak += 1
            self._write_aside(error, seen)
            if self.streak >= self.config.max_bad_steps:
                raise UserError(
                    f"{self.streak} steps in a row were skipped, the last one because {error}; what they were given is "
                    f"in {self.run.folder / 'skipped'}, and the last checkpoint is as it was (--max-bad-steps)"
                ) from error
        else:
            self.streak = 0

    def log(self, metrics: dict[str, Any], *shown: str) -> None:
        """Log the step that is under way; `shown` are the metrics that the progress bar names."""
        self.run.log(self.step + 1, metrics | {"skipped_steps": self.skipped})
        self._progress.total = self.total
        self._progress.set_postfix({name.rpartition("/")[2]: metrics[name] for name in shown if name in metrics})
        self._progress.update(1)

    def __enter__(self) -> Guard:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                    self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is None:
            self._end_if_asked()
        # A step that failed before it changed any weights has lost nothing yet: what stood before it is saved.
        elif isinstance(error, Exception) and not self._changed and not self.streak and self.step > self._saved:
            try:
                self._save(self._before)
                self.run.say(f"step {self.step + 1} failed; --resume continues from the end of step {self.step}")
            except Exception as second:
                self.run.say(f"step {self.step + 1} failed, and no checkpoint could be written: {second}")

    # Signals

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        # Not print(): the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step, with a checkpoint; a second Ctrl-C stops at once\n")

    def _end_if_asked(self) -> None:
        if self._signal is not None:
            if self.step > self._saved and not self.streak:
                self._save(self._state())
            raise Interrupted(self._signal)

    # State

    def _state(self) -> dict[str, Any]:
        return {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "rng": rng_state(),
            "skipped": self.skipped,
        }

    def _save(self, state: dict[str, Any]) -> None:
        self.run.save_checkpoint(self.step, self.models, {**state, "constants": self._fingerprints})
        self._saved, self._due = self.step, False

    def _restore(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.skipped = state["skipped"]
        set_rng_state(state["rng"])

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """Worked out when first needed: a run without checkpoints need not read its models once more."""
        return {name: fingerprint(thing) for name, thing in self.constants.items()}

    def _refuse_changes(self, checkpoint: Checkpoint) -> None:
        then, now = checkpoint.state["constants"], self._fingerprints
        changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
        if changed:
            hashes = (f"{name} {then.get(name, 'none'):.10}, now {now.get(name, 'none'):.10}" for name in changed)
            raise UserError(
                f"{checkpoint.folder} cannot be continued: its {' and '.join(changed)} had other content then (hash: "
                f"{'; '.join(hashes)}). Give the run what it began with, or start a new one from this folder"
            )

    def _weights_changed(self, *_: Any) -> None:
        self._changed = True

    # Inspection

    def _write_aside(self, error: NonFinite, seen: dict[str, Any]) -> None:
        step = self.step + 1
        where = "not written aside: there are enough"
        if self.skipped <= MAX_WRITTEN:
            tokenizer = next((tokenizer for _, tokenizer in self.models.values() if tokenizer is not None), None)
            target = self.run.folder / "skipped" / f"step-{step:06d}"
            given = {name: _as_state(value, tokenizer) for name, value in seen.items()}
            with new_folder(target) as folder:
                write_state(folder, {"step": step, "why": str(error), **given})
            where = f"in {target}"
        self.run.say(f"step {step} is skipped, because {error}; what it was given is {where}")


def _as_state(value: Any, tokenizer: Any) -> Any:
    """Dataclasses as dicts of their fields, a batch with its texts; no two tensors share their memory."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return [_as_state(item, tokenizer) for item in value]
    if not is_dataclass(value):
        return value
    state = {field.name: _as_state(getattr(value, field.name), tokenizer) for field in fields(value)}
    if tokenizer is not None and {"tokens", "attention_mask"} <= state.keys():
        rows = zip(state["tokens"], state["attention_mask"])
        state["texts"] = [decode(tokenizer, tokens[mask.bool()].tolist()) for tokens, mask in rows]
    return state
