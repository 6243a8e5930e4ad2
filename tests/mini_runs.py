"""Commands of every stage, and of variants of one ("stage+variant"), on the data and the models of the `mini` fixture.

A few steps each, well under a second.
"""

SMALL = {"--batch-size": 4, "--save-steps": 1, "--eval-every": 2}
SAMPLED = {"--response-length": 4, "--eval-samples": 4, "--micro-batch": 3}
REFRESHED = {"--init": "policy", "--rm": "rm", "--gold": "rm", "--steps": 5, "--num-samples": 2}
REFRESHED |= {"--refresh-every": 2, "--label-prompts": 6, "--rm-learning-rate": 1e-3}
STAGES = {
    "sft": {**SMALL, "--model": "policy", "--max-steps": 5, "--eval-fraction": 0.2},
    "rm": {**SMALL, "--init": "policy", "--max-steps": 5, "--token-dropout": 0.2},
    "ppo": {
        **SMALL,
        **SAMPLED,
        "--init": "policy",
        "--rm": "rm",
        "--steps": 5,
        "--kl-control": "adaptive",
        "--reward-shaping": "abc",
        "--num-samples": 2,
    },
    "online": {**SMALL, **SAMPLED, **REFRESHED},
    "online+lora": {**SMALL, **SAMPLED, **REFRESHED, "--lora-r": 2},
    "rrhf": {**SMALL, **SAMPLED, "--init": "policy", "--rm": "rm", "--num-prompts": 8, "--rounds": 2, "--epochs": 2},
    "best-of-n": {**SMALL, **SAMPLED, "--init": "policy", "--rm": "rm", "--num-prompts": 12, "--n": 2},
    "rft": {**SMALL, **SAMPLED, "--init": "policy", "--rm": "rm", "--num-prompts": 6, "--rounds": 2},
    "token-feedback": {
        **SMALL,
        **SAMPLED,
        "--feedback": "marked.jsonl",
        "--init": "policy",
        "--loss": "ppo",
        "--max-steps": 6,
        "--epochs": 2,
    },
    "dpo": {**SMALL, **SAMPLED, "--init": "policy", "--rm": "rm", "--pairs": "sampled", "--num-prompts": 6},
}


def command(folder, stage, out, *more):
    flags = {"--data": "rows.jsonl", **STAGES[stage]}
    for name in {"--data", "--feedback", "--model", "--init", "--rm", "--gold"} & set(flags):
        flags[name] = folder / str(flags[name])
    return [stage.partition("+")[0], "--out", str(out), *(str(word) for pair in flags.items() for word in pair), *more]
