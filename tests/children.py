"""`rlhf` in processes of their own, forked from a server that has imported everything: a run costs no imports.

No process may have used OpenMP's threads before it forks, so the server loads this module and runs nothing.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import rlhf.best_of_n
import rlhf.dpo
import rlhf.online
import rlhf.ppo
import rlhf.rft
import rlhf.rm
import rlhf.rrhf
import rlhf.sft  # noqa: F401
from rlhf import cli
from rlhf.run import Run

FILE_OPERATIONS = ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"))


def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["children"])
    return context


def run(argv: list[str], log: str, kill_at: int | None = None, interrupt_at: int | None = None) -> None:
    """The command with its output in `log`.

    kill_at: SIGKILL before this call of fsync, rename, replace or rmtree, from 0. interrupt_at: Ctrl-C in this step.
    Writes the number of such calls to `log`.calls where it ends by itself.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    calls = [0]

    def watched(original):
        def call(*args, **options):
            if calls[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls[0] += 1
            return original(*args, **options)

        return call

    for module, name in FILE_OPERATIONS:
        setattr(module, name, watched(getattr(module, name)))
    original_log = Run.log

    def interrupting(self, step, values):
        if step == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return original_log(self, step, values)

    Run.log = interrupting
    status = cli.main(argv)
    Path(f"{log}.calls").write_text(json.dumps(calls[0]))
    sys.exit(status)
