"""Microbenchmarks of the ops: `python -m benchmarks --help`.

bench_<stem>.py says what is run (cases, inputs, peers, and the work that cannot be avoided), harness.py checks and
times it with clock.py, machine.py knows the machine. curves.py says over what an op grows, targets.py what it should
reach; report.py writes the tables, plots.py draws, profile.py runs one call for a profiler. gpu.sh does all there is to
do on a GPU.

end_to_end.py compares the pipeline with TRL's PPO on end_to_end_task.py: end_to_end_ours.py and end_to_end_trl.py are
the two sides, end_to_end_report.py writes the table and the plot.
"""
