"""The end-to-end comparison as JSON, as a plot and as the README's part between its markers."""

import io
import statistics
from typing import Any

from . import plots, report

RESULTS = report.FOLDER / "end-to-end.json"
PLOT = RESULTS.with_suffix(".svg")
BEGIN, END = "<!-- end-to-end:begin -->", "<!-- end-to-end:end -->"
PHASES = ("generate", "score", "logprobs and values", "train", "other")
INK = {"ours": "#1a56b0", "TRL": "#b04a1a"}
NO_RESULTS = "Not measured yet."
TARGETS = {"speed": 1.7, "memory": 0.7}


def write(results: dict[str, Any]) -> None:
    report.write(RESULTS, results)


def seconds(side: dict[str, Any], phase: str) -> float:
    """Median over the iterations of all runs but each run's first, which warms up."""
    return statistics.median(time_of(row["seconds"], phase) for run in side["runs"] for row in run["iterations"][1:])


def time_of(found: dict[str, float], phase: str) -> float:
    if phase == "other":
        return found["total"] - sum(found[each] for each in PHASES[:-1])
    return found[phase]


def peak(side: dict[str, Any]) -> float:
    return max(run["peak_rss_mib"] for run in side["runs"])


def heldout(side: dict[str, Any], name: str) -> tuple[float, float]:
    """Mean and standard error over the runs' held-out responses."""
    found = [run["heldout"][name] for run in side["runs"]]
    return statistics.mean(each["mean"] for each in found), sum(each["sem"] ** 2 for each in found) ** 0.5 / len(found)


def text(results: dict[str, Any]) -> str:
    """Markdown: what was run, a table of both sides, the targets."""
    ours, trl = results["sides"]["ours"], results["sides"]["TRL"]
    settings, machine = results["settings"], results["machine"]
    batch = settings["batch_size"]
    speed = seconds(trl, "total") / seconds(ours, "total")
    memory = peak(ours) / peak(trl)
    rows = [("episodes a second", *(f"{batch / seconds(side, 'total'):.1f}" for side in (ours, trl)), f"{speed:.2f} ×")]
    for phase in ("total", *PHASES):
        name = "an iteration, s" if phase == "total" else f"– {phase}"
        first, second = seconds(ours, phase), seconds(trl, phase)
        rows.append((name, f"{first:.2f}", f"{second:.2f}", f"{first / second:.2f} ×"))
    rows.append(("peak memory, MiB", f"{peak(ours):.0f}", f"{peak(trl):.0f}", f"{memory:.2f} ×"))
    for name, title in (("score", "held-out score"), ("kl", "held-out KL, nats")):
        pairs = [heldout(side, name) for side in (ours, trl)]
        rows.append((title, *(f"{mean:.2f} ± {sem:.2f}" for mean, sem in pairs), ""))
    better = heldout(ours, "score")[0] >= heldout(trl, "score")[0]
    targets = [
        (f"≥ {TARGETS['speed']} × the episodes a second", f"{speed:.2f} ×", speed >= TARGETS["speed"]),
        (f"≤ {TARGETS['memory']} × the memory", f"{memory:.2f} ×", memory <= TARGETS["memory"]),
        ("held-out score equal or better", f"{heldout(ours, 'score')[0] - heldout(trl, 'score')[0]:+.2f}", better),
    ]
    used = [f"{name} {version}" for name, version in trl["versions"].items() if name != "torch"]
    return "\n".join(
        [
            f"A GPT-2 of 4 layers, width 256 and 4096 words; batch {batch}, responses of {settings['response_length']} "
            f"tokens, {settings['num_ppo_epochs']} epochs of one minibatch, {settings['iterations']} iterations, "
            f"{len(ours['runs'])} seeds; the same start, reward model, prompts and settings, fp32. {machine['cpu']} "
            f"({machine['instructions']}), {settings['threads']} threads, torch {machine['torch']}, "
            f"commit {machine['commit']}, {machine['date'][:10]}; {', '.join(used)} for TRL, transformers "
            f"{ours['versions'].get('transformers')} for ours.",
            "",
            "| | ours | TRL | ours / TRL |",
            "|---|--:|--:|--:|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            "| target | measured | met |",
            "|---|--:|---|",
            *(f"| {name} | {found} | {'yes' if met else 'no'} |" for name, found, met in targets),
        ]
    )


def plot(results: dict[str, Any]) -> str:
    """SVG, the same bytes for the same results: score of each iteration's responses, and seconds by phase."""
    import matplotlib  # here, since the README's check runs without it
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "rlhf_kernels", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(7.2, 2.7), layout="constrained")
        curve, bars = figure.subplots(1, 2)
        for side, found in results["sides"].items():
            for number, run in enumerate(found["runs"]):
                scores = [row["score"] for row in run["iterations"]]
                label = side if number == 0 else None
                curve.plot(range(1, len(scores) + 1), scores, color=INK[side], label=label, linewidth=1.4, alpha=0.8)
        curve.set(xlabel="iteration", title="score of the sampled responses")
        names = list(results["sides"])
        left = [0.0] * len(names)
        for number, phase in enumerate(PHASES):
            times = [seconds(results["sides"][name], phase) for name in names]
            bars.barh(names, times, left=left, label=phase, color=matplotlib.colormaps["tab10"](number), height=0.55)
            left = [a + b for a, b in zip(left, times)]
        bars.set(xlabel="seconds an iteration", title="time by phase")
        bars.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        curve.legend(frameon=False)
        for axes in (curve, bars):
            axes.spines[["top", "right"]].set_visible(False)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": digest(results)})
    return svg.getvalue()


def rendered() -> str:
    """What should stand between the markers."""
    if not RESULTS.exists():
        return f"\n{NO_RESULTS}\n"
    image = f"![Score and time, ours beside TRL](benchmarks/results/{PLOT.name})"
    return f"\n{text(report.read(RESULTS))}\n\n{image}\n"


def update() -> None:
    """README.md and the plot from the results."""
    before, _, after = report.split_readme(BEGIN, END)
    if RESULTS.exists():
        PLOT.write_text(plot(report.read(RESULTS)))
    report.replace(report.README, f"{before}{BEGIN}{rendered()}{END}{after}")


def out_of_step() -> list[str]:
    """Which files do not show the results in the folder."""
    wrong = [] if report.split_readme(BEGIN, END)[1] == rendered() else [report.README.name]
    if not RESULTS.exists():
        return wrong
    drawn = PLOT.exists() and digest(report.read(RESULTS)) in PLOT.read_text()
    return wrong if drawn else [*wrong, PLOT.name]


def digest(results: dict[str, Any]) -> str:
    """It stands in the plot, so that one of other results can be told without drawing it."""
    return plots.digest([results])
