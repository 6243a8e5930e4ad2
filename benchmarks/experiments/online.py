"""With few labels, does gold reward collapse while proxy reward climbs, and do labels of new samples prevent it?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import plots
from .dense import PPO
from .experiment import Arm, Experiment, Task
from .statistics import Interval, by_seed, curve, difference

RANKINGS = 80  # of four responses each, that the reward model begins with
REFRESHES, PROMPTS, RESPONSES = 5, 32, 2  # as many rated responses again, while the policy moves
STEPS = 60


def arms(task: Task) -> list[Arm]:
    settings = PPO | {"steps": STEPS, "kl_coef": 0.01, "eval_every": 5, "reward_shaping": "terminal"}
    refresh = {
        "refresh_every": STEPS // (REFRESHES + 1),
        "label_prompts": PROMPTS,
        "label_responses": RESPONSES,
        "rm_epochs": 4,
        "rm_data": "{rankings}",
        "rm_mix": 2.0,
    }
    more = RANKINGS + REFRESHES * PROMPTS * RESPONSES // 4
    return [
        Arm("offline", "ppo", settings, rankings=RANKINGS),
        Arm("refreshed", "online", settings | refresh, rankings=RANKINGS),
        Arm("offline, as many labels", "ppo", settings, rankings=more),
    ]


def report(records: list[dict[str, Any]]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    for task in dict.fromkeys(record["task"] for record in records):
        found = [record for record in records if record["task"] == task]
        names = list(dict.fromkeys(record["arm"] for record in found))
        figures = {
            f"online-{task}-{name}": plots.curves({arm: curve(found, arm, f"eval/{name}") for arm in names}, label)
            for name, label in (
                ("gold", "gold reward, held-out prompts"),
                ("proxy", "proxy reward, the same responses"),
            )
        }
        yield f"Offline and online feedback, {task}", finding(found, names), figures


def finding(records: list[dict[str, Any]], names: list[str]) -> str:
    sentences = []
    for name in names:
        points = curve(records, name, "eval/gold")
        if not points:
            continue
        step, peak = max(points, key=lambda point: point[1].mean)
        last = points[-1][0]
        fall = difference(at(records, name, last), at(records, name, step)) if step != last else None
        said = f"falls by {-fall.mean:.3f} ± {fall.half:.3f}" if fall and fall.mean < 0 else "does not fall"
        shown = " (these seeds do not show that it is more than noise)" if fall and not fall.excludes_zero else ""
        sentences.append(f"{name}: gold peaks at {peak.mean:.3f} in step {step} and {said} by step {last}{shown}.")
    for other, gain in gains(records, names).items():
        shown = "" if gain.excludes_zero else ", which these seeds cannot tell from none"
        sentences.append(f"At the end refreshing has {gain} of gold over {other}{shown}.")
    return "\n\n".join(sentences)


def gains(records: list[dict[str, Any]], names: list[str]) -> dict[str, Interval]:
    """Gold at the end, refreshed − each other arm, paired by seed."""
    finals = {name: by_seed(records, name, lambda record: record["final"]["gold"]) for name in names}
    found = {name: difference(finals.get("refreshed", {}), finals[name]) for name in names if name != "refreshed"}
    return {name: gain for name, gain in found.items() if gain}


def answer(records: list[dict[str, Any]]) -> str:
    """Gold at the start of training and at its end, in each arm, and what refreshing gains."""
    said = []
    names = list(dict.fromkeys(record["arm"] for record in records))
    for name in names:
        points = curve(records, name, "eval/gold")
        if points:
            (_, first), (_, last) = points[0], points[-1]
            said.append(f"{name} {first.mean:.2f} → {last.mean:.2f}")
    said += [f"refreshed − {name} {gain}" for name, gain in gains(records, names).items()]
    return f"Gold from start to end: {'; '.join(said)}."


def at(records: list[dict[str, Any]], name: str, step: int) -> dict[int, float]:
    """seed → gold of an evaluation."""
    return by_seed(records, name, lambda record: dict(map(tuple, record["series"]["eval/gold"]))[step])


EXPERIMENT = Experiment("online", str(__doc__), ("reviews",), arms, report, answer)
