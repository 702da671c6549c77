"""Settings that cannot work together, found before any work and without importing torch.

``utils.config`` judges each value by itself. Here they are judged together, against the tables of learners, KD methods
and data sets, and against the machine: its devices, folders, data and weights.
"""

import ctypes
import dataclasses
import importlib.util
import logging
import os
from collections.abc import Collection, Sequence

from dataloaders import DATASETS
from learners.distillers import DISTILLERS, ModelPair
from models.prompts import PROMPTS
from models.sizes import ViTSize, known_size, name_problem
from utils.config import OPTIONS, Config, ConfigError, DistillConfig, argument_parser, parse_config
from utils.packages import missing_packages

_log = logging.getLogger(__name__)

_TABLES = {"learner_name": PROMPTS, "KD_method": DISTILLERS, "dataset": DATASETS}


def load_checked_config(argv: Sequence[str]) -> Config:
    """The configuration of a command line, with the parameters of pool and KD method filled in, ready to run.

    A ConfigError has every problem of the flags, the file and their combination.
    """
    if problem := missing_packages():
        raise ConfigError(problem)
    parsed = parse_config(argv)
    config = parsed.config()
    if problems := parsed.problems + check(config, parsed.invalid_keys):
        raise ConfigError(problems)
    gpus = len(config.gpuid or ())
    if gpus > 1 and "aux_loss_scale" not in parsed.values and config.action == "train":
        reason = "prompt and feature losses are averaged over GPUs, where the original adds them up"
        _log.warning("%s: for its numbers use --aux_loss_scale %d", reason, gpus)
    if config.prompt_param is None:
        config = dataclasses.replace(config, prompt_param=PROMPTS[config.learner_name].paper)
    distill, _ = DISTILLERS[config.distill.method].complete(config.distill)
    return dataclasses.replace(config, distill=distill)


def check(config: Config, invalid: Collection[str] = ()) -> list[str]:
    """One sentence for each thing that cannot work, but none about ``invalid`` keys, which hold a default instead."""
    problems = []
    if len(config.actions) > 1:
        asked = " and ".join(f"--{action}" for action in config.actions)
        problems.append(f"{asked} exclude each other: give one of them")
    if not {"gpuid", "device"} & set(invalid):
        problems += _device_problems(config) + _process_problems(config)
    if not {"gpuid", "batch_size", "accumulate"} & set(invalid):
        problems += _batch_problems(config)
    problems += _path_problems(config)
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            problems.append(f"--{name} needs a package that is missing: pip install {name}")
    for flag, table in _TABLES.items():
        try:
            if (name := OPTIONS[flag].value(config)) is not None:
                table[name]
        except ValueError as error:
            problems.append(f"--{flag}: {error}")
    num_tasks, data_problems = _data_problems(config, invalid)
    problems += data_problems
    if config.action == "check_data":
        return problems
    pool = PROMPTS.get(config.learner_name)
    if pool is not None and "prompt_param" not in invalid:
        values = pool.paper if config.prompt_param is None else config.prompt_param
        _, wrong = pool.parse(values, num_tasks)
        problems += [f"--prompt_param of {config.learner_name}: {problem}" for problem in wrong]
    method = DISTILLERS.get(config.distill.method)
    if method is not None and "kd_param" not in invalid:
        _, wrong = method.complete(config.distill)
        problems += [f"--kd_param of {config.distill.method}: {problem}" for problem in wrong]
    return problems + _model_problems(config, invalid)


def print_help() -> None:
    """Print the page of ``--help``, with the choices of every table."""
    lines = []
    for flag, table in _TABLES.items():
        lines += ["", f"--{flag}:", *(f"  {name:<12}{table[name].about}" for name in table)]
    lines += ["", "--prompt_param:"]
    for name in PROMPTS:
        values = ", ".join(f"{field.help} ({field.type.allowed})" for field in PROMPTS[name].fields)
        lines.append(f"  {name:<12}{values}; paper: {PROMPTS[name].paper_text()}" if values else f"  {name:<12}none")
    lines += ["", "--kd_param:"]
    for name, entry in DISTILLERS.items():
        for field in entry.fields:
            lines.append(f"  {name:<12}{field.name}: {field.help} ({field.type.allowed}; default: {field.default})")
    argument_parser("\n".join(lines), for_help=True).print_help()


def model_problems(distill: DistillConfig, teacher: ViTSize | None, student: ViTSize | None) -> list[str]:
    """Sizes of two backbones that do not fit each other or the KD method.

    Called with the sizes that the names tell (None where they tell none), and again with the backbones themselves.
    """
    entry = DISTILLERS[distill.method]
    if not entry.needs_teacher or teacher is None or student is None:
        return []
    problems = []
    if teacher.image_size != student.image_size:
        problems.append(
            f"teacher and student see the same images, but --t_model takes {teacher.image_size} px and"
            f" --s_model {student.image_size} px: choose models of one input size"
        )
    found = [require(ModelPair(teacher, student, distill.prompt_param)) for require in entry.requires]
    return problems + [f"--KD_method {distill.method}: {problem}" for problem in found if problem]


def _data_problems(config: Config, invalid: Collection[str]) -> tuple[int | None, list[str]]:
    """The number of tasks, None while unknown, and the problems of the data set and its split into tasks."""
    from dataloaders.tasks import split_classes  # here: it needs packages that may be missing

    data = config.data
    if data.dataset not in DATASETS:
        return None, []
    source = DATASETS[data.dataset].load()
    problems = source.missing(data) if config.action in ("train", "eval_only", "check_data") else []
    num_classes = source.count_classes(data.dataroot)
    sizes = {name: getattr(data, name) for name in ("first_split_size", "other_split_size")}
    if num_classes is None or sizes.keys() & set(invalid):
        return None, problems
    if data.upper_bound:
        return 1, problems
    for name, size in sizes.items():
        if size is not None and size > num_classes:
            problems.append(f"--{name} {size} is more than the {num_classes} classes of {data.dataset}")
    return len(split_classes(num_classes, *sizes.values())), problems


def _model_problems(config: Config, invalid: Collection[str]) -> list[str]:
    """Problems of the two backbones, and of what the KD method needs of them."""
    method = DISTILLERS.get(config.distill.method)
    models = {"t_model": config.teacher_model, "s_model": config.student_model}
    wrong = {flag: name_problem(name) for flag, name in models.items() if flag not in invalid}
    problems = [f"--{flag}: {problem}" for flag, problem in wrong.items() if problem]
    if config.teacher_from is not None and method is not None and not method.needs_teacher:
        problems.append(f"--teacher_from: --KD_method {config.distill.method} has no teacher; leave one of them out")
    if problems or method is None or "kd_prompt_param" in invalid:
        return problems
    return model_problems(config.distill, *map(known_size, models.values()))


def _device_problems(config: Config) -> list[str]:
    """Devices that exclude each other or do not exist."""
    ids = config.gpuid or ()
    given = " ".join(map(str, ids))
    if -1 in ids and len(ids) > 1:
        return [f"--gpuid {given}: -1 is the CPU and cannot be combined with GPUs; leave one of them out"]
    on_gpus = bool(ids) and ids != (-1,)
    if (config.device in ("cpu", "mps") and on_gpus) or (config.device == "cuda" and ids == (-1,)):
        return [f"--device {config.device} and --gpuid {given} exclude each other: leave one out"]
    if not on_gpus and config.device != "cuda":
        return []
    asked = f"--gpuid {given}" if on_gpus else "--device cuda"
    count = cuda_devices()
    if count == 0:
        return [f"{asked}: there is no CUDA device here; use --gpuid -1 for the CPU"]
    if missing := " ".join(str(gpu) for gpu in ids if count is not None and gpu >= count):
        have = "only GPU 0" if count == 1 else f"only GPUs 0 to {count - 1}"
        return [f"{asked}: there is no GPU {missing} here, {have}"]
    if config.compile and len(ids) > 1 and "RANK" not in os.environ:
        processes = f"let {len(ids)} processes use the GPUs by bash experiments/torchrun.sh {len(ids)}"
        return [f"--compile works with one GPU in each process: leave it out, or {processes}"]
    return []


def _process_problems(config: Config) -> list[str]:
    """Processes of a torchrun group that would have to share a GPU."""
    on_cpu = config.device == "cpu" or config.gpuid == (-1,)
    gpus = len(config.gpuid) if config.gpuid else cuda_devices()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "RANK" not in os.environ or config.action != "train" or on_cpu or not gpus or processes <= gpus:
        return []
    where = "of --gpuid" if config.gpuid else "on this machine"
    way_out = f"start at most {gpus} (torchrun --nproc_per_node), or use --gpuid -1 for the CPU"
    return [f"{processes} processes on this machine need a GPU each, but there are {gpus} {where}: {way_out}"]


def cuda_devices() -> int | None:
    """Number of CUDA devices that this process may use, according to the driver; None when only torch can tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None if os.path.exists("/dev/kfd") else 0  # an AMD GPU, which torch calls cuda, too
    count = ctypes.c_int(0)
    if driver.cuInit(0) == 0:
        driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def _batch_problems(config: Config) -> list[str]:
    """The batch is global: devices and accumulation split it into equal parts."""
    parts, over = len(config.gpuid or (0,)), "GPUs of --gpuid"
    if "RANK" in os.environ:
        parts, over = int(os.environ.get("WORLD_SIZE", "1")), "processes"
    size = config.data.batch_size
    if size % parts:
        below, above = size // parts * parts, (size // parts + 1) * parts
        fitting = f"{below} or {above}" if below else above
        return [f"--batch_size {size} does not divide by the {parts} {over}: use {fitting}"]
    share, asked = size // parts, config.accumulate
    if share % asked:
        each = "" if parts == 1 else f" on each of {parts} {over}"
        fitting = max(n for n in range(1, asked) if share % n == 0)
        return [f"--accumulate {asked} does not divide the {share} images of a batch{each}: use for example {fitting}"]
    return []


def _path_problems(config: Config) -> list[str]:
    """Files and folders that must exist."""
    problems = []
    seeds = range(config.seed, config.seed + config.repeat)
    runs = [config] if config.repeat == 1 else [config.for_seed(seed) for seed in seeds]
    needed = [
        ("t_weights", config.teacher_weights, "file"),
        ("s_weights", config.student_weights, "file"),
        ("init_from", config.init_from, "folder"),
        *(("teacher_from", each.teacher_from, "folder") for each in runs),
        *(("predict", path, "file or folder") for path in config.predict),
    ]
    for flag, path, kind in needed:
        if path is not None and not ("folder" in kind and path.is_dir() or "file" in kind and path.is_file()):
            wrong = f"{path} is a folder, not a file" if path.is_dir() else f"there is no {kind} {path}"
            problems.append(f"--{flag}: {wrong}; check the path")
    if config.export is not None and config.export.suffix not in (".safetensors", ".pt2"):
        problems.append(f"--export: {config.export} must end in .safetensors or .pt2")
    return problems
