"""The reference training loop on top of `rlhf_kernels`: SFT, reward model, PPO, RRHF, best-of-n, evaluation, report.

Every stage is a module with a frozen config and a `main(config)` that returns its run folder; `rlhf <stage>` runs it.
"""

__version__ = "0.1.0"
