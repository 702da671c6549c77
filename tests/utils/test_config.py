"""Reading settings: precedence, the forms a value may take, and the way back to YAML."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from utils.config import OPTIONS, Config, ConfigError, help_text, load_config, parse_config

BASE = {"dataset": "Emoji_R", "first_split_size": 20, "other_split_size": 20, "schedule": [20]}


@pytest.fixture
def config_file(tmp_path):
    """Writes a YAML file with the needed keys and others, and returns its path."""

    def write(**keys) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**BASE, **keys}))
        return str(path)

    return write


def load(*words: str) -> Config:
    return load_config([*words, "--log_dir", "unused"])


def test_flag_beats_file_beats_default(config_file):
    path = config_file(lr=0.5, batch_size=8)
    config = load("--config", path, "--lr", "0.25")
    assert (config.lr, config.batch_size, config.momentum) == (0.25, 8, 0.9)


def test_flag_with_the_default_value_still_beats_the_file(config_file):
    assert load("--config", config_file(kd_alpha=0.9), "--kd_alpha", "0.5").kd_alpha == 0.5


def test_last_of_repeated_flags_counts(config_file):
    assert load("--config", config_file(), "--lr", "1", "--lr", "2").lr == 2


def test_every_original_flag_is_there():
    flags = (
        "config gpuid log_dir learner_type learner_name debug_mode overwrite upper_bound_flag memory DW"
        " prompt_param t_model s_model kd_alpha Soft_T KD_method kd_prompt_param random_s"
    )
    keys = (
        "dataset first_split_size other_split_size schedule schedule_type batch_size optimizer lr momentum"
        " weight_decay model_type model_name max_task dataroot workers validation train_aug rand_split"
    )
    assert set(f"{flags} {keys}".split()) <= set(OPTIONS)
    assert all(OPTIONS[key].in_yaml for key in keys.split())


def test_paper_command_is_read(config_file):
    command = (
        "--gpuid 0 1 --learner_type prompt --learner_name CODAPrompt --prompt_param 100 8 0.0 --t_model"
        " vit_base_patch16_224 --s_model vit_small_patch16_224 --KD_method KD_Token --kd_prompt_param 12 6"
    )
    config = load("--config", config_file(), *command.split())
    assert config.gpuid == (0, 1)
    assert config.prompt_param == (100, 8, 0)
    assert config.kd_prompt_param == (12, 6)
    assert (config.kd_method, config.teacher_model) == ("KD_Token", "vit_base_patch16_224")


def test_defaults_are_the_originals(config_file):
    config = load("--config", config_file())
    assert (config.kd_alpha, config.temperature, config.kd_method) == (0.5, 2, "KD")
    assert (config.kd_prompt_param, config.aux_loss_scale, config.seed) == ((12, 6), 1, 1)
    assert (config.lr, config.momentum, config.optimizer, config.weight_decay) == (1e-3, 0.9, "Adam", 0)
    assert (config.crop_scale, config.class_order, config.precision) == ((0.08, 1), "natural", "fp32")
    assert (config.overwrite, config.gpuid, config.prompt_param) == (False, None, None)


def test_yaml_1_1_reads_exponents_as_text_but_they_count_as_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "dataset: Emoji_R\nfirst_split_size: '20'\nother_split_size: 20\nschedule: 3\nlr: 1e-3\nDW: True\n"
    )
    config = load("--config", str(path))
    assert (config.lr, config.first_split_size, config.schedule) == (1e-3, 20, (3,))
    assert config.class_weighting is True


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--DW"], True),
        (["--DW", "0"], False),
        (["--DW", "True"], True),
        (["--DW=false"], False),
        ([], False),
    ],
)
def test_switches(config_file, words, value):
    assert load("--config", config_file(), *words).class_weighting is value


def test_negative_numbers_are_values(config_file):
    config = load("--config", config_file(), "--gpuid", "-1", "--prompt_param", "30", "20", "-1e0")
    assert config.gpuid == (-1,)
    assert config.prompt_param == (30, 20, -1)


def test_null_in_the_file_is_no_value(config_file):
    assert load("--config", config_file(gpuid=None, t_weights=None)).gpuid is None


def test_home_folder_is_expanded(config_file, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert load("--config", config_file(dataroot="~/data")).dataroot == Path("/somewhere/data")


def test_written_settings_are_read_back(config_file, tmp_path):
    flags = "--gpuid 0 1 --prompt_param 10 20 6 --DW --lr 3e-4 --crop_scale 0.5 1 --t_weights w.pth"
    config = load("--config", config_file(), *flags.split())
    again = tmp_path / "args.yaml"
    again.write_text(yaml.safe_dump(config.to_yaml_dict()))
    restored = load_config(["--config", str(again)])
    assert dataclasses.replace(restored, config=config.config) == config
    assert restored.settings_hash() == config.settings_hash()


def test_overwrite_is_not_written_down(config_file):
    assert "overwrite" not in load("--config", config_file(), "--overwrite", "1").to_yaml_dict()


def test_hash_follows_what_decides_results(config_file):
    base = load("--config", config_file())
    changed = {"log_dir": Path("b"), "workers": 2, "gpuid": (-1,), "no_progress": True, "dataroot": Path("x")}
    assert dataclasses.replace(base, **changed).settings_hash() == base.settings_hash()
    for change in ({"lr": 0.5}, {"kd_method": "DKD"}, {"precision": "bf16"}, {"seed": 2}):
        assert dataclasses.replace(base, **change).settings_hash() != base.settings_hash()
    other_seed = dataclasses.replace(base, seed=2)
    assert other_seed.settings_hash(without_seed=True) == base.settings_hash(without_seed=True)


def test_one_seed_of_a_repeat(config_file):
    config = load_config(["--config", config_file(), "--log_dir", "runs", "--repeat", "3"])
    seed = config.for_seed(2)
    assert (seed.seed, seed.repeat, seed.log_dir) == (2, 1, Path("runs/seed-2"))


def test_keys_without_effect_are_listed(config_file):
    keys = {"model_type": "zoo", "model_name": "vit", "rand_split": True, "debug_mode": 1}
    assert load("--config", config_file(**keys)).without_effect == tuple(keys)
    assert load("--config", config_file(rand_split=False)).without_effect == ()


@pytest.mark.parametrize("flags", [["--eval_only"], ["--export", "s.pt2"], ["--predict", "a.png", "b.png"]])
def test_finished_runs_know_their_settings_but_not_the_devices(tmp_path, flags):
    saved = load("--lr", "0.25", "--gpuid", "0", "1", *"--dataset Emoji_R --schedule 20".split(),
                 *"--first_split_size 20 --other_split_size 20".split())  # fmt: skip
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(saved.to_yaml_dict()))
    config = load_config([*flags, "--log_dir", str(tmp_path)])
    assert (config.lr, config.gpuid, config.log_dir) == (0.25, None, tmp_path)
    assert config.action == flags[0].removeprefix("--")


def test_all_mistakes_are_reported_together(config_file):
    path = config_file(lr="fast", batchsize=3, momentum=1)
    with pytest.raises(ConfigError) as error:
        load_config(["stray", "--config", path, *"--kd_alpha 2 --Soft_t 1 --gpuid --random_s x".split()])
    text = "\n".join(error.value.problems)
    mistakes = ("stray", "lr in", "batchsize", "batch_size", "momentum", "--kd_alpha", "--Soft_T", "--gpuid",
                "--random_s", "--log_dir")  # fmt: skip
    assert [mistake for mistake in mistakes if mistake not in text] == []
    assert len(error.value.problems) == 9


def test_what_was_wrong_is_known(config_file):
    parsed = parse_config(["--config", config_file(lr="fast", batch_size=0), "--batch_size", "8"])
    assert parsed.wrong == {"lr"}
    assert parsed.config().batch_size == 8


def test_hostile_yaml_runs_nothing(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"lr: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load("--config", str(path))
    assert not (tmp_path / "made").exists()


def test_nested_aliases_do_not_blow_up_messages(tmp_path):
    path = tmp_path / "c.yaml"
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    path.write_text("\n".join([*lines, "lr: *a59"]))
    with pytest.raises(ConfigError) as error:
        load("--config", str(path))
    assert max(map(len, error.value.problems)) < 400


def test_help_names_every_flag_once_with_range_default_and_paper():
    text = help_text({"dataset": [("Emoji_R", "emoji")]})
    starts = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert starts == [f"--{key}" for key in OPTIONS]
    assert "a number from 0 to 1; default: 0.5" in " ".join(text.split())
    assert "paper: 12 6" in text
    assert "Emoji_R: emoji" in text
    assert max(map(len, text.splitlines())) <= 110


def test_nothing_heavy_is_imported():
    code = (
        "import sys, learners.check; learners.check.help_page()"
        "; print([m for m in ('torch', 'torchvision', 'timm') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
