"""The commands that the project documents: its configurations, the README's command lines, the scripts."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from learners import check
from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from utils.config import OPTIONS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
SCRIPTS = [
    *sorted(ROOT.glob("experiments/*.sh")),
    *(ROOT / name for name in ("tests/run.sh", ".ci/run", "install_requirements.sh")),
]


@pytest.fixture
def well_equipped(monkeypatch):
    """A machine with two GPUs, all data and all weights, in the project's folder."""
    monkeypatch.setattr(check, "cuda_devices", lambda: 2)
    monkeypatch.setattr(check, "preflight", lambda *arguments: [])
    monkeypatch.setattr(check, "missing_weights", lambda *model: None)
    monkeypatch.setattr(check, "_path_problems", lambda config: [])
    monkeypatch.chdir(ROOT)


def documented_commands() -> list[str]:
    """Every ``python run.py`` command line in the README, the configurations and the scripts' comments."""
    commands = []
    for path in [ROOT / "README.md", *CONFIGS]:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        text = re.sub(r"^# ?", "", text, flags=re.M)
        text = re.sub(r"\\\n\s*", "", text)
        commands += re.findall(r"^[ $]*(python[0-9.]* (?:-u )?run\.py [^\n#]+)", text, flags=re.M)
    return commands


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_are_right(path, well_equipped):
    config = check.load_checked_config(["--config", str(path), "--log_dir", "unused"])
    assert config.dataset and config.epochs >= 1


def test_configs_of_the_paper_are_the_papers(well_equipped):
    for name, classes, epochs in (("cifar-100", 10, 20), ("imnet-r", 20, 35)):
        config = check.load_checked_config(["--config", f"configs/{name}_prompt.yaml", "--log_dir", "unused"])
        assert (config.first_split_size, config.other_split_size, config.epochs) == (classes, classes, epochs)
        assert (config.batch_size, config.lr, config.optimizer) == (64, 1e-3, "Adam")
        assert (config.aux_loss_scale, config.crop_scale, config.kd_prompt_param) == (2, (0.08, 1), (12, 6))


def test_the_readmes_tables_are_the_programs():
    learners = [
        f"| `{name}` | {', '.join(field.label for field in PROMPTS[name].fields)} | {PROMPTS[name].paper_text()} |"
        for name in PROMPTS
    ]
    methods = [f"| `{name}` | {DISTILLERS[name].about} |" for name in DISTILLERS]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for table in (learners, methods):
        assert "\n".join(table) in readme, "README.md must say:\n" + "\n".join(table)


def test_configs_hold_known_keys_once():
    for path in CONFIGS:
        assert set(yaml.safe_load(path.read_text())) <= set(OPTIONS)


def test_configs_show_a_command():
    assert len(documented_commands()) >= len(CONFIGS)


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_right(command, well_equipped):
    words = shlex.split(command)
    arguments = words[words.index("run.py") + 1 :]
    if "--help" in arguments:
        return
    if {"--eval_only", "--export", "--predict"} & set(arguments):
        # These read the settings of a run that is not there.
        arguments += ["--config", str(ROOT / "configs/emoji-r_prompt.yaml")]
    check.load_checked_config(arguments)


def test_the_papers_command_is_right_as_it_stands(well_equipped):
    command = (
        "--config configs/imnet-r_prompt.yaml --gpuid 0 1 --learner_type prompt --learner_name CODAPrompt"
        " --prompt_param 100 8 0.0 --log_dir ImageNet_R/coda-p --t_model 'vit_base_patch16_224'"
        " --s_model 'vit_small_patch16_224' --KD_method 'KD_Token' --kd_prompt_param 12 6"
    )
    config = check.load_checked_config(shlex.split(command))
    assert (config.gpuid, config.kd_method, str(config.log_dir)) == ((0, 1), "KD_Token", "ImageNet_R/coda-p")


# ------------------------------------------------------------------------------------------------- scripts

STUB = r"""#!/bin/sh
# A Python that says what it is asked to do instead of doing it.
home=$(dirname "$0")
case "$1 $2" in
"-c "*) exit 0 ;;
"- "*) exec {python} "$@" ;;
"-m venv") mkdir -p "$3/bin" && cp "$home/python" "$3/bin/python" ;;
"-m pip" | "-m ensurepip") echo "called: $*" >>"$home/log" ;;
*) printf 'called:'; printf ' [%s]' "$@"; echo ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """The scripts in a folder with a space in its name, and a stub of Python on the PATH."""
    folder = tmp_path / "my project"
    for script in SCRIPTS:
        target = folder / script.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(script, target)
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(STUB.replace("{python}", shlex.quote(sys.executable)))
    stub.chmod(0o755)
    shutil.copy(stub, stub.parent / "python3")
    return folder


def run(clone: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script from another folder, without stdin, with only the stub as Python."""
    active = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON")
    system = {name: value for name, value in os.environ.items() if name not in active}
    system["PATH"] = f"{clone.parent / 'bin'}:/usr/bin:/bin"
    script, *rest = words
    return subprocess.run(
        ["bash", str(clone / script), *rest], cwd=clone.parent, env={**system, **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    shell = "sh" if script.name == "install_requirements.sh" else "bash"
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_quickstart_makes_an_environment_and_passes_flags_on(clone):
    done = run(clone, "experiments/quickstart.sh", "--random_s", "2", "--log_dir", "a b")
    assert done.returncode == 0, done.stderr
    assert (clone / ".venv/bin/python").exists()
    call = done.stdout.splitlines()[-1]
    assert f"[-u] [{clone}/run.py] [--config] [{clone}/configs/emoji-r_prompt.yaml]" in call
    assert call.endswith("[--random_s] [2] [--log_dir] [a b]")


def test_second_run_makes_nothing(clone):
    run(clone, "experiments/quickstart.sh")
    (clone / ".venv/mark").touch()
    done = run(clone, "experiments/quickstart.sh")
    assert done.returncode == 0 and "Making" not in done.stdout
    assert (clone / ".venv/mark").exists()


@pytest.mark.parametrize("damage", ["empty", "no interpreter", "half a package"])
def test_interrupted_set_up_is_mended(clone, damage):
    venv = clone / ".venv"
    if damage == "empty":
        venv.mkdir()
    else:
        run(clone, "experiments/quickstart.sh")
        (venv / "mark").touch()
        if damage == "no interpreter":
            (venv / "bin/python").unlink()
        else:
            half = venv / "half.dist-info"
            half.mkdir()
            stub = venv / "bin/python"
            # The stub's site-packages are those of the running interpreter: look in this folder instead.
            code = f"import site; site.getsitepackages = lambda: [{str(venv)!r}]"
            (venv / "sitecustomize.py").write_text(code)
            stub.write_text(f"#!/bin/sh\nPYTHONPATH={shlex.quote(str(venv))} exec {sys.executable} \"$@\"\n")
    done = run(clone, "experiments/quickstart.sh")
    assert done.returncode == 0, done.stderr
    assert "Making the environment" in done.stdout
    assert not (venv / "mark").exists()


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_active_environment_is_used(clone, variable):
    done = run(clone, "experiments/quickstart.sh", **{variable: str(clone.parent)})
    assert done.returncode == 0, done.stderr
    assert not (clone / ".venv").exists()


def test_tests_are_run_with_arguments(clone):
    done = run(clone, "tests/run.sh", "-k", "a b", "tests/utils")
    assert done.stdout.splitlines()[-1] == "called: [-m] [pytest] [-k] [a b] [tests/utils]"


def test_checks_are_tests_then_lint(clone):
    done = run(clone, ".ci/run")
    calls = [line for line in done.stdout.splitlines() if line.startswith("called:")]
    assert calls == ["called: [-m] [pytest]", "called: [-m] [ruff] [check] [.]"]


def test_only_missing_packages_are_installed(clone, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(
        "from importlib import metadata\n"
        "have = {'torch': '2.9.0+cpu', 'numpy': '1.0', 'timm': '1.0.31', 'PyYAML': '6.0.1'}\n"
        "def version(name):\n"
        "    if name not in have:\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return have[name]\n"
        "metadata.version = version\n"
    )
    done = run(clone, "install_requirements.sh", PYTHONPATH=str(bare))
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "bin/log").read_text().splitlines()[-1].split()
    assert "torchvision>=0.19" in asked  # must fit the torch that stays
    assert "torch==2.9.0+cpu" in asked and "timm==1.0.31" in asked
    assert "numpy>=1.24" in asked and "Pillow>=9.4" in asked


def test_old_python_is_refused_in_one_sentence(clone, tmp_path):
    stub = tmp_path / "bin" / "python"
    stub.write_text("#!/bin/sh\n[ \"$1\" = -V ] && echo Python 3.8.1\n[ \"$2\" = '' ]\n")
    done = run(clone, "install_requirements.sh")
    assert done.returncode == 1
    assert "Python 3.8.1 is too old; activate an environment with Python 3.10 or later" in done.stderr
