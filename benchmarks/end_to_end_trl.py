"""TRL's side: its PPOTrainer on the given models, timed by phase; runs in TRL's own environment."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Clock:
    """Seconds by phase of each iteration, from wrappers around the trainer's own functions."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.training_since: float | None = None
        self.iteration_since = time.perf_counter()

    def timed(self, call: Callable[..., Any], phase: Callable[..., str | None]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start, name = time.perf_counter(), phase(*args)
            if name is None or self.training_since is not None:  # part of the training, which is timed as a whole
                self.training_since = self.training_since or start
                return call(*args, **kwargs)
            result = call(*args, **kwargs)
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
            return result

        return wrapper

    def iteration(self) -> dict[str, float]:
        """Ends an iteration."""
        now = time.perf_counter()
        phases = self.phases | {"train": now - (self.training_since or now), "total": now - self.iteration_since}
        self.phases, self.training_since, self.iteration_since = {}, None, now
        return phases


def main(task: Path, settings: dict[str, Any], out: Path) -> None:
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(task / "policy")
    prompts = json.loads((task / "prompts.json").read_text())
    policy, ref = (AutoModelForCausalLM.from_pretrained(task / "policy") for _ in range(2))
    reward_model, value_model = (
        AutoModelForSequenceClassification.from_pretrained(task / "reward_model", num_labels=1) for _ in range(2)
    )
    clock, rows = Clock(), []

    class Record(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            rows.append({"score": logs["objective/scores"], "kl": logs["objective/kl"], "seconds": clock.iteration()})

    module.batch_generation = clock.timed(module.batch_generation, lambda *_: "generate")
    module.selective_log_softmax = clock.timed(module.selective_log_softmax, lambda *_: "logprobs and values")
    module.get_reward = clock.timed(
        module.get_reward, lambda model, *_: "score" if model is reward_model else "logprobs and values"
    )
    module.forward = clock.timed(module.forward, lambda model, *_: "logprobs and values" if model is ref else None)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(out / "trainer"),
            seed=settings["seed"],
            total_episodes=settings["iterations"] * settings["batch_size"],
            per_device_train_batch_size=settings["batch_size"],
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=settings["num_ppo_epochs"],
            local_rollout_forward_batch_size=settings["batch_size"],
            response_length=settings["response_length"],
            stop_token="eos",
            temperature=settings["temperature"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=0,
            adam_epsilon=settings["adam_eps"],
            weight_decay=0.0,
            kl_coef=settings["kl_coef"],
            cliprange=settings["cliprange"],
            cliprange_value=settings["cliprange_value"],
            vf_coef=settings["vf_coef"],
            gamma=settings["gamma"],
            lam=settings["lam"],
            missing_eos_penalty=None,
            whiten_rewards=False,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=ref,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]}),
        eval_dataset=Dataset.from_dict({"input_ids": [[1]]}),
        callbacks=[Record()],
    )
    clock.iteration()
    trainer.train()
    # Not getrusage: that one remembers the memory of the process that started this one.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    policy.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    (out / "result.json").write_text(json.dumps({"iterations": rows, "peak_rss_mib": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
