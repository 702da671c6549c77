"""The settings of a run: default < YAML file < flag, each value checked before any work.

Every option is one field of a dataclass below, which is at once its flag, its YAML key, its rule and its line of
``--help``. :class:`Config` nests what one part of the program needs as a whole. Importing this module costs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from utils.registry import nearest

_log = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A configuration that cannot be run; ``problems`` has a sentence for each mistake, which names the way out."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Type(NamedTuple):
    """The values that an option takes."""

    allowed: str  # in words, for --help and after "must be" in messages
    metavar: str  # placeholder of a value in --help
    parse: Callable[[object], Any]  # turns a word of the command line or a YAML scalar into a value; None: not allowed
    many: bool = False  # a list of values rather than exactly one
    holds: Callable[[tuple], bool] = bool  # whether a list is allowed, given that each of its values is
    alone: Any = None  # value of a flag without a value; None if it needs one
    collect: Callable[[tuple], Any] = tuple  # turns a list of values into the option's value

    def read(self, words: Sequence[object]) -> Any:
        """The option's value (raises ValueError, whose message continues a sentence that starts with the option)."""
        if not words and self.alone is not None:
            return self.alone
        if not words or (len(words) > 1 and not self.many):
            takes = "a list" if self.many else "one value"
            raise ValueError(f"takes {takes} ({self.allowed}), not {len(words)} values")
        values = tuple(self.parse(word) for word in words)
        if None in values or not self.holds(values):
            wrong = [word for word, value in zip(words, values, strict=True) if value is None] or words
            guess = nearest(str(wrong[0]), self.allowed.split(" | ")) if " | " in self.allowed else None
            hint = f"; did you mean {guess}?" if guess else ""
            raise ValueError(f"must be {self.allowed}, not {' '.join(map(_show, wrong[:4]))}{hint}")
        return self.collect(values) if self.many else values[0]


def _show(value: object) -> str:
    """A value as messages show it: short, whatever a file contains."""
    if isinstance(value, (dict, list)):
        return "a list" if isinstance(value, list) else "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(item: object, holds: Callable[[float], bool]) -> float | None:
    """``item`` as a finite number for which ``holds`` is true, or None. YAML 1.1 reads ``1e-3`` as a string."""
    if isinstance(item, bool) or not isinstance(item, (int, float, str)):
        return None
    with contextlib.suppress(ValueError, OverflowError):
        if math.isfinite(number := float(item)) and holds(number):
            return number
    return None


def real(allowed: str = "a number", holds: Callable[[float], bool] = lambda number: True) -> Type:
    """A finite number for which ``holds`` is true."""
    return Type(allowed, "X", lambda item: _number(item, holds))


def whole(minimum: int = 0, *, special: int | None = None, maximum: int = 2**31 - 1, step: int = 1) -> Type:
    """A whole number of at least ``minimum``, divisible by ``step``, or ``special``, which has its own meaning."""

    def parse(item: object) -> int | None:
        number = _number(item, lambda n: n % step == 0 and (minimum <= n <= maximum or n == special))
        return None if number is None else int(number)

    prefix = "" if special is None else f"{special} or "
    return Type(f"{prefix}{'an even' if step == 2 else 'a'} whole number of at least {minimum}", "N", parse)


def text(allowed: str = "a name", metavar: str = "NAME", convert: Callable = str, many: bool = False) -> Type:
    """Any text of 1 to 1000 characters without control characters, which would spoil messages."""

    def parse(item: object) -> Any:
        word = str(item) if isinstance(item, (str, int, float)) and not isinstance(item, bool) else ""
        return convert(word) if word.strip() and len(word) <= 1000 and min(word) >= " " else None

    return Type(allowed, metavar, parse, many)


def path(allowed: str, *, many: bool = False) -> Type:
    """A path; ``~`` is the home folder."""
    return text(allowed, "PATH", lambda word: Path(os.path.expanduser(word)), many)


def choice(*names: str) -> Type:
    """One of a few names."""
    return Type(" | ".join(names), "NAME", lambda item: item if item in names else None)


def many(item: Type, allowed: str, holds: Callable[[tuple], bool]) -> Type:
    """A list of values of which each is an ``item``; ``allowed`` says in words what ``holds`` demands."""
    return Type(allowed.format(item.allowed), item.metavar, item.parse, True, holds)


_SCHEMES = ("http://", "https://", "file://")  # which urllib opens
_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
SWITCH = Type("0 or 1", "0|1", lambda item: _WORDS.get(str(item).lower()), alone=True)
FRACTION = real("a number from 0 to 1", lambda number: 0 <= number <= 1)
POSITIVE = real("a number above 0", lambda number: number > 0)
# Its square and its reciprocal must not overflow float32.
TEMPERATURE = real("a number above 0, from 1e-6 to 1e6", lambda number: 1e-6 <= number <= 1e6)
NOT_NEGATIVE = real("a number of at least 0", lambda number: number >= 0)
BELOW_ONE = real("a number of at least 0 and below 1", lambda number: 0 <= number < 1)
SHARE = real("a number above 0 and of at most 1", lambda number: 0 < number <= 1)
SEVERAL, TWO = "one number or more, each {}", "2 numbers, each {}"
NUMBERS = many(real(), SEVERAL, bool)._replace(alone=())
URL = text("an http(s):// or file:// address", "URL", lambda word: word if word.startswith(_SCHEMES) else None)
EPOCHS = many(whole(1), SEVERAL + ", increasing", lambda values: [*values] == sorted(set(values)))
GPUS = many(whole(0, special=-1), SEVERAL + ", all different", lambda values: len(set(values)) == len(values))
PAIR = many(whole(1), TWO, lambda values: len(values) == 2)
RANGE = many(SHARE, TWO + ", the smaller first", lambda values: len(values) == 2 and values[0] <= values[1])


def _assignment(item: object) -> dict[str, Any] | None:
    """The mapping of a YAML file, or ``name=value`` of a command line as one."""
    if isinstance(item, dict):
        return item if all(isinstance(name, str) and name.isidentifier() for name in item) else None
    name, _, value = item.partition("=") if isinstance(item, str) else ("", "", "")
    return {name: value} if name.isidentifier() else None


PARAMETERS = Type(
    "name=value, one or more (in YAML a mapping)",
    "NAME=VALUE",
    _assignment,
    many=True,
    collect=lambda parts: {name: value for part in parts for name, value in part.items()},
)


class Param(NamedTuple):
    """A parameter of a prompt pool or KD method, in its line of the table; the default is the paper's value."""

    name: str
    default: Any
    type: Type
    help: str


class Option(NamedTuple):
    """One setting."""

    default: Any  # where neither flag nor YAML key is given; None for no value
    type: Type
    group: str  # part of --help
    help: str
    key: str = ""  # flag and YAML key; empty where a field declares it under its own name
    paper: str = ""  # the paper's value, for --help
    in_yaml: bool = True  # False for a flag that is no YAML key
    affects_results: bool = True  # decides a run's results, so a resume must not change it
    section: str = ""  # field of Config that holds the field ``name``; empty for Config itself
    name: str = ""

    def value(self, config: Config) -> Any:
        """What a configuration holds."""
        return getattr(getattr(config, self.section) if self.section else config, self.name)


def option(default: Any, *args: Any, **more: Any) -> Any:
    """A dataclass field that is an :class:`Option`, with the same arguments."""
    return field(default=default, metadata={"option": Option(default, *args, **more)})


neutral = functools.partial(option, affects_results=False)  # changes how a run proceeds, but not its results
flag = functools.partial(option, affects_results=False, in_yaml=False)  # of the command line alone

USE, RUN, METHOD, MODELS, DATA = "Actions, instead of training", "Run", "Method", "Models", "Data"
TRAINING, DEVICES, LOGGING = "Training", "Devices", "Logging"
IGNORED = "Without effect, accepted from the original's command lines and files"
_GROUPS = (USE, RUN, DATA, METHOD, MODELS, TRAINING, DEVICES, LOGGING, IGNORED)
_REQUIRED = ("dataset", "schedule")
# What users often type instead -> option.
SYNONYMS = {"epochs": "schedule", "seed": "random_s", "learning_rate": "lr", "gpus": "gpuid", "student": "s_model"}
SYNONYMS |= {"output_dir": "log_dir", "alpha": "kd_alpha", "temperature": "Soft_T", "data_dir": "dataroot"}
# In a saved args.yaml these describe the machine and the start of the run; using its models does not need them.
_ONLY_FOR_TRAINING = ("gpuid", "device", "init_from")
_LARGEST_FILE = 1 << 15  # a configuration has 2 KiB; PyYAML takes seconds for megabytes
_PAPER_SPLIT = "10 for CIFAR-100, 20 for ImageNet-R"
_MODEL = text("a model")
_ON_A_RUN = ("eval_only", "export", "predict")


@dataclass(frozen=True)
class DistillConfig:
    """The KD method and its parameters."""

    method: str = option(
        "KD", text("a KD method"), METHOD, "how the student learns", key="KD_method", paper="none, the first five below"
    )
    prompt_param: tuple[int, int] = option(
        (5, 6),
        PAIR,
        METHOD,
        "KD_Token: number of student blocks and length (even) of the KD prompts",
        key="kd_prompt_param",
        paper="12 6; 1 6 in its column DeiT",
    )
    alpha: float = option(
        0.5, FRACTION, METHOD, "weight of distillation; cross-entropy gets the rest", key="kd_alpha", paper="0.5"
    )
    temperature: float = option(2.0, TEMPERATURE, METHOD, "temperature of the softened logits", key="Soft_T", paper="2")
    param: Mapping[str, Any] | None = option(
        None, PARAMETERS, METHOD, "parameters of the KD method itself; default: those below", key="kd_param"
    )
    param_defaults: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of all parameters of the method


@dataclass(frozen=True)
class DataConfig:
    """The data set, its split into tasks, and its batches."""

    dataset: str | None = option(None, text("a data set"), DATA, "data set", paper="CIFAR100 and ImageNet_R")
    dataroot: Path = neutral(Path("data"), path("a folder"), DATA, "folder of the data sets (not used by Icon_R)")
    data_url: str | None = neutral(None, URL, DATA, "where to download from; default: its own")
    first_split_size: int | None = option(
        None, whole(1), DATA, "classes of the first task; default: as in the others", paper=_PAPER_SPLIT
    )
    other_split_size: int | None = option(
        None, whole(1), DATA, "classes of each other task; without either, 10 equal tasks or fewer", paper=_PAPER_SPLIT
    )
    class_order: str = option("natural", choice("natural", "shuffled"), DATA, "order of the classes", paper="natural")
    validation: bool = option(False, SWITCH, DATA, "test on a seeded fifth of the training set", paper="0")
    upper_bound: bool = option(False, SWITCH, DATA, "one task with all classes", key="upper_bound_flag", paper="0")
    memory: int = option(0, whole(0), DATA, "number of past images kept for replay", paper="0")
    class_weighting: bool = option(False, SWITCH, DATA, "weight classes by size when replaying", key="DW", paper="0")
    train_aug: bool = option(True, SWITCH, DATA, "random crops and flips in training", paper="1")
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0), RANGE, DATA, "share of the image's area that a random crop covers", paper="0.08 1.0"
    )
    batch_size: int = option(64, whole(1), TRAINING, "images per step, on all devices", paper="64, with ViT-Large 32")
    workers: int | None = neutral(
        None, whole(0), DATA, "processes that load data, 0: the main one; default: at most 16 with a GPU, 4 without"
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule of each model at each task."""

    schedule: tuple[int, ...] | None = option(
        None,
        EPOCHS,
        TRAINING,
        "epochs of each model on each task: the last number; at the others before it, decay lowers lr",
        paper="20 for CIFAR-100, 35 for ImageNet-R",
    )
    schedule_type: str = option("cosine", choice("cosine", "decay"), TRAINING, "learning-rate schedule", paper="cosine")
    optimizer: str = option(
        "Adam", choice("Adam", "amsgrad", "SGD", "RMSprop", "Rprop"), TRAINING, "optimizer", paper="Adam"
    )
    lr: float = option(1e-3, POSITIVE, TRAINING, "learning rate", paper="0.001")
    momentum: float = option(0.9, BELOW_ONE, TRAINING, "momentum, and Adam's first beta", paper="0.9")
    weight_decay: float = option(0.0, NOT_NEGATIVE, TRAINING, "weight decay", paper="0")

    @property
    def epochs(self) -> int:
        """Epochs per task of the teacher and of the student (0 without a schedule)."""
        return self.schedule[-1] if self.schedule else 0


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    config: Path | None = flag(None, path("a YAML file"), RUN, "YAML file with any of these settings")
    log_dir: Path = neutral(Path("outputs/out"), path("a folder"), RUN, "folder of the run's results")
    overwrite: bool = flag(
        False, SWITCH._replace(alone=None), RUN, "0 resumes what log_dir holds, 1 moves it aside and starts over"
    )
    seed: int = option(10, whole(0, maximum=2**32 - 1), RUN, "seed of all random numbers", key="random_s")
    repeat: int = neutral(1, whole(1), RUN, "run this many seeds, each in its folder log_dir/seed-<s>")
    max_task: int = option(-1, whole(1, special=-1), RUN, "stop after this many tasks; -1 runs all", paper="-1")
    debug_mode: int = neutral(0, whole(0), IGNORED, "")

    learner_type: str = option("prompt", choice("prompt"), IGNORED, "there is no other family of learners")
    learner_name: str = option("CODAPrompt", text("a learner"), METHOD, "prompt pool", paper="the first four below")
    prompt_param: tuple[float, ...] | None = option(
        None, NUMBERS, METHOD, "parameters of the prompt pool; default: the paper's"
    )
    ema_coeff: float = option(0.5, FRACTION, METHOD, "APT: weight of the prompts merged before", paper="0.7")
    distill: DistillConfig = DistillConfig()
    aux_loss_scale: float = option(
        1.0, NOT_NEGATIVE, METHOD, "factor of prompt and feature losses", paper="2, since its two GPUs sum them"
    )

    teacher_model: str = option(
        "vit_base_patch16_224", _MODEL, MODELS, "teacher: timm or mini_vit_base", key="t_model", paper="Base, Large"
    )
    student_model: str = option(
        "vit_tiny_patch16_224", _MODEL, MODELS, "student: timm or mini_vit_small", key="s_model", paper="Small, Base"
    )
    teacher_weights: Path | None = option(
        None, path("a file"), MODELS, "teacher's weights (.pth, .safetensors, .npz); default: its own", key="t_weights"
    )
    student_weights: Path | None = option(
        None, path("a file"), MODELS, "student's weights; default: its own", key="s_weights"
    )
    normalize: str = option(
        "none", choice("none", "model"), MODELS, "normalise images as each model was trained, or not", paper="none"
    )
    teacher_from: Path | None = flag(
        None, path("a folder"), MODELS, "log_dir of a run with another KD method, whose trained teachers to use"
    )
    init_from: Path | None = option(
        None, path("a folder"), MODELS, "folder with T_class.pth and S_class.pth to start from"
    )

    data: DataConfig = DataConfig()
    rand_split: bool = neutral(False, SWITCH, IGNORED, "")
    model_type: str | None = neutral(None, text(), IGNORED, "")
    model_name: str | None = neutral(None, text(), IGNORED, "")
    optim: OptimConfig = OptimConfig()

    gpuid: tuple[int, ...] | None = neutral(
        None, GPUS, DEVICES, "GPUs to use; -1: the CPU; default: GPU 0, or the CPU without one", paper="0 1, two GPUs"
    )
    device: str | None = neutral(
        None, choice("cpu", "cuda", "mps"), DEVICES, "kind of device, instead of --gpuid; default: what --gpuid says"
    )
    precision: str = option(
        "fp32", choice("fp32", "tf32", "bf16", "fp16"), DEVICES, "arithmetic of the backbones", paper="fp32"
    )
    compile: bool = neutral(False, SWITCH, DEVICES, "use torch.compile")
    accumulate: int = neutral(1, whole(1), DEVICES, "split each batch into this many parts, to save memory")

    no_progress: bool = neutral(False, SWITCH, LOGGING, "plain lines instead of progress bars")
    tensorboard: bool = neutral(False, SWITCH, LOGGING, "also write TensorBoard files to log_dir/tensorboard")
    wandb: bool = neutral(False, SWITCH, LOGGING, "also send the same numbers to Weights & Biases")
    log_interval: int = neutral(10, whole(1), LOGGING, "steps between readings of the losses")

    export: Path | None = flag(None, path("a file .safetensors or .pt2"), USE, "write log_dir's student to this file")
    predict: tuple[Path, ...] = flag(
        (), path("images or folders of images", many=True), USE, "classify these with the student of --log_dir"
    )
    check_data: bool = flag(False, SWITCH, USE, "only check every image of the data set")
    eval_only: bool = flag(False, SWITCH, USE, "only evaluate the saved models of --log_dir again")
    top: int = flag(5, whole(1), USE, "how many classes --predict prints")

    @property
    def actions(self) -> tuple[str, ...]:
        """Everything that the flags ask for instead of training; more than one makes no sense."""
        return tuple(name for name in ("check_data", *_ON_A_RUN) if getattr(self, name))

    @property
    def action(self) -> str:
        """``train``, or ``check_data``, ``eval_only``, ``export`` or ``predict``."""
        return self.actions[0] if self.actions else "train"

    @property
    def without_effect(self) -> tuple[str, ...]:
        """The original's keys that were set although they have no effect."""
        keys = [key for key, each in OPTIONS.items() if each.group == IGNORED]
        return tuple(key for key in keys if OPTIONS[key].value(self) != OPTIONS[key].default)

    def to_yaml_dict(self) -> dict[str, Any]:
        """All settings as plain values under their YAML keys; written to a file they are a ``--config``."""
        return {key: plain(each.value(self)) for key, each in OPTIONS.items() if each.in_yaml}

    def result_settings(self) -> dict[str, Any]:
        """The part of :meth:`to_yaml_dict` that decides the results: no folders, devices or logging."""
        return {key: plain(each.value(self)) for key, each in OPTIONS.items() if each.affects_results}

    def changes(self, theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Settings that affect results and differ: key -> (another run's value, this one's).

        ``theirs`` may be an older run's: a key that it lacks counts as its default.
        """
        own, theirs = self.result_settings(), make_config({}).result_settings() | theirs
        theirs["kd_param"] = plain(self.distill.param_defaults | (theirs["kd_param"] or {}))
        return {key: (theirs[key], own[key]) for key in own if theirs[key] != own[key]}

    def settings_hash(self) -> str:
        """A hash of :meth:`result_settings`."""
        return hashlib.sha256(json.dumps(self.result_settings(), sort_keys=True).encode()).hexdigest()[:16]

    def for_seed(self, seed: int) -> Config:
        """The configuration of one seed of ``--repeat``, in a folder of its own."""
        log_dir, teacher_from = (path and path / f"seed-{seed}" for path in (self.log_dir, self.teacher_from))
        return dataclasses.replace(self, seed=seed, repeat=1, log_dir=log_dir, teacher_from=teacher_from)


def plain(value: Any) -> Any:
    """A setting as YAML and JSON write it."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _options_of(cls: type, section: str = "") -> Iterator[Option]:
    for each in dataclasses.fields(cls):
        if dataclasses.is_dataclass(each.default):
            yield from _options_of(type(each.default), each.name)
        elif found := each.metadata.get("option"):
            yield found._replace(section=section, name=each.name, key=found.key or each.name)


OPTIONS: dict[str, Option] = {each.key: each for each in _options_of(Config)}
"""Flag without its dashes = YAML key -> option."""


def make_config(values: dict[str, Any]) -> Config:
    """The configuration with these values by key, and defaults for the rest."""
    sections: dict[str, dict[str, Any]] = {each.section: {} for each in OPTIONS.values()}
    for key, value in values.items():
        sections[OPTIONS[key].section][OPTIONS[key].name] = value
    config = Config(**sections.pop(""))
    parts = {name: dataclasses.replace(getattr(config, name), **own) for name, own in sections.items()}
    return dataclasses.replace(config, **parts)


class Parsed(NamedTuple):
    """What was read: values by key, a sentence for each mistake, and the keys whose value is not known."""

    values: dict[str, Any]
    problems: list[str]
    invalid_keys: set[str]

    def read(self, each: Option, label: str, words: Sequence[object]) -> None:
        """Read an option that messages call ``label``; a flag, which is read first, overrides the file."""
        try:
            self.values.setdefault(each.key, each.type.read(words))
        except ValueError as error:
            self.refuse(each.key, f"{label} {error}")

    def refuse(self, key: str, problem: str) -> None:
        """Note that a key has no allowed value."""
        self.problems.append(problem)
        self.invalid_keys.update({key} - self.values.keys())

    def config(self) -> Config:
        """The configuration, with defaults in place of what is missing or wrong."""
        return make_config(self.values)


def parse_config(argv: Sequence[str]) -> Parsed:
    """Read a command line and the YAML file it names, and check each value by itself; the rest is learners.check's.

    Raises ConfigError for an abbreviated flag that could be several.
    """
    parsed = Parsed({}, [], set())
    for key, words in _split_flags(argv, parsed.problems).items():
        parsed.read(OPTIONS[key], f"--{key}", words)
    given = parsed.config()
    on_a_run = given.action in _ON_A_RUN
    if on_a_run and not (given.log_dir / "args.yaml").exists():
        parsed.problems.append(f"--log_dir: {given.log_dir} is not the folder of a run, it has no args.yaml")
        return parsed
    saved = on_a_run and given.config is None
    file = given.log_dir / "args.yaml" if saved else given.config
    if _read_yaml(file, parsed, saved) if file is not None else "config" not in parsed.invalid_keys:
        parsed.problems.extend(_missing_problems(parsed, file))
    return parsed


def _split_flags(argv: Sequence[str], problems: list[str]) -> dict[str, list[str]]:
    """Words of each known flag; a repeated flag counts as given last."""
    found, rest = argument_parser().parse_known_args(list(argv))
    unknown = [word.partition("=")[0] for word in rest if word.startswith("-")]
    for name in unknown:
        guess = _suggestion(name.lstrip("-"), OPTIONS)
        hint = f"did you mean --{guess}?" if guess else "see --help"
        problems.append(f"unknown flag {_show(name)[1:-1]}; {hint}")
    if rest and not unknown:  # else they belong to the unknown flag
        problems.append(f"{_show(rest[0])} follows no flag; see --help")
    return vars(found)


def _suggestion(name: str, keys: Collection[str]) -> str | None:
    """The option that an unknown flag or key probably means."""
    return SYNONYMS.get(name.lower().replace("-", "_")) or nearest(name, keys)


def _read_yaml(file: Path, parsed: Parsed, saved: bool) -> bool:
    """Read a YAML file, which a run may have ``saved``, into ``parsed``; returns whether that was possible."""
    try:
        settings = load_yaml(file)
    except ValueError as error:
        parsed.problems.append(str(error))
        return False
    for key, value in settings.items():
        each = OPTIONS.get(key) if isinstance(key, str) else None
        if each is None:
            guess = _suggestion(str(key), [other for other in OPTIONS if OPTIONS[other].in_yaml])
            hint = f"; did you mean {guess}?" if guess else "; see --help for all keys"
            parsed.problems.append(f"unknown key {_show(key)} in {file}{hint}")
        elif not each.in_yaml:
            _log.warning("%s in %s is ignored, because it belongs on the command line, as --%s", key, file, key)
        elif value is None and each.default is not None:
            parsed.refuse(key, f"{key} in {file} has no value; it must be {each.type.allowed}")
        elif value is not None and not (saved and key in _ONLY_FOR_TRAINING):
            parsed.read(each, f"{key} in {file}", value if isinstance(value, list) else [value])
    return True


def load_yaml(file: Path) -> dict[Any, Any]:
    """The mapping in a YAML file (raises ValueError, whose message names the file and the way out)."""
    import yaml  # here, so that --help works before the packages are installed

    try:
        if file.exists() and not (file.is_file() or file.is_dir()):  # a pipe could be waited for without end
            raise ValueError(f"{file} is not a regular file; --config needs a YAML file")
        with open(file, "rb") as opened:
            data = opened.read(_LARGEST_FILE + 1)
    except FileNotFoundError as error:
        guess = nearest(str(file), [str(other) for other in file.parent.glob("*.y*ml")])
        hint = f"did you mean --config {guess}?" if guess else "check --config"
        raise ValueError(f"{file} does not exist; {hint}") from error
    except OSError as error:
        what = "is a folder" if isinstance(error, IsADirectoryError) else f"cannot be read ({error.strerror})"
        raise ValueError(f"{file} {what}; --config needs a YAML file") from error
    if len(data) > _LARGEST_FILE:
        raise ValueError(f"{file} is larger than 32 KiB, too large for a configuration; --config needs a YAML file")
    try:
        text = data.decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        keys = Counter(str(key.value) for key, _ in root.value) if isinstance(root, yaml.MappingNode) else Counter()
        if twice := [key for key, times in keys.items() if times > 1]:  # PyYAML would take the last one
            raise ValueError(f"the key {_show(twice[0])} appears twice")
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError also for no text or an impossible date
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        reason = f"line {mark.line + 1}: {reason}" if mark else reason
        raise ValueError(f"{file} is not valid YAML ({reason}); fix it or copy a YAML file from configs/") from error
    if not isinstance(settings, dict):
        what = "is empty" if settings is None else "must hold lines 'key: value'"
        raise ValueError(f"{file} {what}; copy one of configs/*.yaml")
    return settings


def _missing_problems(parsed: Parsed, file: Path | None) -> list[str]:
    """Missing settings, without which the action cannot start; ``file`` is the YAML file that was read."""
    config, invalid = parsed.config(), parsed.invalid_keys
    if invalid & {"check_data", *_ON_A_RUN}:
        return []  # which settings it needs depends on what is to be done
    needed = _REQUIRED[:1] if config.action == "check_data" else _REQUIRED
    missing = [key for key in needed if OPTIONS[key].value(config) is None and key not in invalid]
    if not missing or file is not None:
        return [f"{key} is missing: set it in {file} or give --{key}" for key in missing]
    flags = ", ".join(f"--{key}" for key in missing)
    return [f"--config is missing: give a YAML file, such as configs/icon-r_prompt.yaml (or {flags})"]


class _Parser(argparse.ArgumentParser):
    """Raises a mistake instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: write the flag out; see --help")


_DESCRIPTION = """Continual distillation learning: a frozen ViT teacher and student learn task after task by prompts.

  python run.py --config configs/cifar-100_prompt.yaml --log_dir outputs/cifar-100      # train, or resume
  python run.py --config configs/folder.yaml --dataroot PHOTOS --log_dir outputs/photos   # on images of your own
  python run.py --predict PICTURE.jpg --log_dir outputs/photos                            # use the student

Every flag is also a key of the YAML file, except those marked *. A flag overrides the file, and the file
overrides the default; required settings may come from either. A flag that takes 0 or 1 means 1 when it has no value
(except --overwrite). A flag may be shortened as long as it remains unambiguous. "paper" is the value in the
experiments of Zhang, Guo and Xiang (2026), arXiv 2407.13911."""


def argument_parser(epilog: str = "", *, for_help: bool = False) -> argparse.ArgumentParser:
    """The parser that prints ``--help``, or the one that splits a command line.

    The latter takes any number of words for every flag; :class:`Type` judges them along with everything else.
    """
    parser = _Parser(
        prog="python run.py",
        usage="python run.py --config FILE --log_dir FOLDER [--FLAG VALUE ...]",
        description=_DESCRIPTION,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: parser.add_argument_group(name) for name in _GROUPS}
    if for_help:
        groups[USE].add_argument("-h", "--help", action="help", help="* print this page")
        groups[USE].add_argument("--version", action="store_true", help="* print the version")
    for each in OPTIONS.values():
        nargs = "*" if not for_help else "+" if each.type.many else "?" if each.type.alone is not None else None
        text = _help_text(each).replace("%", "%%")
        groups[each.group].add_argument(f"--{each.key}", nargs=nargs, metavar=each.type.metavar, help=text)
    return parser


def _help_text(each: Option) -> str:
    notes = ["required"] if each.key in _REQUIRED else []
    if each.type.metavar not in ("NAME", "PATH") or " | " in each.type.allowed:
        notes.append(each.type.allowed)
    values = each.default if isinstance(each.default, tuple) else [each.default]
    default = " ".join(str(int(x) if isinstance(x, bool) else plain(x)) for x in values if x is not None)
    if default and default == each.paper:
        notes.append(f"default and paper: {default}")
    else:
        notes += [f"{name}: {value}" for name, value in (("default", default), ("paper", each.paper)) if value]
    return ("" if each.in_yaml else "* ") + each.help + (f" ({'; '.join(notes)})" if notes else "")
