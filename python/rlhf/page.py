"""An HTML page that stands alone: no network, no script, light and dark. Text goes in through `escape`."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Page:
    """The report's HTML while it grows, and the PNG files that go beside it."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.pngs: dict[str, bytes] = {}

    def add(self, *parts: str) -> None:
        self.parts += parts

    def section(self, title: str, explanation: str = "") -> None:
        self.add(f"<h2>{escape(title)}</h2>", f"<p>{escape(explanation)}</p>" if explanation else "")

    def missing(self, what: str) -> None:
        self.add(f'<p class="missing">{escape(what)}</p>')

    def figures(self, figures: Iterable[tuple[str, str, Figure]], large: bool = False) -> None:
        """Figures side by side: (file name without ending, caption, figure). large: one that has a row for itself."""
        from .plots import render

        self.add(f'<div class="{"large" if large else "grid"}">')
        for name, caption, figure in figures:
            svg, self.pngs[f"{name}.png"] = render(figure, name, caption)
            self.add(f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>")
        self.add("</div>")


def escape(value: Any) -> str:
    return html.escape("" if value is None else str(value))


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def with_error(value: dict[str, float] | None, digits: int = 3) -> str:
    return "" if value is None else f"{number(value['mean'], digits)} ± {number(value['sem'], digits)}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in text)


def document(title: str, parts: list[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<style>{STYLE}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --page: #fff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117; --card: #151b23; }
}
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .4rem 0; max-width: 62rem; }
h1 + p { color: var(--soft); }
.small, figcaption { color: var(--soft); font-size: .85rem; }
.missing { color: var(--soft); font-style: italic; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); }
.large { max-width: 52rem; }
figure, article { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
svg { width: 100%; height: auto; display: block; }
figcaption { margin-bottom: .35rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; white-space: nowrap; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.numbers td, .texts td { font-variant-numeric: tabular-nums; }
.texts td { overflow-wrap: anywhere; }
.responses { width: 100%; }
.responses td:nth-child(2) { width: 100%; }
.responses td:nth-child(n+3) { text-align: right; white-space: nowrap; }
.chip { white-space: nowrap; font-weight: 600; color: var(--ink); }
.chip::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .4em; border-radius: 50%;
  background: var(--color); }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.tokens span { padding: .12em 0; border-radius: .2em; }
.tokens .minus { text-decoration: underline dotted 1px; text-underline-offset: .3em; }
.scale { color: var(--soft); font-size: .85rem; }
.scale span { display: inline-block; width: 9rem; height: .8rem; margin: 0 .4rem; vertical-align: -.1rem;
  border-radius: .2rem; background: linear-gradient(to right, rgba(213,94,0,.85), transparent, rgba(0,158,115,.85)); }
details { margin: .4rem 0; }
summary { cursor: pointer; }
"""
