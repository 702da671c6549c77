"""``--repeat n``: the same run with several seeds, and the mean of their results."""

import json
import logging
from collections.abc import Callable

from utils.checkpoint import METRICS, RunFolder, RunFolderError
from utils.config import Config
from utils.metrics import MEASURES, aggregate
from utils.parallel import is_main_process

SUMMARY = "repeat.json"

_log = logging.getLogger(__name__)


def run_repeats(config: Config, train: Callable[[Config], int]) -> int:
    """Run seeds ``seed … seed + repeat - 1`` into ``log_dir/seed-<s>/``, then write and log the measures over them.

    Each is resumed by itself; the first that stops ends the call with its exit code.
    """
    seeds = range(config.seed, config.seed + config.repeat)
    for seed in seeds:
        if code := train(config.for_seed(seed)):
            return code
    try:
        if is_main_process():
            _summarize(RunFolder(config.log_dir), seeds)
    except RunFolderError as error:
        _log.error("%s", error)
        return 1
    return 0


def discard_summary(config: Config) -> None:
    """Remove measures and pictures over seeds that a new run of one of them, ``config``, makes outdated."""
    for name in (SUMMARY, "accuracy.png", "accuracy.pdf") if config.log_dir.name == f"seed-{config.seed}" else ():
        (config.log_dir.parent / name).unlink(missing_ok=True)


def _summarize(folder: RunFolder, seeds: range) -> None:
    runs = [folder.read_json(f"seed-{seed}/{METRICS}") for seed in seeds]
    summary = {role: aggregate([run[role] for run in runs]) for role in ("teacher", "student") if runs[0][role]}
    text = json.dumps({"seeds": list(seeds), **summary}, indent=1, sort_keys=True) + "\n"
    from utils import plots  # here, as it loads matplotlib

    for name, picture in plots.draw_repeat(runs).items():
        folder.write(name, picture)
    folder.write(SUMMARY, text.encode())
    _log.info("\n%d seeds (%d to %d), mean ± standard deviation:", len(runs), seeds[0], seeds[-1])
    for role, measures in summary.items():
        for name, words in MEASURES.items():
            value = measures[name]
            spread = "" if value["std"] is None else f" ± {value['std']:.2f}"
            _log.info("%-8s %-32s %7.2f%s", role, words, value["mean"], spread)
