"""Commands of every stage on the data and the models of the `mini` fixture: a few steps, well under a second each."""

SMALL = {"--batch-size": 4, "--save-steps": 1, "--eval-every": 2}
SAMPLED = {"--response-length": 4, "--eval-samples": 4, "--micro-batch": 3}
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
    for name in {"--data", "--feedback", "--model", "--init", "--rm"} & set(flags):
        flags[name] = folder / str(flags[name])
    return [stage, "--out", str(out), *(str(word) for pair in flags.items() for word in pair), *more]
