"""What the CPU kernels should reach, and what a measurement says of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
FASTEST = "the fastest peer"
MACHINE = "set on two cores of a Sapphire Rapids server: reading 32 GB/s, bf16 products 1.08 TFLOP/s"
NOT_MEASURED = "not measured", "–"


@dataclass(frozen=True)
class Target:
    op: str
    case: str
    phase: str
    goal: str
    peer: str | None  # who it is held against
    measured: Callable[[Row, Any], tuple[str, bool]]  # of our row and the peer's: the number, is it enough?
    memory: bool = False  # rather than time


def faster(op: str, case: str, phase: str, least: float, peer: str = FASTEST) -> Target:
    def measured(ours: Row, theirs: Row) -> tuple[str, bool]:
        times = theirs["median_ms"] / ours["median_ms"]
        said = f"{times:.0f} ×" if times >= 100 else f"{times:.1f} ×"
        return said + (f" ({theirs['provider']})" if peer == FASTEST else ""), times >= least

    return Target(op, case, phase, f"≥ {least:g} × as fast as {peer}", peer, measured)


def leaner(op: str, case: str, phase: str, most: float, peer: str) -> Target:
    def measured(ours: Row, theirs: Row) -> tuple[str, bool]:
        share = ours["peak_extra_mib"] / theirs["peak_extra_mib"]
        return f"{share:.2f} ({ours['peak_extra_mib']:.0f} of {theirs['peak_extra_mib']:.0f} MiB)", share <= most

    return Target(op, case, phase, f"≤ {most:g} of the extra memory of {peer}", peer, measured, memory=True)


def near_the_limit(op: str, case: str, phase: str, least: float, what: str) -> Target:
    def measured(ours: Row, _: None) -> tuple[str, bool]:
        return f"{ours['share']:.0%}", ours["share"] >= least

    return Target(op, case, phase, f"≥ {least:.0%} of {what}", None, measured)


def within(op: str, case: str, phase: str, most: float, note: str) -> Target:
    def measured(ours: Row, _: None) -> tuple[str, bool]:
        return f"{ours['median_ms']:.0f} ms, where they take {ours['limit_ms']:.0f} ms", ours["median_ms"] <= most

    return Target(op, case, phase, f"≤ {most:g} ms, {note}", None, measured)


def below(op: str, case: str, phase: str, most: float, what: str) -> Target:
    def measured(ours: Row, _: None) -> tuple[str, bool]:
        return f"{ours['peak_extra_mib']:.2f} MiB", ours["peak_extra_mib"] < most

    return Target(op, case, phase, f"extra memory < {most:g} MiB, {what}", None, measured, memory=True)


LOGITS, LINEAR, ROLLOUT = "N=1024 V=50257", "N=1024 H=1024 V=50257 bf16", "B=512 T=2048 fp32"
ATTENTION, PPO = "B=8 Hq=16 Hkv=4 D=64 T=2048 fp32", "B=16 T=64 V=50257 fp32"

TARGETS = (
    faster("token_logprobs", f"{LOGITS} fp32", "fwd", 2.5, "torch.compile"),
    near_the_limit("token_logprobs", f"{LOGITS} fp32", "fwd", 0.6, "the read bandwidth (a stretch)"),
    faster("token_logprobs", f"{LOGITS} fp32 given buffer", "fwd+bwd", 4, "torch.compile"),
    faster("token_logprobs", f"{LOGITS} bf16", "fwd", 2.2),
    within("linear_ppo_loss", LINEAR, "fwd+bwd", 330, "where the three products take 292 ms"),
    leaner("linear_ppo_loss", LINEAR, "fwd+bwd", 0.25, "torch eager"),
    faster("rollout_advantages", ROLLOUT, "fwd", 40, "loop as in verl"),
    faster("rollout_advantages", ROLLOUT, "fwd", 25, "torchrl vectorised"),
    faster("attention_row", ATTENTION, "fwd", 30, "full T×T map"),
    below("attention_row", ATTENTION, "fwd", 16, "one head's T×T map"),
    faster("fused_ppo_loss", PPO, "fwd+bwd", 4, "torch.compile"),
    faster("fused_ppo_loss", f"{PPO} given buffer", "fwd+bwd", 4, "torch.compile"),
)
CASES = frozenset((target.op, target.case) for target in TARGETS)


def judged(target: Target, found: dict[str, Row]) -> tuple[str, str]:
    """What was measured, and whether that is enough; `found` has the rows of the target's case and pass by provider."""
    ours = next((row for name, row in found.items() if name.startswith("ours")), None)
    peers = [row for name, row in found.items() if not name.startswith("ours") and target.peer in (name, FASTEST)]
    theirs = min(peers, key=lambda row: row["median_ms"], default=None)
    if ours is None or (target.peer and theirs is None):
        return NOT_MEASURED
    if target.memory and None in (row["peak_extra_mib"] for row in (ours, theirs) if row):  # not on this system
        return NOT_MEASURED
    number, enough = target.measured(ours, theirs)
    return number, "yes" if enough else "no"


def table(groups: dict[tuple[str, str, str], dict[str, Row]]) -> str:
    """Markdown, from the timed rows by op, case and pass."""
    lines = ["| op | case | pass | target | measured | met |", "|---|---|---|---|--:|---|"]
    for target in TARGETS:
        key = target.op, target.case, target.phase
        measured, met = judged(target, groups.get(key, {}))
        lines.append(f"| `{key[0]}` | {key[1]} | {key[2]} | {target.goal} | {measured} | {met} |")
    return "\n".join(lines)
