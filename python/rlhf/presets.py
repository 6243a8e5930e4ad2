"""Presets: the conventions of a reference implementation as values of our flags, by stage.

`rlhf ppo --preset NAME` fills them in where neither a flag nor `--config` says otherwise.
"""

from collections.abc import Mapping
from typing import Any

RRHF_RECIPE = {
    "decoding": ("diverse_beam",),
    "num_candidates": 4,
    "diversity": 1.0,
    "temperature": 0.8,
    "score_temperature": 1.0,
    "response_length": 128,
    "num_prompts": 0,
    "rounds": 1,
    "epochs": 3,
    "batch_size": 64,
    "learning_rate": 2e-5,
    "rank_coef": 1.0,
    "length_power": 1.0,
}
"""What paper and released code of RRHF share (arXiv 2304.05302)."""

PRESETS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "rrhf": {
        "rrhf_paper": {**RRHF_RECIPE, "sft_reduction": "sum", "lr_scheduler": "linear", "warmup": 0.0},
        # As it runs: every candidate divided by the padded length, the supervised term too.
        "rrhf_code": {
            **RRHF_RECIPE,
            "compat_padded_norm": True,
            "sft_reduction": "mean",
            "lr_scheduler": "cosine",
            "warmup": 0.03,
        },
    },
}
