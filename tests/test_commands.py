"""The commands that the project documents: its configurations, and command lines and tables of its READMEs."""

import re
import shlex
import shutil

import pytest

from dataloaders import DATASETS
from learners import check
from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from tests.processes import ROOT

CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]


@pytest.fixture(autouse=True)
def well_equipped(monkeypatch):
    """A machine with two GPUs, all data and all files, in the project's folder."""
    monkeypatch.setattr(check, "cuda_devices", lambda: 2)
    for entry in DATASETS.values():
        monkeypatch.setattr(entry.load(), "missing", lambda config: [])
    monkeypatch.setattr(check, "_path_problems", lambda config: [])
    monkeypatch.chdir(ROOT)


def documented_commands() -> list[str]:
    """Every ``python run.py`` command line in the READMEs and the configurations' comments, at least one in most."""
    commands = []
    for path in READMES + CONFIGS:
        text = re.sub(r"^# ?", "", path.read_text(encoding="utf-8"), flags=re.M)
        text = re.sub(r"\\\n\s*", "", text)
        found = re.findall(r"^[ $]*(python[0-9.]* (?:-u )?run\.py [^\n#]+)", text, flags=re.M)
        assert found or path in READMES[1:], path
        commands += found
    return commands


def test_configs_of_the_paper_are_the_papers():
    for name, classes, epochs in (("cifar-100", 10, 20), ("imnet-r", 20, 35)):
        config = check.load_checked_config(["--config", f"configs/{name}_prompt.yaml", "--log_dir", "unused"])
        assert (config.data.first_split_size, config.data.other_split_size) == (classes, classes)
        assert (config.data.batch_size, config.data.crop_scale) == (64, (0.08, 1))
        assert (config.optim.epochs, config.optim.lr, config.optim.optimizer) == (epochs, 1e-3, "Adam")
        assert config.aux_loss_scale == 2


def test_the_readmes_tables_are_the_programs():
    learners = [
        f"| `{name}` | {', '.join(field.help for field in PROMPTS[name].fields)} | {PROMPTS[name].paper_text()} |"
        for name in PROMPTS
    ]
    methods = [f"| `{name}` | {DISTILLERS[name].about} |" for name in DISTILLERS]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for row in learners + methods:  # those that the README has
        start = "|".join(row.split("|")[:2]) + "|"
        assert all(line == row for line in readme if line.startswith(start)), f"README.md must say:\n{row}"


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_right(command, tmp_path):
    words = shlex.split(command)
    arguments = words[words.index("run.py") + 1 :]
    if "--help" in arguments:
        return
    if {"--eval_only", "--export", "--predict"} & set(arguments):
        shutil.copy(ROOT / "configs/icon-r_prompt.yaml", tmp_path / "args.yaml")  # that of a finished run
        arguments += ["--log_dir", str(tmp_path)]
    check.load_checked_config(arguments)


def test_the_papers_command_is_right_as_it_is(caplog):
    command = (
        "--config configs/imnet-r_prompt.yaml --gpuid 0 1 --learner_type prompt --learner_name CODAPrompt"
        " --prompt_param 100 8 0.0 --log_dir ImageNet_R/coda-p --t_model 'vit_base_patch16_224'"
        " --s_model 'vit_small_patch16_224' --KD_method 'KD_Token' --kd_prompt_param 12 6"
    )
    config = check.load_checked_config(shlex.split(command))
    assert (config.gpuid, config.distill.method) == ((0, 1), "KD_Token")
    assert str(config.log_dir) == "ImageNet_R/coda-p" and not caplog.records
    flags = "--dataset CIFAR100 --first_split_size 10 --other_split_size 10 --schedule 20 --gpuid".split()
    for gpus, warnings in ((["0"], 0), (["0", "1"], 1)):  # a configuration that lacks aux_loss_scale
        check.load_checked_config([*flags, *gpus])
        assert len(caplog.records) == warnings
    assert "--aux_loss_scale 2" in caplog.text
