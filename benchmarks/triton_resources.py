"""`python -m benchmarks.triton_resources [stem …]`: registers, shared memory and spills of every Triton kernel.

No GPU: the launchers get meta tensors, and Triton compiles what they would launch, with the specialisation, block sizes
and warps of a real call. triton_resources.json is the record that tests/test_triton_resources.py compares with: spilled
registers cost memory traffic, and a kernel that suddenly takes more of anything has usually become slower.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from rlhf_kernels import backend

FILE = Path(__file__).with_suffix(".json")
TARGETS = (80, 90, 100)  # compute capability × 10: A100, H100 and H200, B200
MOST_SHARED = 163 << 10  # bytes, what a program can have on an A100
MEASURED = ("registers", "shared", "stack", "local")
Row = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------- the calls

# An op, the dtypes, and what differs from the defaults below. B=1 T=64: too few rows to fill a GPU, so the paths that
# split a row or need one program. V=50257 (GPT-2): rows that begin at odd addresses.
CALLS = {
    "token_logprobs": """
        token_logprobs_fwd bf16 fp16 fp32 fp64
        token_logprobs_fwd bf16 fp32 V=50257 mask=None with_entropy=False
        token_logprobs_fwd bf16 fp32 softcap=30.0
        token_logprobs_fwd bf16 V=512
        token_logprobs_fwd bf16 fp32 B=1 T=64
        token_logprobs_fwd bf16 B=1 T=64 V=50257 mask=None with_entropy=False softcap=30.0
        token_logprobs_bwd bf16 fp16 fp32
        token_logprobs_bwd bf16 V=50257 mask=None grad_entropy=None
        token_logprobs_bwd bf16 grad_logprobs=None softcap=30.0
        token_logprobs_bwd bf16 V=512""",
    "attention_row": """
        attention_row bf16 fp16 fp32
        attention_row bf16 sink=None
        attention_row bf16 fp32 T=8192 D=256 softcap=50.0 window=4096
        attention_row bf16 T=1001 D=64 Q=12 G=12 sink=None
        attention_row bf16 B=1 T=64 D=80 G=1""",
    "align_credit": """
        align_credit fp32 bf16
        align_credit fp32 T=4097 R=5001
        align_credit fp32 T=64 R=48""",
    "rrhf_loss": """
        rrhf_loss_fwd fp32 bf16 B=64
        rrhf_loss_fwd fp32 B=64 with_grad=False
        rrhf_loss_fwd fp32 B=4 T=77 length_power=0.0
        rrhf_loss_fwd fp32 B=2048 T=512""",
    "linear_rrhf_loss": """
        linear_rrhf_loss_fwd bf16 fp32 B=32 T=128
        linear_rrhf_loss_fwd bf16 B=64 T=256 group_size=4 bias=None
        linear_rrhf_loss_fwd bf16 B=64 T=256 needs=[True,False,False]""",
    "rm_losses": """
        rm_pairwise_loss_fwd fp32 bf16 B=512
        rm_pairwise_loss_fwd fp32 B=16384 P=16384
        rm_pairwise_loss_fwd fp32 B=16 P=9 prompts=None margin=None with_grad=False
        rm_listwise_loss_fwd fp32 bf16 B=512
        rm_listwise_loss_fwd fp32 B=9 with_grad=False
        rm_regression_loss_fwd fp32 bf16 B=512
        rm_regression_loss_fwd fp32 B=9 with_grad=False
        rm_regression_loss_fwd fp32 B=16384""",
    "group_advantages": """
        group_advantages fp32 bf16 B=512 kind=grpo
        group_advantages fp32 B=512 kind=rloo
        group_advantages fp32 B=512 kind=dr_grpo
        group_advantages fp32 B=7 kind=grpo
        group_advantages fp32 B=8192 kind=grpo""",
    "gae": """
        gae fp32 bf16
        gae fp32 T=4097
        gae fp32 T=77""",
    "token_rewards": """
        token_rewards fp32 bf16
        token_rewards fp32 T=4097 kl_estimator=k1
        token_rewards fp32 T=77 attention=None""",
    "rollout_advantages": """
        rollout_advantages fp32 bf16 B=64
        rollout_advantages fp32 B=64 T=4097 kl_estimator=k1
        rollout_advantages fp32 B=64 T=77 attention=None whiten=False""",
    "ppo_loss": """
        ppo_loss_fwd fp32 bf16
        ppo_loss_fwd fp32 bf16 B=1 T=64
        ppo_loss_fwd fp32 B=512 T=4001 normalizer=None cliprange_value=None
        ppo_loss_fwd fp32 normalizer=None with_grad=False
        ppo_loss_fwd fp32 B=1 T=64 with_grad=False""",
    "policy_ref_logprobs": """
        policy_ref_logprobs_fwd bf16 fp16 fp32
        policy_ref_logprobs_fwd bf16 V=50257 mask=None
        policy_ref_logprobs_fwd bf16 B=1 T=64
        policy_ref_logprobs_bwd bf16 fp16 fp32
        policy_ref_logprobs_bwd bf16 V=50257 mask=None grad_entropy=None grad_kl=None
        policy_ref_logprobs_bwd bf16 grad_logprobs=None grad_entropy=None""",
    "fused_ppo_loss": """
        fused_ppo_loss_fwd bf16 fp16 fp32
        fused_ppo_loss_fwd bf16 V=50257 attention=None normalizer=None whiten=False kl_estimator=k1
        fused_ppo_loss_fwd bf16 fp32 softcap=30.0
        fused_ppo_loss_fwd bf16 with_grad=False
        fused_ppo_loss_fwd bf16 B=1 T=64""",
    "linear_logprobs": """
        linear_logprobs_fwd bf16 fp32
        linear_logprobs_fwd bf16 V=50257 mask=None bias=None with_entropy=False softcap=30.0 max_tokens=2048
        linear_logprobs_fwd bf16 fp16 fp32 with_entropy=False with_unit=True
        linear_logprobs_bwd bf16 fp16 fp32
        linear_logprobs_bwd bf16 fp32 grad_entropy=None softcap=30.0
        linear_logprobs_bwd bf16 V=50257 mask=None bias=None needs=[True,False,False] max_tokens=2048
        linear_logprobs_bwd bf16 B=1 T=64""",
    "linear_ppo_loss": """
        linear_ppo_loss_fwd bf16 fp16 fp32
        linear_ppo_loss_fwd bf16 V=50257 bias=None ref_logprobs=None normalizer=None kl_coef=0.0 max_tokens=2048
        linear_ppo_loss_fwd bf16 needs=[False,False,False]
        linear_ppo_loss_fwd bf16 B=1 T=64""",
    "token_feedback_loss": """
        token_feedback_loss_fwd bf16 fp16 fp32 kind=bandit
        token_feedback_loss_fwd bf16 fp32 kind=unlikelihood
        token_feedback_loss_fwd bf16 V=50257 kind=bandit with_grad=False
        token_feedback_loss_fwd bf16 B=1 T=64 kind=bandit""",
}

# By the names in the ops' schemas: Q query heads, G key heads, P pairs, R tokens of the reward model. What a model
# gives has the call's dtype, what an op has made is fp32 (fp64 for fp64).
SIZES = {"B": 8, "T": 1024, "V": 128256, "H": 4096, "P": 512, "R": 1024, "Q": 32, "G": 8, "D": 128, "2": 2}
MODEL = """logits:BTV ref_logits:BTV hidden:BTH weight:VH bias:V query:BQD key:BGTD sink:Q values:BT old_values:BT
    logprobs:BT rewards:BT scores:B targets:B margin:P credit:BR"""
MADE = """lse:BT ref_lse:BT entropy:BT kl:BT old_logprobs:BT ref_logprobs:BT advantages:BT returns:BT attention:BT
    grad_logprobs:BT grad_entropy:BT grad_kl:BT labels:BT normalizer:"""
INDEX = "tokens:BT prompts:B groups:B ranks:B chosen:P rejected:P rm_spans:BR2 policy_spans:BT2"
MASK = "mask:BT key_mask:BT"
SCALARS = """temperature=0.7 softcap=None scale=0.088 window=None beta=0.9 kl_coef=0.05 kl_estimator=k3
    gamma=0.99 lam=0.95 whiten=True cliprange=0.2 cliprange_high=0.28 cliprange_value=0.2 vf_coef=0.5 dual_clip=3.0
    entropy_coef=0.01 rank_coef=1.0 sft_coef=1.0 length_power=1.0 center_coef=0.01 with_entropy=True with_unit=False
    with_grad=True needs=[True,True,True] memory_budget=None max_tokens=None group_size=None
    grad_buffer=None keep_logits=False kept=None"""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def settings(text: str) -> dict[str, Any]:
    """The name=value words of a text."""
    pairs = (word.split("=") for word in text.split() if "=" in word)
    return {name: value if value.islower() else ast.literal_eval(value) for name, value in pairs}


def calls(stem: str) -> Iterator[tuple[str, str, list[Any]]]:
    """Of each call its description, the op and the op's arguments in the order of its schema."""
    for line in CALLS[stem].strip().splitlines():
        op, *words = line.split()
        names = [argument.name for argument in getattr(torch.ops.rlhf_kernels, op).default._schema.arguments]
        changes = settings(line)
        if unknown := set(changes) - {*names, *SIZES}:
            raise ValueError(f"{line.strip()}: no size and no argument of {op} is called {', '.join(unknown)}")
        sizes = SIZES | changes
        for dtype in (word for word in words if word in DTYPES):
            given: dict[str, Any] = {}
            made = torch.promote_types(DTYPES[dtype], torch.float32)
            for tensors, kind in ((MODEL, DTYPES[dtype]), (MADE, made), (INDEX, torch.long), (MASK, torch.bool)):
                for name, _, letters in (word.partition(":") for word in tensors.split()):
                    given[name] = torch.empty([sizes[letter] for letter in letters], dtype=kind, device="meta")
            given |= settings(SCALARS) | changes
            described = " ".join([op, dtype, *(word for word in words if "=" in word)])
            yield described, op, [given[name] for name in names]


# -------------------------------------------------------------------------------------------------------- compilation

_run = JITFunction.run


class Driver:
    """What Triton asks of a GPU; each target is a device of its own, with its own cache."""

    target = TARGETS[0]

    def get_current_device(self) -> int:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)


def compiled(op: str, arguments: list[Any]) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that a call would launch, with their options."""
    found = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((_run(self, *args, grid=grid, warmup=True, **options), options))

    JITFunction.run = record
    try:
        backend._pickers[op]("cuda", "triton")[1](*arguments)
    finally:
        JITFunction.run = _run
    return found


def usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def table(stem: str) -> Iterator[Row]:
    """A row for each kernel that differs from those before it."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    seen: set[str] = set()
    for driver.target in TARGETS:
        for description, op, arguments in calls(stem):
            for kernel, options in compiled(op, arguments):
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    yield {
                        "stem": stem,
                        "kernel": kernel.metadata.name,
                        "call": description,
                        "constants": " ".join(f"{name}={value}" for name, value in options.items() if name.isupper()),
                        "target": f"sm_{driver.target}",
                        "warps": kernel.metadata.num_warps,
                        "shared": kernel.metadata.shared,
                        **usage(kernel.asm["cubin"]),
                    }


# --------------------------------------------------------------------------------------------------------- the record


def identity(row: Row) -> tuple[Any, ...]:
    return tuple(value for name, value in row.items() if name not in MEASURED)


def complaints(rows: list[Row], record: dict[str, Any], version: str) -> list[str]:
    """What is wrong with the rows of some stems: spills, and what differs from the record.

    Another compiler allocates otherwise: with one, kernels must compile and fit, and spill next to nothing.
    """
    same = version == record["triton"]
    wrong = [f"spills: {row}" for row in rows if row["stack"] + row["local"] > (0 if same else 64)]
    wrong += [f"too much shared memory: {row}" for row in rows if row["shared"] > MOST_SHARED]
    stems, now = {row["stem"] for row in rows}, {identity(row): row for row in rows}
    recorded = {identity(row): row for row in record["rows"] if row["stem"] in stems}
    if same:
        wrong += [f"not in the record: {now[key]}" for key in now.keys() - recorded.keys()]
        wrong += [f"only in the record: {recorded[key]}" for key in recorded.keys() - now.keys()]
        for key in now.keys() & recorded.keys():
            for name in ("registers", "shared"):
                if now[key][name] != recorded[key][name]:
                    wrong.append(f"{name} were {recorded[key][name]}: {now[key]}")
    return sorted(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_resources", description=__doc__)
    parser.add_argument("stems", nargs="*", metavar="stem", help=f"all by default: {', '.join(CALLS)}")
    parser.add_argument("--check", action="store_true", help="write nothing; rows to stdout, what is wrong to stderr")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET must not be set: it replaces the compiler")
    if unknown := set(options.stems) - set(CALLS):
        parser.error(f"stem must be one of {', '.join(CALLS)}, got {', '.join(sorted(unknown))}")
    stems = [stem for stem in options.stems or CALLS if backend.import_triton(stem)]
    version = triton.__version__
    record = json.loads(FILE.read_text()) if FILE.exists() else {"triton": version, "rows": []}
    rows = [row for stem in stems for row in table(stem)]
    if options.check:
        wrong = complaints(rows, record, version)
        print(json.dumps(rows))
        print("\n".join(wrong), file=sys.stderr)
        return 1 if wrong else 0
    kept = [row for row in record["rows"] if row["stem"] not in stems and row["stem"] in CALLS]
    if kept and record["triton"] != version:
        parser.error(f"{FILE.name} is of Triton {record['triton']}, this is {version}: compile all stems, not some")
    print("target  kernel  warps  registers  shared  stack  local  call  constants")
    for row in rows:
        columns = {"target": 6, "kernel": 32, "warps": 2} | dict.fromkeys(MEASURED, 5) | {"call": 64, "constants": 0}
        print("  ".join(str(row[name]).ljust(width) for name, width in columns.items()))
    lines = ",\n".join(sorted(json.dumps(row) for row in rows + kept))
    FILE.write_text(f'{{"triton": "{version}", "rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
