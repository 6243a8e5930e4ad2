"""Questions about RLHF answered by runs: several seeds, confidence intervals, a plot and a paragraph for each.

    python -m benchmarks.experiments dense methods     run what is not in the results yet
    python -m benchmarks.experiments report            plots, tables and findings from the results

An experiment is a list of arms (a stage of `rlhf` and what differs in its configuration) on one or more tasks. All arms
and seeds of a task start from the same supervised model and the same reward model; the seed decides the prompts, the
samples and the order of the data. One line in `results/<experiment>.jsonl` is one finished run.
"""
