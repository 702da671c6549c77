"""The scripts: their command lines, the set-up of an environment, and the paper's table."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import first_epochs, table
from tests.processes import ROOT
from utils.checkpoint import ARGS_END
from utils.logging import Progress, setup_logging
from utils.report.runs import find_runs

SCRIPTS = [*ROOT.glob("experiments/*.s*"), ROOT / "tests/run.sh", ROOT / ".ci/run", ROOT / "install_requirements.sh"]
STUB = r"""#!/bin/sh
# A Python that makes environments of itself, lists the packages in $INSTALLED, and prints its other calls.
case "$*" in
"-c import sys; "*) exit ${TOO_OLD:-0} ;;
-c*) ;;
-V) echo Python 3.8.1 ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip install -q --no-index "*) [ -z "${INSTALLED+set}" ] && [ -e "$0.complete" ] ;;
"-m pip list "*) echo "$INSTALLED" ;;
"-m pip install "*) echo "$@" && touch "$0.complete" && exit ${PIP_CODE:-0} ;;
*) printf '[%s]' "$@" && echo ;;
esac
"""


def call(script, *words, folder=None, shell=None, **environment):
    """Run a script with no environment active but the one in ``environment``."""
    active = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in active} | environment
    command = [shell or ("sh" if "install" in str(script) else "bash"), str(script), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def clone(tmp_path):
    """Call a script in a folder with a space in its name; the only Python is the stub."""
    for path in [*SCRIPTS, ROOT / "requirements.txt", ROOT / "tests/requirements.txt"]:
        target = tmp_path / "my project" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    system = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "CDPATH": str(tmp_path)}
    return lambda script, *words, **more: call(f"my project/{script}", *words, folder=tmp_path, **system, **more)


def test_syntax_and_help(clone, tmp_path):
    for script in SCRIPTS:
        assert subprocess.run(["sh" if "install" in script.name else "bash", "-n", script], check=False).returncode == 0
        if script.name not in ("_setup.sh", "install_requirements.sh"):
            done = clone(script.relative_to(ROOT), "--lr", "--help", SLURM_SUBMIT_DIR="my project")
            assert script.read_text().splitlines()[1] == "# " + done.stdout.splitlines()[0] and "#" not in done.stdout
    assert not (tmp_path / "my project/.venv").exists()


def test_set_up_is_done_once_and_repeated_after_an_interruption(clone, tmp_path):
    words, mark = ("experiments/quickstart.sh", "--log_dir", "a b"), tmp_path / "my project/.venv/set_up_incomplete"
    first, second = clone(*words), clone(*words)
    assert first.stdout.startswith("Making the environment") and first.stdout.endswith("[--log_dir][a b]\n"), first
    assert second.stdout.startswith("[-u]")
    mark.touch()
    failed = clone(*words, PIP_CODE="1")
    assert failed.returncode == 1 and "pip could not install" in failed.stderr and mark.exists()
    assert clone(*words).stdout.startswith("Making the environment") and not mark.exists()


def test_active_environment_is_used(clone, tmp_path):
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        done = clone("tests/run.sh", "-k", "a b", INSTALLED="", **{variable: str(tmp_path)})
        assert "tests/requirements.txt" in done.stdout and done.stdout.endswith("[-k][a b]\n"), done
    assert not (tmp_path / "my project/.venv").exists()


def test_tested_versions_are_installed_where_missing(clone):
    for installed, pins in {
        "": "torch==2.14.1 torchvision==0.29.1 timm==1.0.31",
        "numpy==1.0\ntorch==2.9.0+cpu": "torch==2.9.0+cpu timm==1.0.31",  # torchvision must fit the torch that stays
        "timm==1.0.9": "timm==1.0.9 torch==2.14.1 torchvision==0.29.1",
    }.items():
        done = clone("install_requirements.sh", INSTALLED=installed)
        assert done.stdout.endswith(f"-r my project/requirements.txt {pins}\n"), done
    assert "unknown argument --test;" in clone("install_requirements.sh", "--test").stderr
    assert "later is needed, not python (Python 3.8.1)" in clone("install_requirements.sh", TOO_OLD="1").stderr


def test_nothing_to_install_needs_no_network():
    environment = {"PYTHON": sys.executable, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9"}
    done = call(ROOT / "install_requirements.sh", "--tests", **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_runs_of_the_paper(clone):
    default = clone("experiments/cifar-100.sh").stdout
    assert "[--learner_name][CODAPrompt][--KD_method][KD_Token]" in default and "--gpuid" not in default
    assert "/my project/outputs/cifar-100/CODAPrompt/KD_Token]" in default
    other = clone("experiments/imagenet-r.sh", "L2P", "KD", "0", "1", "--", "--log_dir", "a b", shell="sh").stdout
    assert "[--ema_coeff][0.7]" in clone("experiments/cifar-100.sh", "APT").stdout and "--ema_coeff" not in default
    assert "[--learner_name][L2P][--KD_method][KD]" in other and other.endswith("[--gpuid][0][1][--log_dir][a b]\n")


def test_refused_arguments():
    for command, says in {
        "torchrun.sh 0": "number of processes",
        "torchrun.sh 1 --x": "flag --x",
        "cifar-100.sh L2P -- --x": "flag --x",
    }.items():
        script, *words = command.split()
        done = call(ROOT / "experiments" / script, *words, VIRTUAL_ENV=sys.prefix)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done


def test_a_slurm_job_that_queues_again_resumes(clone, tmp_path):
    for name, content in {"scontrol": "echo node", "srun": 'shift 3; exec "$@"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": "my project", "SLURM_JOB_NODELIST": "node", "SLURM_JOB_ID": "1", "PYTHON": "python"}
    for count, end in (("0", "[--overwrite][1]\n"), ("1", "[--overwrite][1][--overwrite][0]\n")):
        done = clone("experiments/slurm.sbatch", "--overwrite", "1", SLURM_RESTART_COUNT=count, **job)
        assert done.stdout.endswith(end), done


REFUSED = {
    "": "dataset",
    "icon-r --pairs mine": "'mine'",
    "icon-r --kd KD:4,6": "write --kd KD",
    "icon-r --kd none Mine": "Mine/seed-1: --KD_method",
    "icon-r --kd KD_Token:99,6": "KD_Token-99-6/seed-1: --KD_method KD_Token: --kd_prompt_param",
    "icon-r --kd none --out /dev/null/x": "/dev/null",
    "icon-r --check /dev/null": "--check: there is no run in /dev/null",
    "icon-r --kd none -- --lr x": "--lr",
    "icon-r --kd none -- --s_weights README.md": "none/seed-1: README.md",
    "icon-r -- --log_d=x": "--log_d=x cannot follow --: use --out",
    **{f"icon-r -- --lr 1 {flag}": f"{flag} cannot follow --" for flags in table.REFUSED.values() for flag in flags},
}


def test_refused_arguments_of_the_table(monkeypatch, capsys):
    monkeypatch.setattr(table.subprocess, "run", None)  # nothing may be started
    for command, message in REFUSED.items():
        with pytest.raises(SystemExit, match="2"):
            table.main(command.split())
        assert message in capsys.readouterr().err, command


def test_table_shares_teachers_and_stops_at_a_failure(monkeypatch, capsys, tmp_path):
    commands = []

    def start(command, **options):
        commands.append(command[command.index("--log_dir") + 1 :] if "--log_dir" in command else [command[2]])
        if "DKD" not in command and "--log_dir" in command:
            for name in ("Results/acc_s.csv", "models/task-1/T_class.pth"):
                (Path(commands[-1][0]) / name).parent.mkdir(parents=True)
                (Path(commands[-1][0]) / name).write_text("70.00\n61.25\n")
        return subprocess.CompletedProcess(command, 137 if "DKD" in command else 0)

    monkeypatch.setattr(table.subprocess, "run", start)
    assert table.main(["icon-r", "--learners", "L2P", "--out", str(tmp_path), "--kd", "KD", "DKD", "FitNets"]) == 1
    folders = [tmp_path / "mini/L2P" / name / "seed-1" for name in ("KD", "DKD")]
    assert commands == [[str(folders[0])], [str(folders[1]), "--teacher_from", str(folders[0])], ["utils.report"]]
    output = capsys.readouterr()
    assert f"{folders[0]}: accuracy 61.25 %\n1 of 3 runs done, about 0:00:00 left" in output.out
    assert f"{folders[1]} stopped with exit code 137: run the same command again to resume" in output.err


def test_table(tmp_path, capsys):
    out, kept = tmp_path / "table", tmp_path / "kept"
    command = f"icon-r --learners L2P --kd none KD --jobs 2 --check {kept} --out {out} -- --max_task 1".split()
    command += "--first_split_size 5 --other_split_size 5 --schedule".split()
    kept.mkdir()
    (kept / "none.json.gz").touch()  # damaged, so that no run is kept yet
    done = call(ROOT / "experiments/table.sh", *command, "1", VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 1 and done.stdout.count(": accuracy ") == 2 and "Task" not in done.stdout, done
    assert done.stdout.count("no run with these settings") == 2 and (out / "report/report.html").exists()
    cases = (("none", 0, False, "equals the kept"), ("KD", 4, False, ": +4.0"), ("KD", 2, True, ": +2.0"))
    for name, lower, within, says in cases:
        metrics = json.loads((out / f"mini/L2P/{name}/seed-1/Results/metrics.json").read_text())
        metrics["student"]["accuracy_matrix"][0][0] -= lower
        (kept / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(metrics).encode()))
        assert table.compare(find_runs([out])[0], find_runs([kept])[0]) == within
        assert says in capsys.readouterr().out
    assert table.main([*command, "1"]) == 0
    output = capsys.readouterr().out
    assert output.count("finished before") == 2 and ": +2.0" in output
    with pytest.raises(SystemExit):
        table.main([*command, "2"])
    assert "other settings" in capsys.readouterr().err


@pytest.fixture
def started(tmp_path):
    """A folder as a run leaves it that was stopped in the teacher's third epoch, after it repeated the second."""
    settings = "dataset: ImageNet_R\nbatch_size: 64\nlearner_name: CODAPrompt\nprompt_param: [100, 8, 0]\n"
    (tmp_path / "args.yaml").write_text(settings + "t_model: vit_base_patch16_224\n" + ARGS_END)
    setup_logging(tmp_path / "output.log")
    for loss, first in ((1.5, 0), (0.9, 1), (0.75, 1)):
        progress = Progress(False, 10, roles=("teacher", "student"))
        progress.start_training(0, "teacher", 35, first)
        progress.start_epoch(first, 1, 0.001)
        progress.step(64)
        progress.update(loss, 60.0)
        progress.end_epoch()
    setup_logging(None)
    return tmp_path


def test_first_epochs_are_beside_the_authors(started, capsys):
    first_epochs.main([str(started)])
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epoch 1: loss 1.5000 (1.656), train accuracy 60.00 % (56.155)"
    assert len(lines) == 2 and "loss 0.7500 (0.672)" in lines[1]


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("args.yaml", "64", "16", "ImageNet_R with --batch_size 32"),
        ("args.yaml", "CODAPrompt", "L2P", "CODAPrompt with --prompt_param 100 8 0"),
        ("output.log", "teacher", "student", "no epoch of a teacher"),
    ],
)
def test_first_epochs_of_other_runs_are_refused(started, capsys, file, old, new, says):
    (started / file).write_text((started / file).read_text().replace(old, new))
    with pytest.raises(SystemExit, match="2"):
        first_epochs.main([str(started)])
    assert says in capsys.readouterr().err
