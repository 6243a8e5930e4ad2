"""Microbenchmarks of the ops: `python -m benchmarks --help`.

bench_<stem>.py says what is run (cases, inputs, peers, and the work that cannot be avoided), harness.py checks and
times it with clock.py, machine.py knows the machine, report.py writes the tables, profile.py runs one call for a
profiler. gpu.sh does all there is to do on a GPU.
"""
