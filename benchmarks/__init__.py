"""Microbenchmarks of the ops: `python -m benchmarks --help`.

bench_<stem>.py says what is run (cases, inputs, peers, and the work that cannot be avoided), harness.py checks and
times it, machine.py knows the machine, report.py writes the tables.
"""
