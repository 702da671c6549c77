"""Run the paper's table for one data set; ``bash experiments/table.sh --help`` explains the options."""

import argparse
import itertools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for python experiments/table.py

from dataloaders.loader import require_images
from dataloaders.tasks import build_stream
from learners.build import load_backbones
from learners.check import load_checked_config
from learners.distillers import DISTILLERS
from utils.checkpoint import RunFolderError, check_settings, is_finished
from utils.config import ConfigError
from utils.logging import duration, setup_logging
from utils.report.runs import Run, find_runs
from utils.report.table import METHODS

LIMIT = 3.0  # points of accuracy by which rounding on another machine may change a run; seeds rarely differ by more
LEARNERS = {"CODAPrompt": [], "DualPrompt": [], "L2P": [], "APT": ["--ema_coeff", "0.7"]}  # flags as in the paper
PAPER = {"kd": [*METHODS, "KD_Token:1,6", "KD_Token:12,6"], "pairs": ["base-small", "large-base"]}
# A student of width 96 has no more than 96 orthogonal components, and four blocks.
MINI = {
    "kd": [*METHODS, "KD_Token:1,6", "KD_Token:4,6"],
    "pairs": ["mini"],
    "flags": {"CODAPrompt": ["--prompt_param", "50", "8", "0"]},
}
DATASETS = {
    "cifar-100": {"config": "configs/cifar-100_prompt.yaml", **PAPER},
    "imagenet-r": {"config": "configs/imnet-r_prompt.yaml", **PAPER},
    "icon-r": {"config": "configs/icon-r_prompt.yaml", **MINI},
    "folder": {"config": "configs/folder.yaml", **MINI},
}
PAIRS = {
    "base-small": "--t_model vit_base_patch16_224 --s_model vit_small_patch16_224",
    "large-base": "--t_model vit_large_patch16_224 --s_model vit_base_patch16_224 --batch_size 32",
    "mini": "--t_model mini_vit_base --s_model mini_vit_small",
}
# What to use instead -> flags of run.py that the table sets for each run, or that train nothing.
REFUSED = {
    "--learners": ["--learner_type", "--learner_name", "--prompt_param"],
    "--kd": ["--KD_method", "--kd_prompt_param", "--teacher_from"],
    "--pairs": ["--t_model", "--s_model"],
    "--seeds": ["--random_s", "--repeat"],
    "--out": ["--log_dir", "--overwrite"],
    "DATASET": ["--config", "--dataset"],
    "run.py itself": ["--check_data", "--eval_only", "--export", "--predict"],
}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line into the options, with defaults filled in, and the flags that are added to each run."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser("table.sh", usage="bash experiments/table.sh --help", allow_abbrev=False)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--learners", nargs="+", default=[*LEARNERS])
    parser.add_argument("--kd", nargs="+")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", type=Path, nargs="?", const=ROOT / "experiments/results")
    options, more = parser.parse_args(argv[:split]), argv[split + 1 :]
    dataset = DATASETS[options.dataset]
    options.kd, options.pairs = options.kd or dataset["kd"], options.pairs or dataset["pairs"]
    options.out = (options.out or ROOT / "outputs/table" / options.dataset).absolute()
    for method in options.kd:
        if ":" in method and method.partition(":")[0] in METHODS:
            parser.error(f"--kd {method}: this method takes no parameter, write --kd {method.partition(':')[0]}")
    try:
        options.kept = find_runs([options.check])[0] if options.check else []
    except ValueError as error:
        parser.error(f"--check: {error}")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    for flag, (instead, refused) in itertools.product(more, REFUSED.items()):
        if flag.startswith("--") and any(name.startswith(flag.partition("=")[0]) for name in refused):  # or shortened
            parser.error(f"{flag} cannot follow --: use {instead} for that")
    return options, more


def list_runs(options: argparse.Namespace, more: list[str]) -> dict[Path, list[str]]:
    """List all runs of the table: folder -> flags, without the teacher."""
    runs, dataset = {}, DATASETS[options.dataset]
    # All learners come before the next method: with several jobs its teachers are trained by then.
    for seed, pair, kd, learner in itertools.product(options.seeds, options.pairs, options.kd, options.learners):
        method, *param = kd.replace(":", ",").split(",")
        folder = options.out / pair / learner / "-".join([method, *param]) / f"seed-{seed}"
        flags = ["--config", str(ROOT / dataset["config"]), "--dataroot", str(ROOT / "data")]
        flags += ["--learner_type", "prompt", "--learner_name", learner, *PAIRS[pair].split(), "--random_s", str(seed)]
        flags += [*LEARNERS.get(learner, []), *dataset.get("flags", {}).get(learner, []), "--KD_method", method]
        flags += ["--kd_prompt_param", *param] if param else []
        runs[folder] = [*flags, "--log_dir", str(folder), *more]
    return runs


def check(runs: dict[Path, list[str]]) -> dict[Path, list[str]]:
    """Check all runs, with their data and weights, and return the unfinished ones; exit if any would be refused.

    What can be downloaded is downloaded here.
    """
    problems, unfinished, complete = {}, {}, set()
    for folder, flags in runs.items():
        try:
            config = load_checked_config(flags)
            check_settings(config)
            if is_finished(config):
                print(f"{folder}: finished before")
                continue
            unfinished[folder] = flags
            models = (config.teacher_model, config.teacher_weights, config.student_model, config.student_weights)
            needed = (config.data, DISTILLERS[config.distill.method].needs_teacher, *models)
            if needed not in complete:
                size = load_backbones(config)["student"].vit.image_size
                require_images(build_stream(config.data, seed=config.seed, image_size=size))
                complete.add(needed)
        except (ConfigError, RunFolderError) as error:
            problems = {**dict.fromkeys(getattr(error, "problems", [str(error)]), folder), **problems}
    for problem, folder in problems.items():
        print(f"table.sh: {folder}: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)
    return unfinished


def shared_teacher(folder: Path) -> list[str]:
    """The ``--teacher_from`` that names the run with this learner and seed that has trained most of the teacher."""
    others = [other for other in folder.parents[1].glob(f"*/{folder.name}") if other != folder]
    tasks = {other: len(list(other.glob("models/*/T_class.pth"))) for other in others}
    best = max(tasks, key=tasks.__getitem__, default=None)
    return ["--teacher_from", str(best)] if best and tasks[best] and folder.parent.name != "none" else []


def execute(folder: Path, flags: list[str], quiet: bool) -> bool:
    """Execute one run, print how it ended, and return whether it succeeded."""
    command = [sys.executable, "-u", str(ROOT / "run.py"), *flags, *shared_teacher(folder)]
    code = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None, check=False).returncode
    if code == 0:
        print(f"{folder}: accuracy {(folder / 'Results/acc_s.csv').read_text().split()[-1]} %")
    else:
        advice = "correct what is said above first" if code == 2 else "run the same command again to resume"
        print(f"table.sh: {folder} stopped with exit code {code}: {advice}", file=sys.stderr)
    return code == 0


def compare(runs: list[Run], kept: list[Run]) -> bool:
    """Print how ``runs`` differ from those that are ``kept``; return whether all are kept and within the limit."""
    others, within = {run.identity: run for run in kept}, True
    for run in runs:
        if (other := others.get(run.identity)) is None:
            says, within = "no run with these settings and this seed is kept", False
        elif run.models == other.models:
            says = "every accuracy equals the kept run's"
        else:
            difference = run.accuracy - other.accuracy
            within &= abs(difference) <= LIMIT
            says = f"accuracy {run.accuracy:.2f} %, kept {other.accuracy:.2f} %: {difference:+.2f}"
        print(f"{run.folder}: {says}")
    return within


def main(argv: list[str]) -> int:
    """Run the table of a command line; return the exit code."""
    options, more = parse(argv)
    if quiet := options.jobs > 1:  # runs with progress bars, or with a thread for every core, disturb one another
        more.append("--no_progress")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    setup_logging(None)
    runs = check(list_runs(options, more))
    stopped, started, ended = threading.Event(), time.monotonic(), itertools.count(1)

    def work(folder: Path) -> None:
        if stopped.is_set():
            return
        if not execute(folder, runs[folder], quiet):
            stopped.set()
        elif left := len(runs) - (done := next(ended)):
            seconds = (time.monotonic() - started) / done * left
            print(f"{done} of {len(runs)} runs done, about {duration(seconds)} left")

    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"table.sh: --out {options.out} cannot be used ({error.strerror}); choose another", file=sys.stderr)
        sys.exit(2)
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            list(pool.map(work, runs))
        except KeyboardInterrupt:  # the runs get it as well, and save
            stopped.set()
    # From the folder of the runs, so that the report names them relative to it.
    command = [sys.executable, "-m", "utils.report", ".", "--out", "report"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    code = subprocess.run(command, cwd=options.out, env=os.environ | {"PYTHONPATH": paths}, check=False).returncode
    if stopped.is_set() or code:
        return 1
    return int(not compare(find_runs([options.out])[0], options.kept)) if options.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
