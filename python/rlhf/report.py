"""One self-contained report.html from run folders: no network, no script; the PNG of each figure lies beside it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from .config import option
from .page import Page, document, escape


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    runs: tuple[str, ...] = option(MISSING, "run folders, or folders of run folders; seeds of one setting are averaged")
    out: str = option(MISSING, "folder to write report.html and the figures' PNG files to")
    title: str = option("RLHF report", "heading of the page")
    overwrite: bool = option(False, "replace the report.html that is in --out")


def main(config: ReportConfig) -> Path:
    """Write report.html and its PNG files; returns the path of report.html.

    Raises UserError or FileNotFoundError for a folder without runs, FileExistsError where a report is there already.
    """
    import matplotlib

    # Here, not above: `rlhf report --help` does not wait for torch.
    from . import plots, report_figures, report_tables
    from .files import write_atomically
    from .report_runs import grouped, read_runs

    target = Path(config.out) / "report.html"
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"{target} is there; --overwrite replaces it")
    runs = read_runs(config.runs)
    page = Page()
    page.add(f"<p>{len(runs)} runs: {escape(', '.join(run.name for run in runs))}</p>")
    groups = grouped(runs)
    with matplotlib.rc_context(plots.STYLE):
        for section in (
            report_tables.headline,
            report_figures.training_curves,
            report_figures.over_optimisation,
            report_figures.reward_model,
            report_figures.losses,
            report_figures.diagnostics,
            report_figures.clipping,
            report_figures.distributions,
            report_tables.credit,
            report_tables.responses,
            report_figures.phase_timings,
            report_tables.configurations,
        ):
            section(page, groups)
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, png in page.pngs.items():
        write_atomically(target.parent / name, png)
    write_atomically(target, document(config.title, page.parts))
    return target
