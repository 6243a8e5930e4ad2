"""Names of other frameworks: the table as data, and what a command line makes of it."""

import dataclasses
import importlib
import typing

import pytest

from rlhf import flags, presets
from rlhf.aliases import ALIASES, Alias
from rlhf.cli import STAGES, main
from rlhf.config import UserError, check_options

CONFIGS = {name: getattr(importlib.import_module(stage.module), stage.config) for name, stage in STAGES.items()}
FIELDS = {name: {field.name: field for field in dataclasses.fields(config)} for name, config in CONFIGS.items()}
REQUIRED = {"ppo": "--init i --rm r --out o", "rrhf": "--init i --rm r --out o"}


def parse(line: str, stage: str = "ppo"):
    config = CONFIGS[stage]
    return flags.parse_config(flags.make_parser(stage, "", config), stage, config, line.split())


def stages_of(alias: Alias) -> list[str]:
    """The stages whose config has the fields of an alias."""
    needed = {*alias.ours.split(), *alias.also}
    return [name for name in alias.stages or STAGES if needed <= set(FIELDS[name])]


# --- the table ---


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: f"{alias.theirs}-{alias.ours}")
def test_row(alias):
    assert alias.theirs == alias.theirs.strip().replace("-", "_")
    assert set(alias.stages) <= set(STAGES)
    if not alias.ours:
        assert alias.note and not alias.values and not alias.also and alias.scale == 1
        assert not any(alias.theirs in FIELDS[name] for name in alias.stages), "a flag of ours would be refused"
        return
    stages = stages_of(alias)
    assert stages, "no stage has these fields"
    for name in stages:
        assert alias.theirs not in FIELDS[name] or alias.stages, "the row would never be used"
        assert set(alias.also) <= set(FIELDS[name])
        types = typing.get_type_hints(CONFIGS[name])
        for field, value in [(alias.ours, value) for value in alias.values.values()] + list(alias.also.items()):
            choices = FIELDS[name][field].metadata.get("choices")
            assert not choices or value in choices
            flags.convert(field, value, types[field])


def test_rows_are_unique():
    rows = [(alias.theirs, name) for alias in ALIASES if alias.ours for name in stages_of(alias)]
    later = [alias for alias in ALIASES if alias.theirs in ("model_name_or_path", "pretrain") and not alias.stages]
    doubled = {row for row in rows if rows.count(row) > 1}
    assert doubled <= {(alias.theirs, name) for alias in later for name in STAGES}


# --- what a command line makes of it ---


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--init-kl-coef 0.2 --target 6 --horizon 5000", {"kl_coef": 0.2, "kl_target": 6.0, "kl_horizon": 5000.0}),
        ("--target 3", {"kl_control": "adaptive"}),
        ("--target 3 --kl-control fixed", {"kl_control": "fixed", "kl_target": 3.0}),
        ("--adap_kl_ctrl False --kl_penalty mse", {"kl_control": "fixed", "kl_estimator": "k2"}),
        ("--eps_clip_low_high 0.2 0.28", {"cliprange": 0.2, "cliprange_high": 0.28}),
        ("actor_rollout_ref.actor.clip_ratio_low=0.1", {"cliprange": 0.1}),
        ("critic.cliprange_value=0.5 --clip_ratio 0.3", {"cliprange": 0.3, "cliprange_value": 0.5}),
        ("--algo.kl.init_coef=1e-2 --actor.adam.lr 1e-6", {"kl_coef": 0.01, "learning_rate": 1e-6}),
        ("algorithm.use_kl_in_reward=False", {"kl_in": "none"}),
        ("algorithm.use_kl_in_reward=False actor_rollout_ref.actor.use_kl_loss=True", {"kl_in": "loss"}),
        ("actor_rollout_ref.actor.kl_loss_type=low_var_kl+", {"kl_estimator": "k3+", "kl_in": "loss"}),
        ("--target_kl 0.5 --loss_type dr_grpo", {"early_stop_kl": 0.75, "loss_aggregation": "constant-length"}),
        ("--n_samples_per_prompt 4 --advantage_estimator group_norm", {"num_generations": 4, "estimator": "grpo"}),
        ("algorithm.adv_estimator=reinforce_plus_plus", {"estimator": "reinforce++"}),
        ("--penalty_reward_value -2", {"missing_eos": "replace", "missing_eos_penalty": 2.0}),
        ("--method.cliprange_reward 10 --method.scale_reward ref", {"score_clip": 10.0, "score_norm": "ref-std"}),
        ("--use_score_scaling --use_score_norm", {"score_norm": "running-z"}),
        ("--use_score_scaling", {"score_norm": "running-std"}),
        ("algorithm.kl_penalty=low_var_kl", {"kl_estimator": "k3"}),
        ("--method.lam 1 --method.num_rollouts 64", {"lam": 1.0, "batch_size": 64}),
        ("--delta 4 --bf16 --use_cpu true", {"dual_clip": 4.0, "dtype": "bfloat16", "device": "cpu"}),
        ("--whiten_advantages False --overwrite_output_dir", {"whiten_advantages": False, "overwrite": True}),
        ("--whiten-advantages=true", {"whiten_advantages": True}),
    ],
)  # fmt: skip
def test_ppo(line, expected, capsys):
    config = parse(f"--init i --rm r --out o {line}")
    assert {name: getattr(config, name) for name in expected} == expected


def test_what_is_said(capsys):
    parse("--sft_model_path i --reward-model-path r --output_dir o --target 6 --num-ppo-epochs 3")
    assert capsys.readouterr().err.splitlines() == [
        "rlhf ppo: sft_model_path of TRL is --init i here",
        "rlhf ppo: reward_model_path of TRL is --rm r here",
        "rlhf ppo: output_dir of transformers is --out o here",
        "rlhf ppo: target of TRL is --kl-target 6 --kl-control adaptive here",
    ]
    parse("--init i --rm r --out o --kl_coef 1")
    assert capsys.readouterr().err == ""


def test_the_stage_decides():
    assert parse("--model_name_or_path m --output_dir o --num_train_epochs 2", "sft").model == "m"
    assert parse("--model_name_or_path m --output_dir o --num_train_epochs 2", "rm").init == "m"
    assert parse("--out o --per_device_train_batch_size 3", "sft").batch_size == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--total_episodes 100",
            "total_episodes of TRL is not taken: --steps counts rollouts: episodes / --batch-size",
        ),
        ("--rollout-batch-size 8", "rollout_batch_size of OpenRLHF is not taken: it counts prompts;"),
        ("--per_device_train_batch_size 8", "per_device_train_batch_size of transformers is not taken: in TRL"),
        ("--kl_penalty kl3", "kl_penalty of TRL must be one of kl, k1, abs, mse, k2, low_var_kl, k3, full, got"),
        ("--kl_coef 1 --init_kl_coef 2", "init_kl_coef is --kl-coef, which is given twice"),
        ("--epsilon 0.2 --clip_ratio 0.2", "clip_ratio is --cliprange, which is given twice"),
        ("--eps_clip_low_high 0.2", "eps_clip_low_high must have 2 values, got '0.2'"),
        ("--center_rewards_coefficient 1", "is --center-coef, which rlhf ppo does not have"),
        ("--init_kl_ceof 1", "unknown flag --init-kl-ceof; did you mean --init-kl-coef?"),
        ("--fp16", "fp16 of transformers is not taken: --dtype is float32 or bfloat16"),
        ("--resume_from_checkpoint runs/x", "resume_from_checkpoint of transformers must be one of true, false, got"),
        ("--epsilon wide", "--cliprange must be a number, got 'wide'"),
        ("--epsilon -1", "cliprange must be at least 0, got -1.0"),
    ],
)
def test_refusals(line, message):
    with pytest.raises(UserError) as error:
        parse(f"--init i --rm r --out o {line}")
    assert message in str(error.value)


def test_nested_yaml(tmp_path, capsys):
    path = tmp_path / "verl.yaml"
    path.write_text(
        "init: i\nrm: r\nout: o\n"
        "actor_rollout_ref:\n  actor:\n    clip_ratio_high: 0.28\n    ppo_epochs: 2\n"
        "algorithm:\n  lam: 1.0\n  kl_ctrl: {type: adaptive, kl_coef: 1e-3}\n"
    )
    config = parse(f"--config {path} --lam 0.9")
    assert (config.cliprange_high, config.num_ppo_epochs, config.kl_control) == (0.28, 2, "adaptive")
    assert (config.kl_coef, config.lam) == (1e-3, 0.9)
    assert f"{path}: algorithm.lam of verl is --lam 1 here" in capsys.readouterr().err


# --- presets ---


def test_preset_fills_what_is_not_given(tmp_path):
    (tmp_path / "c.yaml").write_text("kl_coef: 0.8\npreset: verl\n")
    config = parse(f"--init i --rm r --out o --config {tmp_path / 'c.yaml'} --lam 0.7")
    assert (config.dual_clip, config.kl_coef, config.lam, config.vf_coef) == (3.0, 0.8, 0.7, 1.0)
    assert parse("--init i --rm r --out o --preset verl --epsilon 0.1").cliprange == 0.1
    with pytest.raises(UserError, match=r"preset must be one of lm_hp, n_plus, .*, got 'narrow'"):
        parse("--init i --rm r --out o --preset narrow")
    with pytest.raises(UserError, match="unknown flag --preset"):
        parse("--out o --preset verl", "sft")


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, each in presets.PRESETS.items() for name in each])
def test_presets_are_valid(stage, name):
    config = parse(f"{REQUIRED[stage]} --preset {name}", stage)
    check_options(config)
    for field, value in presets.PRESETS[stage][name].items():
        assert getattr(config, field) == value


def test_a_mistake_is_one_line(capsys):
    assert main(["ppo", "--init", "i", "--total-episodes", "3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
