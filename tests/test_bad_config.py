"""Configurations that cannot run: each is refused with one sentence, exit code 2 and nothing left behind."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

import run
from learners import check

ROOT = Path(__file__).parents[1]
EMOJI_R = ROOT / "configs" / "emoji-r_prompt.yaml"


@dataclass
class Bad:
    """A configuration with one mistake: flags added to a right command line, keys changed in a right file.

    Attributes:
        says: what the message must contain: where the mistake is, and the way out.
        text: replaces the whole file.
        flags: ``{tmp}`` is a folder with an empty file ``file`` in it, ``{root}`` the project's.
    """

    says: tuple[str, ...]
    flags: str = ""
    keys: dict = field(default_factory=dict)
    text: bytes | None = None


def flag(flags: str, *says: str) -> Bad:
    return Bad(says, flags=flags)


def key(keys: dict, *says: str) -> Bad:
    return Bad(says, keys=keys)


def file(text: bytes, *says: str) -> Bad:
    return Bad(says, text=text)


BAD = [
    # names
    flag("--learner_name dualprompt", "--learner_name", "Did you mean DualPrompt?"),
    flag("--KD_method KDToken", "--KD_method", "KD_Token"),
    flag("--dataset EmojiR", "--dataset", "Emoji_R", "CIFAR100"),
    flag("--t_model vit_bas_patch16_224", "--t_model", "did you mean vit_base_patch16_224?"),
    flag(f"--s_model {'9' * 5000}", "--s_model must be a model", "999..."),
    key({"t_model": "mini\nvit"}, "t_model", "must be a model"),
    flag("--t_model vit_base_patch16_224.augreg_in22k", "--t_model", "augreg_in21k"),
    # unknown flags and keys
    flag("--batchsize 8", "unknown flag --batchsize", "--batch_size"),
    flag("--qqqqqq", "unknown flag --qqqqqq", "--help"),
    flag("-lr 0.1", "unknown flag -lr", "--lr"),
    key({"batchsize": 8}, "unknown key 'batchsize'", "did you mean batch_size?"),
    key({3: 8}, "unknown key 3", "config.yaml"),
    key({"export": "a.pt2"}, "export", "on the command line"),
    # missing and superfluous values
    flag("--lr 0.1 0.2", "--lr", "takes one value", "2 values"),
    flag("--gpuid", "--gpuid", "-1"),
    flag("--overwrite", "--overwrite", "0 or 1"),
    flag("--predict", "--predict", "one image or more"),
    flag("--t_model=", "--t_model", "must be"),
    key({"lr": None}, "lr", "has no value"),
    key({"schedule": []}, "schedule", "one number or more"),
    key({"dataset": None}, "dataset is missing", "--dataset"),
    # types
    flag("--batch_size many", "--batch_size", "whole number"),
    flag("--DW maybe", "--DW", "0 or 1"),
    flag("--lr 1e-3x", "--lr", "above 0"),
    key({"lr": "fast"}, "lr", "above 0", "config.yaml"),
    key({"batch_size": True}, "batch_size", "whole number"),
    key({"schedule": {"epochs": 3}}, "schedule", "a mapping"),
    key({"dataset": ["CIFAR100", "Emoji_R"]}, "dataset", "one value"),
    # ranges
    flag("--kd_alpha 1.5", "--kd_alpha", "from 0 to 1"),
    flag("--kd_alpha nan", "--kd_alpha", "from 0 to 1"),
    flag("--Soft_T 0", "--Soft_T", "above 0"),
    flag("--aux_loss_scale -1", "--aux_loss_scale", "at least 0"),
    flag("--lr 0", "--lr", "above 0"),
    flag("--momentum 1", "--momentum", "below 1"),
    flag("--batch_size 0", "--batch_size", "at least 1"),
    flag("--max_task 0", "--max_task", "-1 or", "at least 1"),
    flag("--schedule 0", "--schedule", "at least 1"),
    flag("--schedule 20 10", "--schedule", "increasing"),
    flag("--crop_scale 0 1", "--crop_scale", "above 0"),
    flag("--crop_scale 0.9 0.1", "--crop_scale", "smaller first"),
    flag("--crop_scale 0.5", "--crop_scale", "2 numbers"),
    flag("--first_split_size 201", "--first_split_size 201", "200 classes of Emoji_R"),
    flag("--other_split_size 500", "--other_split_size 500", "200 classes of Emoji_R"),
    # prompt parameters
    flag("--prompt_param 100 8", "--prompt_param of CODAPrompt", "3 values are needed", "100 8 0"),
    flag("--prompt_param 100 7 0", "--prompt_param of CODAPrompt", "even", "8"),
    flag("--prompt_param 9 8 0", "--prompt_param of CODAPrompt", "number of tasks, 10"),
    flag("--prompt_param 100.5 8 0", "--prompt_param of CODAPrompt", "whole number"),
    flag("--prompt_param 100 8 -1", "--prompt_param of CODAPrompt", "orthogonality weight", "0 or more"),
    flag("--prompt_param a b c", "--prompt_param", "number"),
    flag("--learner_name DualPrompt --other_split_size 5", "of DualPrompt", "number of tasks, 37"),
    flag("--learner_name L2P --prompt_param 4 20 -1", "--prompt_param of L2P", "at least 5"),
    flag("--learner_name L2P --prompt_param 30 20 3", "--prompt_param of L2P", "-1 (shallow) or 1 (deep)"),
    # KD methods and the two models
    flag("--KD_method KD_Token --kd_prompt_param 0 6", "--kd_prompt_param", "at least 1"),
    flag("--KD_method KD_Token --kd_prompt_param 5 6", "--kd_prompt_param", "1 to 4"),
    flag("--KD_method KD_Token --kd_prompt_param 4 5", "--kd_prompt_param", "even"),
    flag("--KD_method KD --kd_prompt_param 4 x", "--kd_prompt_param", "'x'"),
    flag("--KD_method ReviewKD --t_model mini_vit_small --s_model mini_vit_base", "--t_model", "blocks", "6"),
    flag("--t_model vit_base_patch16_224", "--t_model", "--s_model", "224 px", "64 px"),
    flag("--KD_method FitNets --t_model vit_base_patch32_224 --s_model vit_small_patch16_224", "50", "197", "tokens"),
    # devices
    flag("--gpuid 0", "--gpuid 0", "--gpuid -1"),
    flag("--gpuid -2", "--gpuid", "-1 or"),
    flag("--gpuid 0 0", "--gpuid", "no two equal"),
    flag("--gpuid -1 0", "--gpuid -1 0", "stands alone"),
    flag("--device cuda", "--device cuda", "--gpuid -1"),
    flag("--device cpu --gpuid 0", "--device cpu", "exclude"),
    flag("--accumulate 3", "--accumulate 3", "16", "2"),
    # paths
    flag("--log_dir {tmp}/file/below", "--log_dir", "is a file"),
    flag("--log_dir /proc/1/cdl", "--log_dir", "cannot be written"),
    flag(f"--log_dir {'x' * 300}", "--log_dir", "too long"),
    flag("--t_weights {tmp}/none.pth", "--t_weights", "no file"),
    flag("--s_weights {tmp}", "--s_weights", "is a folder, not a file"),
    flag("--init_from {tmp}/none", "--init_from", "no folder"),
    flag("--data_url host/path", "--data_url", "http"),
    # instead of training
    flag("--check_data --eval_only", "--check_data and --eval_only", "one of them"),
    flag("--export student.onnx", "--export", ".safetensors or .pt2"),
    flag("--export {tmp}/none/../file/s.pt2", "--export"),
    flag("--predict {tmp}/none.png", "--predict", "no file", "none.png"),
    # files
    flag("--config {tmp}/none.yaml", "none.yaml does not exist"),
    flag("--config {root}/configs/emoji_r_prompt.yaml", f"did you mean --config {EMOJI_R}?"),
    flag("--config /dev/zero", "/dev/zero", "YAML file"),
    file(b"", "is empty", "configs/*.yaml"),
    file(b"\x89PNG\r\n\x1a\n\0\0", "config.yaml", "YAML file"),
    file(b"- lr\n- 1\n", "key: value"),
    file(b"lr: 0.1\nlr: 0.2\n", "'lr' is there twice"),
    file(b"random_s: 2024-99-99\n", "not valid YAML"),
    file(b"[" * 30000, "not valid YAML"),
    file(b"# " + b"x" * 40000, "larger than 32 KiB"),
    file(b"lr: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    # positions
    flag("", "follows no flag"),
]


def command(bad: Bad, tmp: Path) -> list[str]:
    """The command line of a case: a right one, with its mistake at the end."""
    path = tmp / "config.yaml"
    if bad.text is not None:
        path.write_bytes(bad.text)
    else:
        path.write_text(yaml.safe_dump({**yaml.safe_load(EMOJI_R.read_text()), **bad.keys}))
    (tmp / "file").touch()
    right = ["--config", str(path), "--log_dir", str(tmp / "log"), "--gpuid", "-1"]
    if "--device" in bad.flags:
        right = right[:-2]
    mistake = [word.replace("{tmp}", str(tmp)).replace("{root}", str(ROOT)) for word in bad.flags.split()]
    return [*right, *mistake] if mistake or bad.keys or bad.text is not None else ["stray", *right]


def assert_refused(bad: Bad, code: int, error: str, tmp: Path) -> None:
    assert code == 2, error
    lines = error.splitlines()
    assert lines and all(line.startswith("run.py: error: ") for line in lines), error
    assert any(all(word in line for word in bad.says) for line in lines), error
    assert sorted(path.name for path in tmp.iterdir()) == ["config.yaml", "file"]


def name_of(bad: Bad) -> str:
    return bad.flags or str(bad.keys or bad.text or "stray")[:40]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(check, "cuda_devices", lambda: 0)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize("bad", BAD, ids=name_of)
def test_refused(bad, tmp_path, capsys, no_gpu):
    code = run.main(command(bad, tmp_path))
    assert_refused(bad, code, capsys.readouterr().err, tmp_path)


@pytest.mark.parametrize("bad", BAD[:: len(BAD) // 3], ids=name_of)
def test_refused_in_a_process_of_its_own(bad, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("RANK", None)
    words = [sys.executable, str(ROOT / "run.py"), *command(bad, tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert_refused(bad, done.returncode, done.stderr, tmp_path)


def test_a_mistake_of_every_kind_is_reported_in_one_go(tmp_path, capsys, no_gpu):
    bad = key({"lr": "fast", "batchsize": 3})
    words = "--kd_alpha 2 --gpuid 0 --KD_method KDP --t_model vit_bas_patch16_224 --prompt_param 1 --foo"
    assert run.main([*command(bad, tmp_path), *words.split()]) == 2
    error = capsys.readouterr().err
    for word in ("lr in", "batchsize", *words.split()[::2], "--foo"):
        assert word in error


def test_no_arguments_say_what_is_missing(capsys):
    assert run.main([]) == 2
    error = capsys.readouterr().err
    assert "--config is missing" in error and "--log_dir is missing" in error


def test_missing_packages_say_how_to_install_them(monkeypatch, capsys):
    monkeypatch.setattr(check, "_PACKAGES", ("yaml", "no_such_package"))
    assert run.main(["--config", str(EMOJI_R)]) == 2
    error = capsys.readouterr().err
    assert "no_such_package" in error and "install_requirements.sh" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", ["--eval_only", "--export a.pt2"])
def test_actions_on_a_run_need_its_folder(tmp_path, capsys, flags):
    assert run.main(flags.split()) == 2
    assert "--log_dir is missing: give the folder of a finished run" in capsys.readouterr().err
    assert run.main([*flags.split(), "--log_dir", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--help"], ["-h"], ["--lr", "x", "--help"]])
def test_help_needs_nothing_else(capsys, flags):
    assert run.main(flags) == 0
    text = capsys.readouterr().out
    assert "--kd_prompt_param" in text and "KD_Token" in text and "paper: 100 8 0" in text


@pytest.mark.parametrize("flags", ["--predict", "--export"])
def test_an_unclear_action_is_the_only_problem(flags, tmp_path, capsys):
    """What it would need besides is not known."""
    assert run.main([flags, "--log_dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("error:") == 1
