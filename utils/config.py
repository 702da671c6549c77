"""The settings of a run: default < YAML file < flag, each value checked before any work.

Every option is one field of a dataclass below, which is at once its flag, its YAML key, its rule and its line of
``--help``. :class:`Config` nests what one part of the program needs as a whole. Importing this module costs no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from utils.registry import nearest


class ConfigError(ValueError):
    """A configuration that cannot be run.

    Attributes:
        problems: one sentence for each mistake, naming the flag, key or file and the way out.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


# ---------------------------------------------------------------------------------------------------- types


class Type(NamedTuple):
    """The values that an option takes.

    Attributes:
        allowed: the values in words, for ``--help`` and after "must be" in messages.
        metavar: stands for a value in ``--help``.
        parse: turns one word of the command line or one YAML scalar into a value, None if it is not allowed.
        many: whether the option takes a list of values rather than exactly one.
        count: how many values a list must have; None for one or more.
        arrange: brings a list into the order in which it must be given, without repetitions where these are wrong.
        alone: value of a flag without a value; None if it needs one.
    """

    allowed: str
    metavar: str
    parse: Callable[[object], Any]
    many: bool = False
    count: int | None = None
    arrange: Callable[[tuple], Iterable] = tuple
    alone: Any = None

    def read(self, words: Sequence[object]) -> Any:
        """The option's value.

        Raises:
            ValueError: the words are not allowed; the message continues a sentence that starts with the option.
        """
        if not words and self.alone is not None:
            return self.alone
        if not self.many and len(words) != 1:
            raise ValueError(f"takes one value ({self.allowed}), not {len(words)} values")
        if not words or self.count not in (None, len(words)):
            raise ValueError(f"must be {self.allowed}, not {len(words)} values")
        values = tuple(self.parse(word) for word in words)
        if None in values or values != tuple(self.arrange(values)):
            wrong = [word for word, value in zip(words, values, strict=True) if value is None] or words
            raise ValueError(f"must be {self.allowed}, not {' '.join(map(_show, wrong[:4]))}{self._hint(wrong[0])}")
        return values if self.many else values[0]

    def _hint(self, word: object) -> str:
        guess = nearest(str(word), self.allowed.split(" | ")) if " | " in self.allowed else None
        return f"; did you mean {guess}?" if guess else ""


def _show(value: object) -> str:
    """A value as messages show it: short, whatever a file contains."""
    if isinstance(value, (dict, list)):
        return "a list" if isinstance(value, list) else "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(item: object) -> float | int | None:
    """``item`` as a finite number, or None. Strings count: YAML 1.1 reads ``1e-3`` as one."""
    if isinstance(item, bool) or not isinstance(item, (int, float, str)):
        return None
    for kind in (int, float):
        try:
            number = item if isinstance(item, float) else kind(item)
        except (ValueError, OverflowError):
            continue
        return number if -1e300 < number < 1e300 else None
    return None


def real(allowed: str = "a number", holds: Callable[[float], bool] = lambda number: True) -> Type:
    """A finite number for which ``holds`` is true."""

    def parse(item: object) -> float | None:
        number = _number(item)
        return float(number) if number is not None and holds(number) else None

    return Type(allowed, "X", parse)


def whole(minimum: int = 0, *, special: int | None = None, maximum: int = 2**31 - 1) -> Type:
    """A whole number of at least ``minimum``, or ``special``, which has a meaning of its own."""

    def parse(item: object) -> int | None:
        number = _number(item)
        if number is None or number != int(number):
            return None
        return int(number) if minimum <= number <= maximum or number == special else None

    prefix = "" if special is None else f"{special} or "
    return Type(f"{prefix}a whole number of at least {minimum}", "N", parse)


def text(allowed: str = "a name") -> Type:
    """Any text that is not empty. Longer or with control characters it is no name, but would spoil messages."""

    def parse(item: object) -> str | None:
        word = str(item) if isinstance(item, (str, int, float)) and not isinstance(item, bool) else ""
        return word if word.strip() and len(word) <= 1000 and min(word) >= " " else None

    return Type(allowed, "NAME", parse)


def path(allowed: str, *, many: bool = False) -> Type:
    """A path; ``~`` is the home folder."""

    def parse(item: object) -> Path | None:
        word = text().parse(item)
        return None if word is None else Path(os.path.expanduser(word))

    return Type(allowed, "PATH", parse, many)


def choice(*names: str) -> Type:
    """One of a few names."""
    return Type(" | ".join(names), "NAME", lambda item: item if item in names else None)


def switch(*, alone: bool | None = True) -> Type:
    """On or off; the flag without a value means ``alone``."""
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    return Type("0 or 1", "0|1", lambda item: words.get(str(item).lower()), alone=alone)


def many(item: Type, count: int | None = None, arrange: Callable[[tuple], Iterable] = tuple, order: str = "") -> Type:
    """A list of values of which each is an ``item``; ``order`` says in words what ``arrange`` demands."""
    number = "one number or more" if count is None else f"{count} numbers"
    return Type(f"{number}, each {item.allowed}{order}", item.metavar, item.parse, True, count, arrange)


def _increasing(values: tuple) -> list:
    return sorted(set(values))


FRACTION = real("a number from 0 to 1", lambda number: 0 <= number <= 1)
POSITIVE = real("a number above 0", lambda number: number > 0)
NOT_NEGATIVE = real("a number of at least 0", lambda number: number >= 0)
BELOW_ONE = real("a number of at least 0 and below 1", lambda number: 0 <= number < 1)
SHARE = real("a number above 0 and of at most 1", lambda number: 0 < number <= 1)


# -------------------------------------------------------------------------------------------------- options


class Option(NamedTuple):
    """One setting: field ``name`` of :class:`Config` or of its part ``section``, flag ``--key``, and YAML key."""

    section: str
    name: str
    key: str
    type: Type
    group: str
    help: str
    default: Any
    paper: str
    in_yaml: bool
    affects_results: bool

    def value(self, config: Config) -> Any:
        """What a configuration holds."""
        return getattr(getattr(config, self.section) if self.section else config, self.name)


def option(
    default: Any, type: Type, group: str, help: str, *, key="", paper="", in_yaml=True, affects_results=True
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: value where neither flag nor YAML key is given; None for no value.
        type, group, help: allowed values, part of ``--help`` and text there.
        key: flag and YAML key where these differ from the field's name.
        paper: the paper's value, for ``--help``.
        in_yaml: False for a flag that is no YAML key.
        affects_results: whether the value decides a run's results, so that a resume must not change it.
    """
    metadata = {"type": type, "group": group, "help": help, "key": key, "paper": paper, "in_yaml": in_yaml}
    return field(default=default, metadata={**metadata, "affects_results": affects_results and in_yaml})


RUN, METHOD, MODELS, DATA = "Run", "Method", "Models", "Data"
TRAINING, DEVICES, LOGGING, USE = "Training", "Devices", "Logging", "Instead of training"
IGNORED = "accepted from the original, without effect"
# An args.yaml says these of the machine and the start of its run; they mean nothing to the use of its models.
_ONLY_FOR_TRAINING = ("gpuid", "device", "init_from")
_EXAMPLE_CONFIG = "configs/emoji-r_prompt.yaml"
_ON_A_RUN = ("eval_only", "export", "predict")


@dataclass(frozen=True)
class DistillConfig:
    """The KD method and its parameters."""

    method: str = option(
        "KD", text("a KD method"), METHOD, "how the student learns from the teacher", key="KD_method",
        paper="KDP, beside each other one")
    prompt_param: tuple[int, int] = option(
        (12, 6), many(whole(1), 2), METHOD,
        "KD_Token: number of student blocks and length (even) of the KD prompts", key="kd_prompt_param", paper="12 6")
    alpha: float = option(
        0.5, FRACTION, METHOD, "weight of distillation; cross-entropy gets the rest", key="kd_alpha", paper="0.5")
    temperature: float = option(
        2.0, POSITIVE, METHOD, "temperature of the softened logits", key="Soft_T", paper="2")


@dataclass(frozen=True)
class DataConfig:
    """The data set, its split into tasks, and its batches."""

    dataset: str | None = option(None, text("a data set"), DATA, "data set", paper="CIFAR100, ImageNet_R")
    dataroot: Path = option(
        Path("data"), path("a folder"), DATA, "folder of the data sets (not used by Emoji_R)", affects_results=False)
    data_url: str | None = option(
        None, text("a URL"), DATA, "another place to download the data set from; default: its own",
        affects_results=False)
    first_split_size: int | None = option(
        None, whole(1), DATA, "classes of the first task", paper="10 (CIFAR-100), 20 (ImageNet-R)")
    other_split_size: int | None = option(
        None, whole(1), DATA, "classes of every other task", paper="10 (CIFAR-100), 20 (ImageNet-R)")
    class_order: str = option(
        "natural", choice("natural", "shuffled"), DATA, "order in which classes come", paper="natural")
    validation: bool = option(False, switch(), DATA, "test on a seeded fifth of the training set", paper="0")
    upper_bound: bool = option(False, switch(), DATA, "one task with all classes", key="upper_bound_flag", paper="0")
    memory: int = option(0, whole(0), DATA, "number of past images kept for replay", paper="0")
    class_weighting: bool = option(
        False, switch(), DATA, "weight classes by their number of images when replaying", key="DW", paper="0")
    train_aug: bool = option(True, switch(), DATA, "random crops and flips in training", paper="1")
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0), many(SHARE, 2, sorted, ", the smaller first"), DATA,
        "share of the image's area that a random crop covers", paper="0.08 1.0")
    batch_size: int = option(
        64, whole(1), TRAINING, "images per step, over all devices", paper="64; 32 with ViT-Large teachers")
    workers: int = option(
        4, whole(0), DATA, "processes that load data; 0 loads in the main one", affects_results=False)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule of each model at each task."""

    schedule: tuple[int, ...] | None = option(
        None, many(whole(1), None, _increasing, ", increasing"), TRAINING,
        "epochs per task of teacher and of student (the last number; the others are steps of decay)",
        paper="20 (CIFAR-100), 35 (ImageNet-R)")
    schedule_type: str = option(
        "cosine", choice("cosine", "decay"), TRAINING, "course of the learning rate", paper="cosine")
    optimizer: str = option(
        "Adam", choice("Adam", "amsgrad", "SGD", "RMSprop", "Rprop"), TRAINING, "optimizer", paper="Adam")
    lr: float = option(1e-3, POSITIVE, TRAINING, "learning rate", paper="0.001")
    momentum: float = option(0.9, BELOW_ONE, TRAINING, "momentum, and Adam's first beta", paper="0.9")
    weight_decay: float = option(0.0, NOT_NEGATIVE, TRAINING, "weight decay", paper="0")

    @property
    def epochs(self) -> int:
        """Epochs per task of the teacher and of the student (0 without a schedule)."""
        return self.schedule[-1] if self.schedule else 0


@dataclass(frozen=True)
class Config:
    """All settings of a run under readable names."""

    config: Path | None = option(
        None, path("a YAML file"), RUN, "YAML file with any of these settings", in_yaml=False)
    log_dir: Path | None = option(
        None, path("a folder"), RUN, "folder of the run's results; needed for training", affects_results=False)
    overwrite: bool = option(
        False, switch(alone=None), RUN, "0 resumes what log_dir holds, 1 moves it aside and starts over",
        affects_results=False)
    seed: int = option(1, whole(0, maximum=2**32 - 1), RUN, "seed of all random numbers", key="random_s")
    repeat: int = option(
        1, whole(1), RUN, "run this many seeds, each in its folder log_dir/seed-<s>", affects_results=False)
    max_task: int = option(-1, whole(1, special=-1), RUN, "stop after this many tasks; -1 runs all", paper="-1")
    debug_mode: int = option(0, whole(0), RUN, IGNORED, affects_results=False)

    learner_type: str = option("prompt", choice("prompt"), METHOD, "family of learners", paper="prompt")
    learner_name: str = option("CODAPrompt", text("a learner"), METHOD, "prompt pool", paper="each of them")
    prompt_param: tuple[float, ...] | None = option(
        None, many(real()), METHOD, "parameters of the prompt pool; default: the paper's")
    distill: DistillConfig = DistillConfig()
    aux_loss_scale: float = option(
        1.0, NOT_NEGATIVE, METHOD, "factor of prompt and feature losses", paper="2, as its two GPUs added theirs")

    teacher_model: str = option(
        "vit_base_patch16_224", text("a model"), MODELS, "teacher: a ViT of timm, or mini_vit_base", key="t_model",
        paper="vit_base_patch16_224 or vit_large_patch16_224")
    student_model: str = option(
        "vit_small_patch16_224", text("a model"), MODELS, "student: a ViT of timm, or mini_vit_small", key="s_model",
        paper="vit_small_patch16_224 or vit_base_patch16_224")
    teacher_weights: Path | None = option(
        None, path("a file"), MODELS, "the teacher's weights from a file (.pth, .safetensors, .npz); default: its own",
        key="t_weights")
    student_weights: Path | None = option(
        None, path("a file"), MODELS, "the student's weights from a file; default: its own", key="s_weights")
    teacher_from: Path | None = option(
        None, path("a folder"), MODELS,
        "log_dir of a run with another KD method: take its trained teachers, which are the same, instead of training"
        " them again", in_yaml=False)
    init_from: Path | None = option(
        None, path("a folder"), MODELS, "folder with T_class.pth and S_class.pth to start from")

    data: DataConfig = DataConfig()
    rand_split: bool = option(False, switch(), DATA, IGNORED, affects_results=False)
    model_type: str | None = option(None, text(), DATA, IGNORED, affects_results=False)
    model_name: str | None = option(None, text(), DATA, IGNORED, affects_results=False)
    optim: OptimConfig = OptimConfig()

    gpuid: tuple[int, ...] | None = option(
        None, many(whole(0, special=-1), None, dict.fromkeys, ", no two equal"), DEVICES,
        "GPUs to use; -1 is the CPU; default: GPU 0 if there is one, else the CPU", paper="0 1",
        affects_results=False)
    device: str | None = option(
        None, choice("cpu", "cuda", "mps"), DEVICES,
        "kind of device, instead of --gpuid; default: what --gpuid says", affects_results=False)
    precision: str = option(
        "fp32", choice("fp32", "tf32", "bf16", "fp16"), DEVICES, "arithmetic of the backbones", paper="fp32")
    compile: bool = option(False, switch(), DEVICES, "use torch.compile", affects_results=False)
    accumulate: int = option(
        1, whole(1), DEVICES, "split each batch into this many parts, to save memory", affects_results=False)

    no_progress: bool = option(
        False, switch(), LOGGING, "plain lines instead of progress bars", affects_results=False)
    tensorboard: bool = option(False, switch(), LOGGING, "also write TensorBoard files", affects_results=False)
    log_interval: int = option(
        10, whole(1), LOGGING, "steps between two readings of the losses", affects_results=False)

    export: Path | None = option(
        None, path("a file .safetensors or .pt2"), USE, "write the trained student of --log_dir to this file",
        in_yaml=False)
    predict: tuple[Path, ...] = option(
        (), path("one image or more", many=True), USE, "name what these images show, with the student of --log_dir",
        in_yaml=False)
    check_data: bool = option(False, switch(), USE, "only check every image of the data set", in_yaml=False)
    eval_only: bool = option(
        False, switch(), USE, "only evaluate the saved models of --log_dir again", in_yaml=False)
    top: int = option(5, whole(1), USE, "how many classes --predict names", in_yaml=False)

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
        return tuple(key for key, each in OPTIONS.items() if each.help == IGNORED and each.value(self))

    def to_yaml_dict(self) -> dict[str, Any]:
        """All settings as plain values under their YAML keys; written to a file they are a ``--config``."""
        # A file that says overwrite would wipe every later resume.
        return {key: _plain(each.value(self)) for key, each in OPTIONS.items() if each.in_yaml and key != "overwrite"}

    def result_settings(self) -> dict[str, Any]:
        """The part of :meth:`to_yaml_dict` that decides the results: no folders, devices or logging."""
        settings = self.to_yaml_dict()
        return {key: settings[key] for key, each in OPTIONS.items() if each.affects_results}

    def settings_hash(self, without_seed: bool = False) -> str:
        """A hash of :meth:`result_settings`; ``without_seed`` makes it equal for runs of different seeds."""
        settings = self.result_settings()
        if without_seed:
            del settings["random_s"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def for_seed(self, seed: int) -> Config:
        """The configuration of one seed of ``--repeat``, in a folder of its own."""
        folders = {"log_dir": self.log_dir, "teacher_from": self.teacher_from}
        own = {name: folder and folder / f"seed-{seed}" for name, folder in folders.items()}
        return dataclasses.replace(self, seed=seed, repeat=1, **own)


def _plain(value: Any) -> Any:
    """A setting as YAML and JSON write it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _options_of(cls: type, section: str = "") -> Iterator[Option]:
    for each in dataclasses.fields(cls):
        if dataclasses.is_dataclass(each.default):
            yield from _options_of(type(each.default), each.name)
        else:
            metadata = {**each.metadata, "key": each.metadata["key"] or each.name}
            yield Option(section=section, name=each.name, default=each.default, **metadata)


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


# -------------------------------------------------------------------------------------------------- reading


class Parsed(NamedTuple):
    """What was read: values by key, a sentence for each mistake, and the keys whose value is not known."""

    values: dict[str, Any]
    problems: list[str]
    invalid_keys: set[str]

    def read(self, each: Option, label: str, words: Sequence[object]) -> None:
        """Read one option's value; ``label`` is what messages call the option."""
        try:
            self.values[each.key] = each.type.read(words)
        except ValueError as error:
            self.invalid_keys.add(each.key)
            self.problems.append(f"{label} {error}")

    def config(self) -> Config:
        """The configuration, with defaults in place of what is missing or wrong."""
        return make_config(self.values)


def parse_config(argv: Sequence[str]) -> Parsed:
    """Read a command line and the YAML file it names, and check each value by itself.

    What depends on several values, on the tables of other packages or on the machine is judged by
    ``learners.check``.
    """
    flags, read = Parsed({}, [], set()), Parsed({}, [], set())
    for key, words in _split_flags(argv, flags.problems).items():
        flags.read(OPTIONS[key], f"--{key}", words)
    given = flags.config()
    saved = given.config is None and given.action in _ON_A_RUN and given.log_dir is not None
    file = given.log_dir / "args.yaml" if saved else given.config
    complete = _read_yaml(file, read, saved) if file is not None else "config" not in flags.invalid_keys
    invalid = (read.invalid_keys - flags.values.keys()) | flags.invalid_keys
    parsed = Parsed(read.values | flags.values, flags.problems + read.problems, invalid)
    if complete:
        parsed.problems.extend(_missing_problems(parsed, file))
    return parsed


def _split_flags(argv: Sequence[str], problems: list[str]) -> dict[str, list[str]]:
    """Words of each known flag; a repeated flag counts as given last."""
    found, rest = argument_parser().parse_known_args(list(argv))
    after_unknown_flag = False
    for word in rest:
        if word.startswith("-"):
            name, after_unknown_flag = word.partition("=")[0], True
            guess = nearest(name.lstrip("-"), list(OPTIONS))
            hint = f"did you mean --{guess}?" if guess else "see --help"
            problems.append(f"unknown flag {_show(name)[1:-1]}; {hint}")
        elif not after_unknown_flag:
            problems.append(f"{_show(word)} follows no flag; see --help")
    return {key: words for key, words in vars(found).items() if key != "help"}


def _read_yaml(file: Path, parsed: Parsed, saved: bool) -> bool:
    """Read a YAML file into ``parsed`` and return whether that was possible.

    A file ``saved`` by a run may come from a machine with other devices and folders, so these are left out.
    """
    if saved and not file.exists():
        parsed.problems.append(f"--log_dir: {file.parent} is not the folder of a run, it has no {file.name}")
        return False
    try:
        settings = load_yaml(file)
    except ValueError as error:
        parsed.problems.append(str(error))
        return False
    for key, value in settings.items():
        each = OPTIONS.get(key) if isinstance(key, str) else None
        if each is None:
            guess = nearest(str(key), [other for other in OPTIONS if OPTIONS[other].in_yaml])
            hint = f"; did you mean {guess}?" if guess else "; see --help for all keys"
            parsed.problems.append(f"unknown key {_show(key)} in {file}{hint}")
        elif not each.in_yaml:
            parsed.problems.append(f"{key} in {file} belongs on the command line, as --{key}")
        elif value is None and each.default is not None:
            parsed.invalid_keys.add(key)
            parsed.problems.append(f"{key} in {file} has no value; it must be {each.type.allowed}")
        elif value is not None and not (saved and key in _ONLY_FOR_TRAINING):
            parsed.read(each, f"{key} in {file}", value if isinstance(value, list) else [value])
    return True


_LARGEST_FILE = 1 << 15  # a configuration has 2 KiB; PyYAML takes seconds for megabytes


def load_yaml(file: Path) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: the file is missing, no YAML, or holds something else; the message names it and the way out.
    """
    import yaml  # here, so that --help works before the packages are installed

    class UniqueKeyLoader(yaml.SafeLoader):
        """Refuses a key that is there twice, which PyYAML accepts."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            hashable = [key for key in keys if isinstance(key, Hashable)]
            if len(set(hashable)) < len(hashable):
                twice = next(key for key in hashable if hashable.count(key) > 1)
                raise yaml.constructor.ConstructorError(None, None, f"the key {_show(twice)} is there twice")
            return super().construct_mapping(node, deep)

    try:
        with open(file, "rb") as opened:
            data = opened.read(_LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            raise ValueError("is larger than 32 KiB, so it is no configuration; --config needs a YAML file")
        settings = yaml.load(data.decode("utf-8-sig"), Loader=UniqueKeyLoader)
    except OSError as error:
        raise ValueError(_unreadable(file, error)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file; --config needs a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        reason = f"line {mark.line + 1}: {reason}" if mark else reason
        raise ValueError(f"{file} is not valid YAML ({reason}); mend it or copy one of configs/*.yaml") from error
    except ValueError as error:  # an impossible date
        reason = str(error) if "configuration" in str(error) else f"is not valid YAML ({error})"
        raise ValueError(f"{file} {reason}") from error
    if not isinstance(settings, dict):
        what = "is empty" if settings is None else "must hold lines 'key: value'"
        raise ValueError(f"{file} {what}; copy one of configs/*.yaml")
    return settings


def _unreadable(file: Path, error: OSError) -> str:
    """Why a configuration file cannot be read, with the nearest name in its folder."""
    if isinstance(error, FileNotFoundError):
        guess = nearest(str(file), [str(other) for other in file.parent.glob("*.y*ml")])
        return f"{file} does not exist; " + (f"did you mean --config {guess}?" if guess else "check --config")
    if isinstance(error, IsADirectoryError):
        return f"{file} is a folder; --config needs a YAML file"
    return f"{file} cannot be read ({error.strerror}); check --config"


def _missing_problems(parsed: Parsed, file: Path | None) -> list[str]:
    """Settings without which the action cannot start; ``file`` is the YAML file that was read."""
    config, invalid = parsed.config(), parsed.invalid_keys
    if invalid & {"check_data", *_ON_A_RUN}:
        return []  # nobody knows what is to be done, nor what that needs
    needed = ["dataset", "first_split_size", "other_split_size"]
    needed += [] if config.action == "check_data" else ["schedule"]
    missing = [key for key in needed if OPTIONS[key].value(config) is None and key not in invalid]
    problems = []
    if missing and file is not None:
        problems += [f"{key} is missing: set it in {file} or give --{key}" for key in missing]
    elif missing and config.action not in _ON_A_RUN:
        flags = ", ".join(f"--{key}" for key in missing)
        problems.append(f"--config is missing: give a YAML file, such as {_EXAMPLE_CONFIG} (or {flags})")
    if config.log_dir is None and "log_dir" not in invalid and config.action != "check_data":
        what = "the folder of a finished run" if config.action in _ON_A_RUN else "a folder for the results"
        problems.append(f"--log_dir is missing: give {what}, such as --log_dir outputs/emoji-r")
    return problems


# ----------------------------------------------------------------------------------------------------- help


def argument_parser(epilog: str = "", *, for_help: bool = False) -> argparse.ArgumentParser:
    """The parser that splits a command line, or the one that prints ``--help``.

    The first takes any number of words for every flag, since a wrong number is no reason to overlook what else is
    wrong; :class:`Type` judges it.
    """
    parser = argparse.ArgumentParser(
        prog="python run.py",
        usage="python run.py --config FILE --log_dir FOLDER [--FLAG VALUE ...]",
        description="Continual distillation learning: a frozen ViT teacher and student learn task after task by\n"
        "prompts. Every flag is also a key of the YAML file, except those marked *. A flag beats the file, the\n"
        "file beats the default. A flag that takes 0 or 1 means 1 when it has no value (but not --overwrite).",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this page")
    groups: dict[str, Any] = {}
    for each in OPTIONS.values():
        if each.group not in groups:
            groups[each.group] = parser.add_argument_group(each.group)
        nargs = "*" if not for_help else "+" if each.type.many else "?" if each.type.alone is not None else None
        text = _help_text(each).replace("%", "%%")
        groups[each.group].add_argument(f"--{each.key}", nargs=nargs, metavar=each.type.metavar, help=text)
    return parser


def _help_text(each: Option) -> str:
    """The explanation of one flag."""
    notes = [] if each.type.metavar in ("NAME", "PATH") and " | " not in each.type.allowed else [each.type.allowed]
    if each.default not in (None, ()):
        notes.append(f"default: {_typed(each.default)}")
    if each.paper:
        notes.append(f"paper: {each.paper}")
    return ("" if each.in_yaml else "* ") + each.help + (f" ({'; '.join(notes)})" if notes else "")


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    plain = _plain(value)
    if isinstance(plain, list):
        return " ".join(map(str, plain))
    return str(int(plain)) if isinstance(plain, bool) else str(plain)
