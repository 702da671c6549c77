"""The scripts in experiments/ call run.py as they say; a stub of Python writes down the calls."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from utils.checkpoint import RunFolder
from utils.config import OPTIONS, load_config

ROOT = Path(__file__).parents[1]
STUB = r"""#!/bin/sh
# A Python that writes its arguments down. A run gets finished unless it holds the word in FAIL.
[ "$1" = -c ] && [ -n "$2" ] && PYTHONPATH=$CODE exec "$REAL" "$@" # the check of all runs
[ "$2" = "${2%run.py}" ] && [ "$1" != -m ] && exit 0
text=$(printf '%s\n' "$@" "threads=${OMP_NUM_THREADS:-}" "in=$PWD")
printf '%s\n\n' "$text" >>"$CALLS" # in one piece: another run may write at the same time
[ "$1" = -m ] && exit 0
echo "bars of run.py"
for word; do
    [ "$last" = --log_dir ] && folder=$word
    [ "$word" = "${FAIL:-}" ] && exit "$CODE_OF_FAIL"
    last=$word
done
mkdir -p "$folder/Results" "$folder/models/task-1"
case " $* " in *" none "*) ;; *) : >"$folder/models/task-1/T_class.pth" ;; esac
printf '%s' "$MANIFEST" >"$folder/manifest.json"
printf '70.00\n61.25\n' >"$folder/Results/acc_s.csv"
"""


@pytest.fixture
def script(tmp_path):
    """Calls a script of experiments/ in a project with a space in its path, from another folder."""
    project, bin_dir = tmp_path / "my project", tmp_path / "env/bin"
    shutil.copytree(ROOT / "experiments", project / "experiments")
    shutil.copytree(ROOT / "configs", project / "configs")
    (project / "install_requirements.sh").write_text("exit 0\n")
    bin_dir.mkdir(parents=True)
    (bin_dir / "python").write_text(STUB)
    (bin_dir / "python").chmod(0o755)
    calls = tmp_path / "calls"
    folder = RunFolder(tmp_path / "finished")
    folder.commit({}, complete=True)
    manifest = (folder.root / "manifest.json").read_text()

    def call(name, *arguments, code=0, **environment):
        calls.write_text("")
        kept = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "CONDA_PREFIX")}
        done = subprocess.run(
            ["bash", str(project / "experiments" / name), *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={**kept, "VIRTUAL_ENV": str(tmp_path / "env"), "CALLS": str(calls), "CODE": str(ROOT),
                 "REAL": sys.executable, "MANIFEST": manifest, "CODE_OF_FAIL": "2", **environment},
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done, [block.split("\n") for block in calls.read_text().split("\n\n") if block]

    call.project = project
    return call


def flag(call, name, count=1):
    values = call[call.index(name) + 1 :][:count]
    return values[0] if count == 1 else values


@pytest.mark.parametrize("name, data, config", [
    ("cifar-100.sh", "cifar-100", "cifar-100_prompt.yaml"), ("imagenet-r.sh", "imagenet-r", "imnet-r_prompt.yaml")])
def test_one_run_of_the_paper(script, name, data, config):
    _, (call,) = script(name)
    assert flag(call, "--config") == str(script.project / "configs" / config)
    assert Path(flag(call, "--config")).exists()
    assert (flag(call, "--learner_name"), flag(call, "--KD_method")) == ("CODAPrompt", "KD_Token")
    assert flag(call, "--prompt_param", 3) == ["100", "8", "0.0"]
    assert flag(call, "--kd_prompt_param", 2) == ["12", "6"]
    assert (flag(call, "--t_model"), flag(call, "--s_model")) == ("vit_base_patch16_224", "vit_small_patch16_224")
    assert flag(call, "--log_dir") == str(script.project / "outputs" / data / "CODAPrompt" / "KD_Token")
    assert flag(call, "--dataroot") == str(script.project / "data")
    assert "--gpuid" not in call
    _, (call,) = script(name, "DualPrompt", "KD", "0", "1", "--", "--log_dir", "a b", "--random_s", "2")
    assert (flag(call, "--learner_name"), flag(call, "--KD_method")) == ("DualPrompt", "KD")
    assert flag(call, "--prompt_param", 3) == ["10", "20", "6"]
    assert flag(call, "--gpuid", 2) == ["0", "1"]
    assert call[call.index("--random_s") - 2 :][:4] == ["--log_dir", "a b", "--random_s", "2"]
    _, (call,) = script(name, "L2P", "--", "--lr", "0.1")
    assert flag(call, "--prompt_param", 3) == ["30", "20", "-1"] and flag(call, "--lr") == "0.1"
    assert (flag(call, "--KD_method"), "--gpuid" in call) == ("KD_Token", False)
    _, (call,) = script(name, "Mine", "none")
    assert "--prompt_param" not in call


def test_whole_table_of_a_data_set(script):
    _, calls = script("table.sh", "cifar-100")
    *runs, report = calls
    cells = {(flag(c, "--t_model"), flag(c, "--s_model"), flag(c, "--learner_name"), flag(c, "--KD_method"),
              tuple(flag(c, "--kd_prompt_param", 2)) if "--kd_prompt_param" in c else ()) for c in runs}
    assert len(runs) == len(cells) == 2 * 3 * 7
    assert ("vit_base_patch16_224", "vit_small_patch16_224", "L2P", "none", ()) in cells
    assert ("vit_large_patch16_224", "vit_base_patch16_224", "DualPrompt", "KD_Token", ("1", "6")) in cells
    assert all(("--batch_size" in c) == ("vit_large_patch16_224" in c) for c in runs)
    assert len({flag(c, "--log_dir") for c in runs}) == len(runs)
    assert report[:5] == ["-m", "utils.report", ".", "--out", "report"]
    assert report[-1] == f"in={script.project}/outputs/table/cifar-100"
    assert runs[0][-2] == "threads="


def test_any_part_of_the_table(script, tmp_path):
    options = ["imagenet-r", "--learners", "L2P", "CODAPrompt", "--kd", "KD", "KD_Token:12,6", "--pairs", "base-small",
               "--seeds", "4", "5", "--out", "my out", "--", "--gpuid", "-1", "--dataroot=a b"]
    done, calls = script("table.sh", *options)
    *runs, report = calls
    assert len(runs) == 2 * 2 * 2
    assert {flag(c, "--random_s") for c in runs} == {"4", "5"}
    assert flag(runs[2], "--log_dir") == str(tmp_path / "my out/base-small/L2P/KD_Token-12-6/seed-4")
    assert all(flag(c, "--gpuid") == "-1" and "--dataroot=a b" in c for c in runs)
    assert "bars of run.py" in done.stdout
    assert "base-small L2P KD, seed 4: accuracy 61.25 %" in done.stdout
    done, calls = script("table.sh", *options)
    assert len(calls) == 1 and calls[0][1] == "utils.report"  # all finished before
    assert done.stdout.count("finished before") == 8


def test_quickstart_table_runs_two_at_a_time(script):
    done, calls = script("quickstart_table.sh", "--learners", "L2P")
    *runs, report = calls
    assert len(runs) == 6 * 3
    assert {flag(c, "--random_s") for c in runs} == {"1", "2", "3"}
    assert all("--t_model" not in c and "--no_progress" in c and "threads=1" in c for c in runs)
    assert flag(next(c for c in runs if "KD_Token" in c), "--kd_prompt_param", 2) == ["4", "6"]
    assert "bars of run.py" not in done.stdout and done.stdout.count("accuracy 61.25 %") == 18
    assert report[-1].endswith("outputs/table/emoji-r")


def test_kd_methods_share_the_teacher(script, tmp_path):
    _, calls = script("table.sh", "emoji-r", "--learners", "L2P", "DualPrompt", "--out", "runs", "--seeds", "1", "2")
    runs = {(flag(c, "--learner_name"), flag(c, "--KD_method"), flag(c, "--random_s")): c for c in calls[:-1]}
    for (learner, method, seed), call in runs.items():
        if method in ("none", "KD"):  # no teacher, and the first that has one
            assert "--teacher_from" not in call
        else:
            assert flag(call, "--teacher_from") in {
                str(tmp_path / "runs/mini" / learner / other / f"seed-{seed}")
                for other in ("KD", "DKD", "FitNets", "ReviewKD")
            }


def test_failed_run_stops_the_table_but_not_the_report(script):
    done, calls = script("table.sh", "emoji-r", "--learners", "L2P", code=1, FAIL="DKD", CODE_OF_FAIL="1")
    assert [flag(c, "--KD_method") for c in calls[:-1]] == ["none", "KD", "DKD"]
    assert calls[-1][1] == "utils.report"
    assert "mini L2P DKD, seed 1 stopped with exit code 1" in done.stderr
    assert "started again with the same arguments" in done.stderr


def test_no_advice_to_start_a_refused_run_again(script):
    done, calls = script("table.sh", "emoji-r", "--learners", "L2P", code=1, FAIL="DKD")
    assert len(calls) == 4 and calls[-1][1] == "utils.report"
    assert "mini L2P DKD, seed 1 was refused" in done.stderr and "started again" not in done.stderr


EMOJI_L2P = ["emoji-r", "--learners", "L2P"]


@pytest.mark.parametrize("arguments, words", [
    ([], "first argument"), (["mnist"], "not 'mnist'"), (["emoji-r", "--pairs", "base-small"], "no pair for emoji-r"),
    (["cifar-100", "--seeds"], "--seeds needs a value"), (["cifar-100", "--seed", "1"], "unknown option --seed"),
    (["cifar-100", "--jobs", "0"], "--jobs must be"), (["emoji-r", "--jobs", "1", "2"], "--jobs 1 2: give one value"),
    (["emoji-r", "--out", "a", "b"], "--out a b: give one value"), (["emoji-r", "--out", ""], "--out '' is empty"),
    ([*EMOJI_L2P, "--kd", "none", "BOGUS"], "--kd: "),
    (["emoji-r", "--kd", "KD", "--learners", "Mine"], "--learners: "),
    ([*EMOJI_L2P, "--kd", "KD:4,6"], "--kd KD:4,6: KD takes no parameter"),
    ([*EMOJI_L2P, "--kd", "none", "KD_Token:4,x"], "--kd KD_Token:4,x: after the colon"),
    ([*EMOJI_L2P, "--kd", "none", "KD_Token:99,6"], "--kd: the first value (layers)"),
    (["emoji-r", "--seeds", "1", "x"], "--seeds x is no whole number"),
    ([*EMOJI_L2P, "--kd", "none", "--seeds", "1", "9" * 30], "--seeds "),
    ([*EMOJI_L2P, "--kd", "none", "--", "--lr", "x"], "--lr "),
    ([*EMOJI_L2P, "--out", "/dev/null/x"], "--out: /dev/null is a file"),
])
def test_mistakes(script, arguments, words):
    done, calls = script("table.sh", *arguments, code=2)
    assert words in done.stderr and done.stderr.count("\n") == 1 and not calls
    assert not (script.project / "outputs").exists()


@pytest.mark.parametrize("word", [
    "--log_dir", "--log_dir=x", "--random_s", "--repeat", "--learner_type", "--learner_name", "--prompt_param",
    "--KD_method", "--kd_prompt_param", "--t_model", "--s_model", "--config", "--dataset", "--teacher_from",
    "--overwrite", "--check_data", "--eval_only", "--export", "--predict",
])  # fmt: skip
def test_flags_that_the_table_sets_cannot_be_added(script, word):
    done, calls = script("table.sh", "emoji-r", "--", "--lr", "0.1", word, "1", code=2)
    assert f"table.sh: {word} cannot stand after --: " in done.stderr and done.stderr.count("\n") == 1 and not calls


def test_values_given_twice_count_once(script):
    _, calls = script("table.sh", "emoji-r", "--learners", "L2P", "L2P", "--kd", "none", "KD", "none",
                      "--seeds", "1", "1", "--jobs", "2")  # fmt: skip
    assert len(calls) == 2 + 1


def test_results_of_other_flags_are_not_handed_over(script, tmp_path):
    options = ["table.sh", *EMOJI_L2P, "--kd", "KD", "none", "--out", "runs", "--", "--schedule"]
    _, calls = script(*options, "1")
    folder = RunFolder(tmp_path / "runs/mini/L2P/none/seed-1")
    (run,) = [call for call in calls if "none" in call]
    settings = load_config(run[2 : run.index("threads=")]).to_yaml_dict()
    folder.commit({"args.yaml": json.dumps(settings).encode()}, complete=True)
    done, calls = script(*options, "1")
    assert len(calls) == 1 and done.stdout.count("finished before") == 2
    done, calls = script(*options, "2", code=2)
    assert not calls and done.stderr.count("\n") == 1 and "finished before" not in done.stdout
    assert "other settings (schedule [1] -> [2])" in done.stderr and "another --out" in done.stderr
    _, calls = script(*options, "1", "--max_task", "1", code=0)  # run.py itself knows whether it can go on
    assert [flag(call, "--KD_method") for call in calls[:-1]] == ["none"]


@pytest.mark.parametrize("name", ["cifar-100.sh", "imagenet-r.sh", "table.sh", "quickstart_table.sh"])
def test_help(script, name):
    done, calls = script(name, "--help")
    assert "bash experiments/" in done.stdout and "#" not in done.stdout and not calls


def test_options_of_the_scripts_are_options_of_run_py():
    text = "".join(path.read_text() for path in ROOT.glob("experiments/*.sh"))
    own = {"learners", "kd", "pairs", "seeds", "jobs", "out", "cell", "help", "tests", "standalone", "nproc"}
    assert set(re.findall(r"(?<![\w-])--(\w+)", text)) - own <= set(OPTIONS)
