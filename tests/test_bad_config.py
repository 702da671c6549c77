"""Configurations that cannot run: each is refused with one sentence, exit code 2 and nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

import run
from dataloaders.icon_r import IconR
from learners import check
from tests.processes import ROOT
from utils import packages
from utils.config import SYNONYMS
from utils.report import __main__ as report

ICON_R = ROOT / "configs" / "icon-r_prompt.yaml"


# Each with one mistake: flags after a right command line (str), keys in a right file (dict), or another file (bytes);
# and what the message must contain: where the mistake is, and the way out. "{tmp}" is a folder with an empty file
# named "file", "{root}" the project's.
BAD = [
    # names
    ("--learner_name dualprompt", "--learner_name", "Did you mean DualPrompt?"),
    ("--KD_method KDToken", "--KD_method", "KD_Token"),
    ("--dataset IconR", "--dataset", "Icon_R", "CIFAR100"),
    ("--t_model vit_bas_patch16_224", "--t_model", "did you mean vit_base_patch16_224?"),
    (f"--s_model {'9' * 5000}", "--s_model must be a model", "999..."),
    ({"t_model": "mini\nvit"}, "t_model", "must be a model"),
    ("--t_model vit_base_patch16_224.augreg_in22k", "--t_model", "augreg_in21k"),
    # unknown flags and keys
    ("--batchsize 8", "unknown flag --batchsize", "--batch_size"),
    ("--qqqqqq", "unknown flag --qqqqqq", "--help"),
    ("-lr 0.1", "unknown flag -lr", "--lr"),
    *((f"--{typed} 1", f"--{typed}", f"did you mean --{meant}?") for typed, meant in SYNONYMS.items()),
    ({"learning-rate": 1}, "unknown key 'learning-rate'", "did you mean lr?"),
    ({"batchsize": 8}, "unknown key 'batchsize'", "did you mean batch_size?"),
    ({3: 8}, "unknown key 3", "config.yaml"),
    ("--log x", "--log", "--log_dir", "--log_interval", "write the flag out"),
    # missing and superfluous values
    ("--lr 0.1 0.2", "--lr", "takes one value", "2 values"),
    ("--gpuid", "--gpuid", "-1"),
    ("--overwrite", "--overwrite", "0 or 1"),
    ("--predict", "--predict", "images or folders"),
    ("--t_model=", "--t_model", "must be"),
    ({"lr": None}, "lr", "has no value"),
    ({"schedule": []}, "schedule", "one number or more"),
    ({"dataset": None}, "dataset is missing", "--dataset"),
    # types
    ("--batch_size many", "--batch_size", "whole number"),
    ("--DW maybe", "--DW", "0 or 1"),
    ("--lr 1e-3x", "--lr", "above 0"),
    ({"lr": "fast"}, "lr", "above 0", "config.yaml"),
    ({"batch_size": True}, "batch_size", "whole number"),
    ({"schedule": {"epochs": 3}}, "schedule", "a mapping"),
    ({"dataset": ["CIFAR100", "Icon_R"]}, "dataset", "one value"),
    # ranges
    ("--kd_alpha 1.5", "--kd_alpha", "from 0 to 1"),
    ("--kd_alpha nan", "--kd_alpha", "from 0 to 1"),
    ("--Soft_T 0", "--Soft_T", "above 0"),
    ("--Soft_T 1e200", "--Soft_T", "1e6"),
    ("--aux_loss_scale -1", "--aux_loss_scale", "at least 0"),
    ("--lr 0", "--lr", "above 0"),
    ("--momentum 1", "--momentum", "below 1"),
    ("--batch_size 0", "--batch_size", "at least 1"),
    ("--max_task 0", "--max_task", "-1 or", "at least 1"),
    ("--schedule 0", "--schedule", "at least 1"),
    ("--schedule 20 10", "--schedule", "increasing"),
    ("--crop_scale 0 1", "--crop_scale", "above 0"),
    ("--crop_scale 0.9 0.1", "--crop_scale", "smaller first"),
    ("--crop_scale 0.5", "--crop_scale", "2 numbers"),
    ("--first_split_size 201", "--first_split_size 201", "200 classes of Icon_R"),
    ("--other_split_size 500", "--other_split_size 500", "200 classes of Icon_R"),
    # prompt parameters
    ("--prompt_param 100 8", "--prompt_param of CODAPrompt", "3 values are needed", "100 8 0"),
    ("--prompt_param 100 7 0", "--prompt_param of CODAPrompt", "even", "8"),
    ("--prompt_param 9 8 0", "--prompt_param of CODAPrompt", "number of tasks, 10"),
    ("--prompt_param 100.5 8 0", "--prompt_param of CODAPrompt", "whole number"),
    ("--prompt_param 100 8 -1", "--prompt_param of CODAPrompt", "orthogonality weight", "0 or more"),
    ("--prompt_param a b c", "--prompt_param", "number"),
    ("--learner_name DualPrompt --other_split_size 5", "of DualPrompt", "number of tasks, 37"),
    ("--learner_name L2P --prompt_param 4 20 -1", "--prompt_param of L2P", "at least 5"),
    ("--learner_name L2P --prompt_param 30 20 3", "--prompt_param of L2P", "-1 (shallow) or 1 (deep)"),
    # KD methods and the two models
    ("--KD_method KD_Token --kd_prompt_param 0 6", "--kd_prompt_param", "at least 1"),
    ("--KD_method KD_Token --kd_prompt_param 5 6", "--kd_prompt_param", "1 to 4"),
    ("--KD_method KD_Token --kd_prompt_param 4 5", "--kd_prompt_param", "even"),
    ("--KD_method KD --kd_prompt_param 4 x", "--kd_prompt_param", "'x'"),
    ("--KD_method ReviewKD --t_model mini_vit_small --s_model mini_vit_base", "--t_model", "blocks", "6"),
    ("--t_model vit_base_patch16_224", "--t_model", "--s_model", "224 px", "64 px"),
    ("--KD_method FitNets --t_model vit_base_patch32_224 --s_model vit_small_patch16_224", "50", "197", "tokens"),
    ("--KD_method DKD --kd_param betta=8", "--kd_param of DKD", "no betta (did you mean beta?)", "alpha, beta, temp"),
    ("--KD_method DKD --kd_param beta=8 alpha=x", "--kd_param of DKD: alpha must be a number of at least 0", "'x'"),
    ("--KD_method KD --kd_param beta=8", "--kd_param of KD", "no parameters, so leave beta out"),
    ("--KD_method DKD --kd_param 8", "--kd_param must be name=value"),
    ({"KD_method": "DKD", "kd_param": {"beta": [8]}}, "--kd_param of DKD: beta must be"),
    # devices
    ("--gpuid 0", "--gpuid 0", "--gpuid -1"),
    ("--gpuid -2", "--gpuid", "-1 or"),
    ("--gpuid 0 0", "--gpuid", "all different"),
    ("--gpuid -1 0", "--gpuid -1 0", "cannot be combined"),
    ("--device cuda", "--device cuda", "--gpuid -1"),
    ("--device cpu --gpuid 0", "--device cpu", "exclude"),
    ("--accumulate 3", "--accumulate 3", "16", "2"),
    # paths
    ("--log_dir {tmp}/file/below", "--log_dir", "file/below", "Not a directory", "choose another"),
    ("--log_dir /proc/1/cdl", "--log_dir /proc/1/cdl cannot be used", "choose another"),
    (f"--log_dir {'x' * 300}", "--log_dir", "too long", "choose another"),
    ("--t_weights {tmp}/none.pth", "--t_weights", "no file"),
    ("--s_weights {tmp}", "--s_weights", "is a folder, not a file"),
    ("--init_from {tmp}/none", "--init_from", "no folder"),
    ("--data_url host/path", "--data_url", "http"),
    # instead of training
    ("--check_data --eval_only", "--check_data and --eval_only", "one of them"),
    ("--export student.onnx", "--export", ".safetensors or .pt2"),
    ("--predict {tmp}/none.png", "--predict", "no file or folder", "none.png"),
    # files
    ("--config {tmp}/none.yaml", "none.yaml does not exist"),
    ("--config {root}/configs/icon_r_prompt.yaml", f"did you mean --config {ICON_R}?"),
    ("--config /dev/zero", "/dev/zero is not a regular file", "YAML file"),
    (b"", "is empty", "configs/*.yaml"),
    (b"\x89PNG\r\n\x1a\n\0\0", "config.yaml", "YAML file"),
    (b"- lr\n- 1\n", "key: value"),
    (b"lr: 0.1\nlr: 0.2\n", "'lr' appears twice"),
    (b"random_s: 2024-99-99\n", "not valid YAML"),
    (b"[" * 30000, "not valid YAML"),
    (b"# " + b"x" * 40000, "larger than 32 KiB"),
    (b"lr: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    # positions
    ("", "follows no flag"),
]


def command(mistake: str | dict | bytes, tmp: Path) -> list[str]:
    """A command line with the mistake at its end or in its file."""
    keys = mistake if isinstance(mistake, dict) else {}
    text = yaml.safe_dump({**yaml.safe_load(ICON_R.read_text()), **keys}).encode()
    (tmp / "config.yaml").write_bytes(mistake if isinstance(mistake, bytes) else text)
    (tmp / "file").touch()
    flags = mistake.replace("{tmp}", str(tmp)).replace("{root}", str(ROOT)).split() if isinstance(mistake, str) else []
    right = ["--config", str(tmp / "config.yaml"), "--log_dir", str(tmp / "log")]
    right += [] if "--device" in flags else ["--gpuid", "-1"]
    return ["stray", *right] if mistake == "" else [*right, *flags]


def assert_refused(says: list[str], code: int, error: str, tmp: Path) -> None:
    assert code == 2, error
    lines = error.splitlines()
    assert lines and all(line.startswith("run.py: error: ") for line in lines), error
    assert any(all(word in line for word in says) for line in lines), error
    assert sorted(path.name for path in tmp.iterdir()) == ["config.yaml", "file"]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(check, "cuda_devices", lambda: 0)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize("case", BAD, ids=lambda case: str(case[0])[:40])
def test_refused(case, tmp_path, capsys, no_gpu):
    mistake, *says = case
    code = run.main(command(mistake, tmp_path))
    assert_refused(says, code, capsys.readouterr().err, tmp_path)


@pytest.mark.parametrize("case", BAD[:: len(BAD) // 3], ids=lambda case: str(case[0])[:40])
def test_refused_in_a_process_of_its_own(case, tmp_path):
    mistake, *says = case
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {"CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(ROOT / "run.py"), *command(mistake, tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert_refused(says, done.returncode, done.stderr, tmp_path)


def test_gpus_that_torch_cannot_use(tmp_path, capsys, monkeypatch):
    """The driver lists them, but torch is built for CPUs or for another driver."""
    monkeypatch.setattr(check, "cuda_devices", lambda: 100)
    monkeypatch.delenv("RANK", raising=False)
    code = run.main(command("--gpuid 98 99 --log_dir {tmp}/new", tmp_path))
    assert_refused(["--gpuid 98 99", "cannot use GPU 98 99", "--gpuid -1"], code, capsys.readouterr().err, tmp_path)


def test_a_folder_of_other_people(tmp_path, capsys, no_gpu, monkeypatch):
    error = PermissionError(13, "Permission denied", "/closed/data")
    monkeypatch.setattr(IconR, "missing", Mock(side_effect=error))
    code = run.main(command({}, tmp_path))
    assert_refused(["/closed/data: Permission denied"], code, capsys.readouterr().err, tmp_path)


def test_a_mistake_of_every_kind_is_reported_in_one_go(tmp_path, capsys, no_gpu):
    words = "--kd_alpha 2 --gpuid 0 --KD_method DCDL --t_model vit_bas_patch16_224 --prompt_param 1 --foo"
    assert run.main([*command({"lr": "fast", "batchsize": 3}, tmp_path), *words.split()]) == 2
    error = capsys.readouterr().err
    for word in ("lr in", "batchsize", *words.split()[::2], "--foo"):
        assert word in error


def test_no_arguments_say_what_is_missing(capsys):
    assert run.main([]) == 2
    assert "--config is missing" in capsys.readouterr().err


def test_missing_packages_say_where_they_are_or_how_to_install_them(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packages, "_PACKAGES", ("yaml", "no_such_package"))
    monkeypatch.setattr(packages, "_VENV", tmp_path / ".venv")
    for way_out in ("install_requirements.sh", "has them: source .venv/bin/activate"):
        assert run.main(["--config", str(ICON_R)]) == 2
        with pytest.raises(SystemExit, match="2"):
            report.main(["."])
        error = capsys.readouterr().err
        assert error.count("no_such_package") == error.count(way_out) == 2
        (tmp_path / ".venv/bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / ".venv/bin/activate").touch()


@pytest.mark.parametrize("flags", ["--eval_only", "--export a.pt2"])
def test_actions_on_a_run_need_its_folder(tmp_path, capsys, flags):
    assert run.main([*flags.split(), "--log_dir", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--help"], ["-h"], ["--lr", "x", "--help"]])
def test_help_needs_nothing_else(capsys, flags):
    assert run.main(flags) == 0
    text = capsys.readouterr().out
    assert "--kd_prompt_param" in text and "KD_Token" in text and "paper: 100 8 0" in text
    assert run.main(["--version"]) == 0 and capsys.readouterr().out.endswith(f" {run.__version__}\n")


@pytest.mark.parametrize("flags", ["--predict", "--export"])
def test_an_unclear_action_is_the_only_problem(flags, tmp_path, capsys):
    """What it would need besides is not known."""
    assert run.main([flags, "--log_dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("error:") == 1
