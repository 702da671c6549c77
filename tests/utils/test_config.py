"""Reading settings: precedence, the forms a value may take, and the way back to YAML."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from tests import runs
from utils.config import OPTIONS, Config, DistillConfig, OptimConfig, argument_parser, make_config, parse_config

BASE = {"dataset": "Icon_R", "first_split_size": 20, "other_split_size": 20, "schedule": [20]}


# What the original's run.py writes: every flag and every key of its YAML file.
ORIGINALS_ARGS = """{config: configs/imnet-r_prompt.yaml, gpuid: [0, 1], log_dir: ImageNet_R/coda-p, overwrite: 1,
    debug_mode: 0, upper_bound_flag: false, memory: 0, DW: false, learner_type: prompt, learner_name: CODAPrompt,
    prompt_param: [100.0, 8.0, 0.0], t_model: vit_base_patch16_224, s_model: vit_small_patch16_224, random_s: 10,
    KD_method: KD_Token, kd_alpha: 0.5, Soft_T: 2.0, kd_prompt_param: [12, 6], dataset: ImageNet_R, model_type: zoo,
    first_split_size: 20, other_split_size: 20, schedule: [35], schedule_type: cosine, batch_size: 64, workers: 4,
    optimizer: Adam, lr: 0.001, momentum: 0.9, weight_decay: 0, model_name: vit_pt_imnet, max_task: -1, dataroot: data,
    validation: false, train_aug: true, rand_split: true}"""


@pytest.fixture
def config_file(tmp_path):
    """Writes a YAML file with the needed keys and others, and returns its path."""

    def write(**keys) -> str:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**BASE, **keys}))
        return str(tmp_path / "config.yaml")

    return write


def load(*words: str) -> Config:
    parsed = parse_config([*words, "--log_dir", "unused"])
    assert parsed.problems == []
    return parsed.config()


def test_flag_overrides_file_overrides_default(config_file):
    path = config_file(lr=0.5, batch_size=8, kd_alpha=0.9)
    config = load("--config", path, "--lr", "1", "--lr", "0.25", "--kd_alpha", "0.5")
    assert (config.optim.lr, config.data.batch_size, config.optim.momentum) == (0.25, 8, 0.9)
    assert config.distill.alpha == 0.5  # so does a flag with the default's value


def test_defaults(config_file):
    config = load("--config", config_file())
    assert config.distill == DistillConfig("KD", prompt_param=(5, 6), alpha=0.5, temperature=2)
    assert (config.student_model, config.teacher_model) == ("vit_tiny_patch16_224", "vit_base_patch16_224")
    assert (config.seed, parse_config([]).config().log_dir) == (10, Path("outputs/out"))
    assert config.optim == OptimConfig((20,), "cosine", "Adam", lr=1e-3, momentum=0.9, weight_decay=0)
    assert (config.data.crop_scale, config.aux_loss_scale, config.precision) == ((0.08, 1), 1, "fp32")


def test_switches(config_file):
    for words, value in {"--DW": True, "--DW 0": False, "--DW True": True, "--DW=false": False}.items():
        assert load("--config", config_file(DW=not value), *words.split()).data.class_weighting is value


def test_flags_may_be_shortened(config_file):
    config = load("--conf", config_file(), "--batch", "8", "--learner_n=L2P", "--kd_prompt", "1", "6")
    assert (config.data.batch_size, config.learner_name, config.distill.prompt_param) == (8, "L2P", (1, 6))


def test_args_yaml_of_the_original_is_a_config(tmp_path, caplog):
    file = tmp_path / "args.yaml"
    file.write_text(ORIGINALS_ARGS)
    parsed = parse_config(["--config", str(file)])
    config = parsed.config()
    assert parsed.problems == [] and not config.overwrite and config.config == file
    assert (config.gpuid, config.prompt_param, config.seed) == ((0, 1), (100, 8, 0), 10)
    assert (config.distill, config.log_dir) == (DistillConfig("KD_Token", (12, 6)), Path("ImageNet_R/coda-p"))
    assert [record.args[0] for record in caplog.records] == ["config", "overwrite"]


def test_forms_of_values(config_file, monkeypatch):
    """YAML 1.1 reads 1e-3 as text, null is not a value, a single value may stand for a list."""
    monkeypatch.setenv("HOME", "/somewhere")
    keys = {"lr": "1e-3", "schedule": 3, "first_split_size": "20", "gpuid": None, "dataroot": "~/data"}
    config = load("--config", config_file(**keys), "--prompt_param", "30", "20", "-1")
    assert (config.optim.lr, config.optim.schedule, config.data.first_split_size) == (1e-3, (3,), 20)
    assert (config.gpuid, config.data.dataroot) == (None, Path("/somewhere/data"))
    assert config.prompt_param == (30, 20, -1)
    assert load("--config", config_file(), "--gpuid", "-1").gpuid == (-1,)


def test_written_settings_are_read_back(config_file, tmp_path):
    flags = "--gpuid 0 1 --prompt_param 10 20 6 --DW --lr 3e-4 --crop_scale 0.5 1 --t_weights w.pth --overwrite 1"
    flags += " --kd_param beta=8 alpha=x"
    config = load("--config", config_file(), *flags.split())
    again = tmp_path / "args.yaml"
    again.write_text(yaml.safe_dump(config.to_yaml_dict()))
    restored = load("--config", str(again))
    assert not restored.overwrite  # a file that says so would wipe every later resume
    assert dataclasses.replace(restored, config=config.config, overwrite=True) == config
    assert restored.settings_hash() == config.settings_hash()


def test_the_hash_follows_the_settings_that_affect_results():
    base = make_config({})
    same = {"log_dir": Path("b"), "workers": 2, "gpuid": (-1,), "no_progress": True, "dataroot": Path("x")}
    assert make_config(same).settings_hash() == base.settings_hash()
    for change in ({"lr": 0.5}, {"KD_method": "DKD"}, {"precision": "bf16"}, {"random_s": 2}):
        assert make_config(change).settings_hash() != base.settings_hash()


def test_a_key_that_an_older_run_lacks_counts_as_its_default():
    config = make_config({"kd_alpha": 0.9, "lr": 0.5, "kd_param": {"a": 1.0, "b": 4.0}})
    defaults = dataclasses.replace(config.distill, param_defaults={"a": 1.0, "b": 2.0})
    config = dataclasses.replace(config, distill=defaults)
    older = config.result_settings() | {"lr": 0.1, "kd_param": {"b": 2}}
    del older["kd_alpha"], older["precision"]
    changes = {"kd_alpha": (0.5, 0.9), "lr": (0.1, 0.5), "kd_param": ({"a": 1, "b": 2}, {"a": 1, "b": 4})}
    assert config.changes(older) == changes
    del older["kd_param"]
    assert config.changes(older) == changes


def test_keys_without_effect_are_listed(config_file):
    keys = {"debug_mode": 1, "rand_split": True, "model_type": "zoo", "model_name": "vit"}
    assert load("--config", config_file(**keys)).without_effect == tuple(keys)
    assert load("--config", config_file(rand_split=False)).without_effect == ()


@pytest.mark.parametrize("flags", [["--eval_only"], ["--export", "s.pt2"], ["--predict", "a.png", "b.png"]])
def test_finished_runs_know_their_settings_but_not_the_devices(tmp_path, flags):
    saved = make_config({**BASE, "schedule": (20,), "lr": 0.25, "gpuid": (0, 1)})
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(saved.to_yaml_dict()))
    parsed = parse_config([*flags, "--log_dir", str(tmp_path)])
    config = parsed.config()
    assert (parsed.problems, config.optim.lr, config.gpuid, config.log_dir) == ([], 0.25, None, tmp_path)
    assert config.action == flags[0].removeprefix("--")


def test_hostile_yaml_runs_nothing_and_spoils_no_message(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"lr: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    assert "not valid YAML" in parse_config(["--config", str(path)]).problems[0]
    assert not (tmp_path / "made").exists()
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    path.write_text("\n".join([*lines, "lr: *a59"]))
    assert max(map(len, parse_config(["--config", str(path)]).problems)) < 400


def test_help_names_every_flag_with_range_default_and_paper():
    text = argument_parser("the choices", for_help=True).format_help()
    starts = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert sorted(starts) == sorted(["--version", *(f"--{key}" for key in OPTIONS)])
    assert "data set (required; paper: CIFAR100 and ImageNet_R)" in text
    assert "a number from 0 to 1; default and paper: 0.5" in " ".join(text.split())


def test_nothing_heavy_is_imported():
    """The help and a configuration that cannot run do not wait for torch and timm."""
    wrong = ["--config", "configs/cifar-100_prompt.yaml", "--log_dir", "unused", "--kd_alpha", "2"]
    script = f"import sys, run; assert run.main(['--help']) == 0 and run.main({wrong}) == 2"
    done = runs.python(f"{script}; sys.exit(bool({{'torch', 'torchvision', 'timm'}} & set(sys.modules)))")
    assert done.returncode == 0 and "DualPrompt" in done.stdout and "--kd_alpha" in done.stderr
