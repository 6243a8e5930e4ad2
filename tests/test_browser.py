"""The report in a real browser: headless Chromium shows it without a complaint on its console."""

import random
import re
import shutil
import subprocess

import pytest

from test_report import PROMPTS, build, credit_samples, evaluation, ppo_metrics, rollouts, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def browse(page, tmp_path, *flags):
    """(the document as the browser has it, what it said on its console)."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", *flags]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120)
    return done.stdout, re.findall(r"CONSOLE\S* (.*)", done.stderr)


def test_the_report_opens_without_a_complaint(tmp_path):
    rng = random.Random(0)
    attack = "<script>document.title = 'attacked'</script><img src=x onerror=\"document.title = 'attacked'\">"
    samples = credit_samples("abc", rng)
    samples[0] |= {"tokens": [attack, *samples[0]["tokens"][1:]]}
    run = write_run(
        tmp_path / "runs",
        "ppo-abc",
        "ppo",
        metrics=ppo_metrics(3.0, 0.6, rng),
        samples=samples,
        rollouts=rollouts(rng),
        evaluation=evaluation(0.5, 2.0, 9.0, rng),
    )
    text = build(tmp_path, run)
    picture = tmp_path / "report.png"
    dom, console = browse(tmp_path / "report" / "report.html", tmp_path, "--dump-dom")
    assert console == []
    assert "<title>RLHF report</title>" in dom and "&lt;script&gt;" in dom and PROMPTS[0] in dom
    assert dom.count("<svg") == text.count("<svg") > 10
    browse(tmp_path / "report" / "report.html", tmp_path, f"--screenshot={picture}", "--window-size=1200,3000")
    assert picture.stat().st_size > 100_000  # an empty page of this size has about 10 kB


def test_a_complaint_would_be_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('broken'); nothing.there</script><title>t</title>")
    _, console = browse(page, tmp_path, "--dump-dom")
    assert len(console) == 2 and "broken" in console[0] and "nothing is not defined" in console[1]
