"""The report's tables and texts: methods, credit of each token, responses, configurations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .page import Page, duration, escape, number, percent, with_error
from .report_runs import Group, RunData

SHOWN_PROMPTS = 4
CREDIT_SCALE = '<p class="scale">takes score away <span></span> adds to the score</p>'


def headline(page: Page, groups: Sequence[Group]) -> None:
    evaluated = [group for group in groups if all(run.evaluation for run in group.runs)]
    page.section("Methods")
    if not evaluated:
        return page.missing("None of these runs has an evaluation.json yet; rlhf evaluate makes one.")
    baseline = sft_baseline(evaluated)
    if baseline and (best := best_gain(evaluated, baseline)):
        group, gain, errors = best
        page.add(
            f"<p>Highest gold reward: <strong>{escape(group.name)}</strong>, {gain:+.3f} over {escape(baseline.name)} "
            f"({errors:.1f} standard errors).</p>"
        )
    rows = [headline_row(group, baseline) for group in evaluated]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    page.add('<div class="scroll"><table class="numbers"><thead><tr>')
    page.add(*(f"<th>{escape(name)}</th>" for name in columns), "</tr></thead><tbody>")
    for group, row in zip(evaluated, rows):
        cells = "".join(f"<td>{escape(row[name]) or '–'}</td>" for name in columns[1:])
        page.add(f"<tr><th>{chip(group)}</th>{cells}</tr>")
    page.add("</tbody></table></div>")
    counts = sorted({run.evaluation.get("n", 0) for group in evaluated for run in group.runs})
    seeds = any(len(group.runs) > 1 for group in evaluated)
    over = "Of several seeds: means over the seeds ± standard error between them. " if seeds else ""
    page.add(
        f'<p class="small">Means over {" or ".join(map(str, counts))} held-out prompts ± standard error. {over}'
        "Proxy reward: the reward model that training used. Gold reward: a judge that training never saw. "
        "Gain: difference of the gold rewards over √(s.e.² + s.e.²). KL: to the start model, summed over a "
        "response.</p>"
    )


def headline_row(group: Group, baseline: Group | None) -> dict[str, str]:
    seconds = [run.info["seconds"] for run in group.runs if run.info.get("seconds") is not None]
    against = group.runs[0].evaluation.get("against", {}) if len(group.runs) == 1 else {}
    wins = against.get("gold") or against.get("proxy")

    def plain(name: str) -> float | None:
        measured = group.measured(name)
        return None if measured is None else measured["mean"]

    return {
        "Run": group.name,
        "Seeds": str(len(group.runs)) if len(group.runs) > 1 else "",
        "Proxy reward": with_error(group.measured("proxy")),
        "Gold reward": with_error(group.measured("gold")),
        "Gain over SFT": gain_text(group, baseline),
        "KL (nats)": with_error(group.measured("kl"), 2),
        "Length (tokens)": number(plain("length"), 1),
        "Ends with EOS": percent(plain("eos_rate")),
        "distinct-2": number(plain("distinct_2"), 3),
        "Wins": f"{percent(wins['mean'])} over {against['run']}" if wins else "",
        "Wall time": duration(sum(seconds) / len(seconds)) if len(seconds) == len(group.runs) else "unfinished",
    }


def sft_baseline(groups: Sequence[Group]) -> Group | None:
    return next((group for group in groups if group.stage == "sft"), None)


def gain_over(group: Group, baseline: Group) -> tuple[float, float] | None:
    """(difference of the gold rewards, the same in standard errors); None where one of them has no gold reward."""
    ours, theirs = group.measured("gold"), baseline.measured("gold")
    if not ours or not theirs:
        return None
    difference, error = ours["mean"] - theirs["mean"], math.hypot(ours["sem"], theirs["sem"])
    return difference, difference / error if error else math.copysign(math.inf, difference)


def gain_text(group: Group, baseline: Group | None) -> str:
    if group is baseline:
        return "baseline"
    gain = gain_over(group, baseline) if baseline else None
    return f"{gain[0]:+.3f} ({gain[1]:.1f} s.e.)" if gain else ""


def best_gain(groups: Sequence[Group], baseline: Group) -> tuple[Group, float, float] | None:
    gains = [(group, *gain) for group in groups if group is not baseline and (gain := gain_over(group, baseline))]
    return max(gains, key=lambda item: item[1], default=None)


def credit(page: Page, groups: Sequence[Group]) -> None:
    """Heat maps of what the runs gave, and of what other ways to spread the score would have given."""
    page.section(
        "Credit of each token",
        "How the score of a response was spread over its tokens. Colours are relative to the largest credit of the "
        "response, which stands above it; hover over a token for its numbers.",
    )
    records = {
        group.name: {record["prompt"]: record for record in group.runs[0].samples if record.get("credit")}
        for group in groups
    }
    prompts = shared_first([list(found) for found in records.values()])[:SHOWN_PROMPTS]
    if not prompts:
        return page.missing("No run wrote samples with credit (samples.jsonl).")
    page.add(CREDIT_SCALE)
    for prompt in prompts:
        page.add(f'<h3>“{escape(prompt)} …”</h3><div class="grid cards">')
        for group in groups:
            if record := records[group.name].get(prompt):
                gold = number(record.get("gold"), 2) or "–"
                heading = f"{chip(group)} score {number(record.get('score'), 2)}, gold {gold}"
                page.add(credit_card(record, record["credit"], f"{heading}, step {record['step']}"))
        page.add("</div>")
    shapings(page, groups)


def shapings(page: Page, groups: Sequence[Group]) -> None:
    """The same responses under every shaping, of the first run that worked them out."""
    for group in groups:
        compared = [record for record in group.runs[0].samples if record.get("credit_by_shaping")]
        if compared:
            page.add(f"<h3>The same responses under other shapings of the reward ({chip(group)})</h3>")
            for record in compared[: SHOWN_PROMPTS // 2]:
                page.add(f"<p>“{escape(record['prompt'])} …”, score {number(record.get('score'), 2)}</p>")
                page.add('<div class="grid cards">')
                for shaping, values in record["credit_by_shaping"].items():
                    page.add(credit_card(record | {"rewards": None}, values, f"<strong>{escape(shaping)}</strong>"))
                page.add("</div>")
            return


def credit_card(record: dict[str, Any], values: list[float], heading: str) -> str:
    """A response coloured by these credits; heading: HTML."""
    largest = max(map(abs, values))
    rewards = record.get("rewards") or [None] * len(values)
    tokens = "".join(token_span(*row, largest) for row in zip(record["tokens"], values, rewards))
    return (
        f'<article><p class="small">{heading}, largest credit {number(largest, 3)}</p>'
        f'<p class="tokens">{tokens}</p></article>'
    )


def token_span(token: str, value: float, reward: float | None, largest: float) -> str:
    """A token on its credit's colour: vermilion with a dotted line below zero, bluish green above."""
    strength = min(abs(value) / largest, 1.0) if largest else 0.0
    red_green_blue = "213,94,0" if value < 0 else "0,158,115"
    minus = ' class="minus"' if value < 0 and strength > 0.02 else ""
    tooltip = f"credit {value:+.4f}" + (f", reward {reward:+.4f}" if reward is not None else "")
    word = token.lstrip(" ") or token
    style = f"background:rgba({red_green_blue},{0.85 * strength:.2f})"
    text = escape(word.replace("\n", "↵\n"))
    return f'{token.removesuffix(word)}<span{minus} style="{style}" title="{tooltip}">{text}</span>'


def responses(page: Page, groups: Sequence[Group]) -> None:
    page.section("Responses", "The first held-out prompts, not chosen by hand, each answered by every method.")
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for group in groups:
        for sample in group.runs[0].evaluation.get("samples", ()):
            answers.setdefault(group.name, {}).setdefault(sample["prompt"], sample)
    prompts = shared_first([list(samples) for samples in answers.values()])[:SHOWN_PROMPTS]
    if not prompts:
        return page.missing("No evaluation.json with samples among these runs.")
    for prompt in prompts:
        page.add(f'<h3>“{escape(prompt)} …”</h3><div class="scroll"><table class="texts responses"><thead><tr>')
        page.add("<th>Run</th><th>Response</th><th>Proxy</th><th>Gold</th></tr></thead><tbody>")
        for group in groups:
            if sample := answers.get(group.name, {}).get(prompt):
                judged = "".join(f"<td>{number(sample.get(judge), 2) or '–'}</td>" for judge in ("proxy", "gold"))
                page.add(f"<tr><th>{chip(group)}</th><td>{escape(sample['response'])}</td>{judged}</tr>")
        page.add("</tbody></table></div>")


def shared_first(lists: list[list[str]]) -> list[str]:
    """All different items, those that more lists have first, else in order of appearance."""
    items = list(dict.fromkeys(item for items in lists for item in items))
    return sorted(items, key=lambda item: -sum(item in items for items in lists))


def configurations(page: Page, groups: Sequence[Group]) -> None:
    page.section("Configuration")
    for group in groups:
        for run in group.runs:
            page.add(configuration_details(group, run))


def configuration_details(group: Group, run: RunData) -> str:
    facts = {
        "stage": run.stage,
        "started": run.info.get("started"),
        "seconds": run.info.get("seconds"),
        **run.info["config"],
        **{f"version of {name}": version for name, version in run.info.get("versions", {}).items()},
    }
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    state = "" if run.info.get("finished") else ", unfinished"
    return (
        f"<details><summary>{chip(group, run.name)} ({escape(run.stage)}{state})</summary>"
        f'<div class="scroll"><table class="texts">{rows}</table></div></details>'
    )


def chip(group: Group, name: str | None = None) -> str:
    """The group's name, or that of one of its runs, behind its colour."""
    from .plots import COLORS

    return f'<span class="chip" style="--color:{COLORS[group.style % len(COLORS)]}">{escape(name or group.name)}</span>'
