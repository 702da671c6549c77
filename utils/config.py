"""The settings of a run: default < YAML file < explicit flag, checked together before any work.

Every option is one field of :class:`Config`, which is at once its flag, its YAML key, its rule and its lines
of ``--help``. Flags are split here rather than by argparse, which exits at the first mistake: all mistakes of
the command line, the file and their combination are reported in one go. Importing this module costs no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import textwrap
from collections.abc import Hashable, Mapping, Sequence
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


# ---------------------------------------------------------------------------------------------------- rules


def _show(value: object) -> str:
    """A value as messages show it: short, whatever a file contains."""
    if isinstance(value, (dict, list, tuple, set)):
        return "a list" if isinstance(value, (list, tuple)) else "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(item: object) -> float | int | None:
    """``item`` as a finite number, or None. Strings count: YAML 1.1 reads ``1e-3`` as one."""
    if isinstance(item, bool) or not isinstance(item, (int, float, str)):
        return None
    try:
        number = int(item) if isinstance(item, (int, str)) else item
    except ValueError:
        try:
            number = float(item)
        except ValueError:
            return None
    return number if -1e300 < number < 1e300 else None


@dataclass(frozen=True)
class Rule:
    """What the value of an option may be. ``many`` options take a list of values, others exactly one."""

    many = False

    def describe(self) -> str:
        """The allowed values, as they stand in ``--help`` and after "must be" in messages."""
        raise NotImplementedError

    def read(self, items: Sequence[object]) -> Any:
        """The option's value from words of the command line or scalars of a YAML file.

        Raises:
            ValueError: they are not allowed; the message continues a sentence that starts with the option.
        """
        if len(items) != 1:
            given = "nothing" if not items else f"{len(items)} values ({', '.join(map(_show, items[:4]))})"
            raise ValueError(f"takes one value ({self.describe()}), but {given} was given")
        value = self.one(items[0])
        if value is None:
            raise ValueError(f"must be {self.describe()}, not {_show(items[0])}")
        return value

    def one(self, item: object) -> Any:
        """The value of one item, or None when it is not allowed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Rule):
    """Any text that is not empty."""

    what: str = "a name"

    def describe(self) -> str:
        return self.what

    def one(self, item: object) -> str | None:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            return None
        text = str(item)
        # Longer or with control characters it is no name and no path, but would spoil every message.
        return text if text.strip() and len(text) <= 1000 and min(text) >= " " else None


@dataclass(frozen=True)
class File(Text):
    """A path; ``~`` is the home folder."""

    what: str = "a path"

    def one(self, item: object) -> Path | None:
        text = super().one(item)
        return None if text is None else Path(os.path.expanduser(text))


@dataclass(frozen=True)
class Files(File):
    """One path or several."""

    what: str = "one path or more"
    many = True

    def read(self, items: Sequence[object]) -> tuple[Path, ...]:
        paths = tuple(self.one(item) for item in items)
        if not paths or None in paths:
            raise ValueError(f"must be {self.describe()}")
        return paths


@dataclass(frozen=True)
class Choice(Rule):
    """One of a few names."""

    names: tuple[str, ...]

    def describe(self) -> str:
        return " | ".join(self.names)

    def read(self, items: Sequence[object]) -> str:
        if len(items) == 1 and isinstance(items[0], str):
            if items[0] in self.names:
                return items[0]
            guess = nearest(items[0], list(self.names))
            if guess:
                raise ValueError(f"must be {self.describe()}, not {_show(items[0])}; did you mean {guess}?")
        return super().read(items)

    def one(self, item: object) -> str | None:
        return item if item in self.names else None


@dataclass(frozen=True)
class Switch(Rule):
    """On or off: 1 or 0, true or false. The flag alone means on, unless ``explicit``."""

    explicit: bool = False
    _words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

    def describe(self) -> str:
        return "0 or 1"

    def read(self, items: Sequence[object]) -> bool:
        return True if not items and not self.explicit else super().read(items)

    def one(self, item: object) -> bool | None:
        return self._words.get(str(item).lower()) if isinstance(item, (bool, int, str)) else None


@dataclass(frozen=True)
class Real(Rule):
    """A finite number between bounds; ``above`` and ``below`` leave the bound itself out."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def describe(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f"a number from {self.minimum:g} to {self.maximum:g}"
        bounds = {
            "of at least": self.minimum, "above": self.above, "of at most": self.maximum, "below": self.below,
        }  # fmt: skip
        parts = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
        return " ".join(["a number", " and ".join(parts)]).strip()

    def one(self, item: object) -> float | None:
        number = _number(item)
        if number is None:
            return None
        too_low = (self.minimum is not None and number < self.minimum) or (
            self.above is not None and number <= self.above
        )
        too_high = (self.maximum is not None and number > self.maximum) or (
            self.below is not None and number >= self.below
        )
        return None if too_low or too_high else float(number)


@dataclass(frozen=True)
class Whole(Rule):
    """A whole number of at least ``minimum``; ``also`` is one more value, with a meaning of its own."""

    minimum: int = 0
    also: int | None = None
    maximum: int = 2**31 - 1

    def describe(self) -> str:
        special = "" if self.also is None else f"{self.also} or "
        return f"{special}a whole number of at least {self.minimum}"

    def one(self, item: object) -> int | None:
        number = _number(item)
        if number is None or number != int(number):
            return None
        return int(number) if self.minimum <= number <= self.maximum or number == self.also else None


@dataclass(frozen=True)
class Numbers(Rule):
    """A list of numbers of which each follows ``each``.

    Attributes:
        each: the rule of one number.
        count: how many there must be; None for one or more.
        order: ``increasing``, ``sorted`` (equal ones allowed), ``distinct`` or empty.
    """

    each: Rule
    count: int | None = None
    order: str = ""
    many = True

    def describe(self) -> str:
        many = "one number or more" if self.count is None else f"{self.count} numbers"
        order = {"": "", "increasing": ", increasing", "sorted": ", the smaller first"}.get(
            self.order, ", no two equal"
        )
        return f"{many}, each {self.each.describe()}{order}"

    def read(self, items: Sequence[object]) -> tuple[Any, ...]:
        if not items or self.count not in (None, len(items)):
            raise ValueError(f"must be {self.describe()}, not {len(items)} values")
        values = tuple(self.one(item) for item in items)
        wrong = [_show(item) for item, value in zip(items, values, strict=True) if value is None]
        if wrong:
            raise ValueError(f"must be {self.describe()}, not {', '.join(wrong[:4])}")
        ordered = {
            "": values,
            "increasing": tuple(sorted(set(values))),
            "sorted": tuple(sorted(values)),
            "distinct": tuple(dict.fromkeys(values)),
        }[self.order]
        if values != ordered:
            raise ValueError(f"must be {self.describe()}, not {' '.join(f'{v:g}' for v in values)}")
        return values

    def one(self, item: object) -> Any:
        return self.each.one(item)


# -------------------------------------------------------------------------------------------------- options


class Option(NamedTuple):
    """How a field of :class:`Config` is set: its flag ``--key`` and YAML key, rule and help."""

    name: str
    key: str
    rule: Rule
    group: str
    about: str
    default: Any
    paper: str
    in_yaml: bool
    decides: bool


def _option(
    default: Any, rule: Rule, group: str, about: str, *, key="", paper="", in_yaml=True, decides=True
) -> Any:
    """A dataclass field with its option.

    Args:
        default: value when neither flag nor YAML key is given; None for no value.
        rule, group, about: what is allowed, the part of ``--help`` and the text there.
        key: name of the flag and YAML key where it differs from the field's.
        paper: the paper's value, for ``--help``.
        in_yaml: False for what belongs on the command line only.
        decides: whether the value decides a run's results, so that a resume must not change it.
    """
    option = {"rule": rule, "group": group, "about": about, "key": key, "paper": paper, "in_yaml": in_yaml}
    return field(default=default, metadata={**option, "decides": decides and in_yaml})


RUN, METHOD, MODELS, DATA = "Run", "Method", "Models", "Data"
TRAINING, DEVICES, LOGGING, USE = "Training", "Devices", "Logging", "Instead of training"
# What a saved args.yaml says of the machine and the start of its run, of no meaning to the use of its models.
_OF_TRAINING = ("gpuid", "device", "init_from")
_NEEDED = ("dataset", "first_split_size", "other_split_size", "schedule")
_EXAMPLE_CONFIG = "configs/emoji-r_prompt.yaml"
_ON_A_RUN = ("eval_only", "export", "predict")
_ACTIONS = {"check_data": "check_data", "eval_only": "eval_only", "export": "export_path",
            "predict": "predict_images"}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """All settings of a run under readable names; modules get plain values, never this object."""

    config: Path | None = _option(
        None, File("a YAML file"), RUN, "YAML file with any of these settings", in_yaml=False)
    log_dir: Path | None = _option(
        None, File("a folder"), RUN, "folder of the run's results; needed for training", decides=False)
    overwrite: bool = _option(
        False, Switch(explicit=True), RUN, "0 resumes what log_dir holds, 1 starts anew", decides=False)
    seed: int = _option(
        1, Whole(0, maximum=2**32 - 1), RUN, "seed of all random numbers", key="random_s")
    repeat: int = _option(
        1, Whole(1), RUN, "run this many seeds, each in its folder log_dir/seed-<s>", decides=False)
    max_task: int = _option(-1, Whole(1, also=-1), RUN, "stop after this many tasks; -1 runs all", paper="-1")
    debug_mode: int = _option(
        0, Whole(0), RUN, "accepted from the original, without effect", decides=False)

    learner_type: str = _option("prompt", Choice(("prompt",)), METHOD, "family of learners", paper="prompt")
    learner_name: str = _option("CODAPrompt", Text("a learner"), METHOD, "prompt pool",
        paper="each of them")
    prompt_param: tuple[float, ...] | None = _option(
        None, Numbers(Real()), METHOD, "parameters of the prompt pool; default: the paper's")
    kd_method: str = _option(
        "KD", Text("a KD method"), METHOD, "how the student learns from the teacher", key="KD_method",
        paper="KDP, beside each other one")
    kd_prompt_param: tuple[int, int] = _option(
        (12, 6), Numbers(Whole(1), count=2), METHOD,
        "KD_Token: number of student blocks and length (even) of the KD prompts", paper="12 6")
    kd_alpha: float = _option(
        0.5, Real(0, 1), METHOD, "weight of distillation; cross-entropy gets the rest", paper="0.5")
    temperature: float = _option(
        2.0, Real(above=0), METHOD, "temperature of the softened logits", key="Soft_T", paper="2")
    aux_loss_scale: float = _option(
        1.0, Real(0), METHOD, "factor of prompt and feature losses", paper="2, as its two GPUs added theirs")

    teacher_model: str = _option(
        "vit_base_patch16_224", Text("a model"), MODELS, "teacher: a ViT of timm, or mini_vit_base",
        key="t_model", paper="vit_base_patch16_224 or vit_large_patch16_224")
    student_model: str = _option(
        "vit_small_patch16_224", Text("a model"), MODELS, "student: a ViT of timm, or mini_vit_small",
        key="s_model", paper="vit_small_patch16_224 or vit_base_patch16_224")
    teacher_weights: Path | None = _option(
        None, File("a file"), MODELS, "the teacher's weights from a file (.pth, .safetensors, .npz); default: its own",
        key="t_weights")
    student_weights: Path | None = _option(
        None, File("a file"), MODELS, "the student's weights from a file; default: its own",
        key="s_weights")
    teacher_from: Path | None = _option(
        None, File("a folder"), MODELS, "log_dir of a run with another KD method: take its trained teachers, which"
        " are the same, instead of training them again", in_yaml=False)
    init_from: Path | None = _option(
        None, File("a folder"), MODELS, "folder with T_class.pth and S_class.pth to start from")

    dataset: str | None = _option(None, Text("a data set"), DATA, "data set",
        paper="CIFAR100, ImageNet_R")
    dataroot: Path = _option(
        Path("data"), File("a folder"), DATA, "folder of the data sets (not used by Emoji_R)", decides=False)
    data_url: str | None = _option(
        None, Text("a URL"), DATA, "another place to download the data set from; default: its own",
        decides=False)
    first_split_size: int | None = _option(
        None, Whole(1), DATA, "classes of the first task", paper="10 (CIFAR-100), 20 (ImageNet-R)")
    other_split_size: int | None = _option(
        None, Whole(1), DATA, "classes of every other task", paper="10 (CIFAR-100), 20 (ImageNet-R)")
    class_order: str = _option(
        "natural", Choice(("natural", "shuffled")), DATA, "order in which classes come", paper="natural")
    validation: bool = _option(
        False, Switch(), DATA, "test on a seeded fifth of the training set", paper="0")
    upper_bound: bool = _option(
        False, Switch(), DATA, "one task with all classes", key="upper_bound_flag", paper="0")
    memory: int = _option(0, Whole(0), DATA, "number of past images kept for replay", paper="0")
    class_weighting: bool = _option(
        False, Switch(), DATA, "weight classes by their number of images when replaying", key="DW", paper="0")
    train_aug: bool = _option(True, Switch(), DATA, "random crops and flips in training", paper="1")
    crop_scale: tuple[float, float] = _option(
        (0.08, 1.0), Numbers(Real(above=0, maximum=1), count=2, order="sorted"), DATA,
        "share of the image's area that a random crop covers", paper="0.08 1.0")
    rand_split: bool = _option(
        False, Switch(), DATA, "accepted from the original, without effect", decides=False)
    workers: int = _option(
        4, Whole(0), DATA, "processes that load data; 0 loads in the main one", decides=False)
    model_type: str | None = _option(
        None, Text(), DATA, "accepted from the original, without effect", decides=False)
    model_name: str | None = _option(
        None, Text(), DATA, "accepted from the original, without effect", decides=False)

    schedule: tuple[int, ...] | None = _option(
        None, Numbers(Whole(1), order="increasing"), TRAINING,
        "epochs per task of teacher and of student (the last number; the others are steps of decay)",
        paper="20 (CIFAR-100), 35 (ImageNet-R)")
    schedule_type: str = _option(
        "cosine", Choice(("cosine", "decay")), TRAINING, "course of the learning rate", paper="cosine")
    batch_size: int = _option(
        64, Whole(1), TRAINING, "images per step, over all devices", paper="64; 32 with ViT-Large teachers")
    optimizer: str = _option(
        "Adam", Choice(("Adam", "amsgrad", "SGD", "RMSprop", "Rprop")), TRAINING, "optimizer", paper="Adam")
    lr: float = _option(1e-3, Real(above=0), TRAINING, "learning rate", paper="0.001")
    momentum: float = _option(
        0.9, Real(0, below=1), TRAINING, "momentum, and Adam's first beta", paper="0.9")
    weight_decay: float = _option(0.0, Real(0), TRAINING, "weight decay", paper="0")

    gpuid: tuple[int, ...] | None = _option(
        None, Numbers(Whole(0, also=-1), order="distinct"), DEVICES,
        "GPUs to use; -1 is the CPU; default: GPU 0 if there is one, else the CPU", paper="0 1",
        decides=False)
    device: str | None = _option(
        None, Choice(("cpu", "cuda", "mps")), DEVICES,
        "kind of device, instead of --gpuid; default: what --gpuid says", decides=False)
    precision: str = _option(
        "fp32", Choice(("fp32", "tf32", "bf16", "fp16")), DEVICES, "arithmetic of the backbones",
        paper="fp32")
    compile: bool = _option(False, Switch(), DEVICES, "use torch.compile", decides=False)
    accumulate: int = _option(
        1, Whole(1), DEVICES, "split each batch into this many parts, to save memory", decides=False)

    no_progress: bool = _option(
        False, Switch(), LOGGING, "plain lines instead of progress bars", decides=False)
    tensorboard: bool = _option(False, Switch(), LOGGING, "also write TensorBoard files", decides=False)
    log_interval: int = _option(
        10, Whole(1), LOGGING, "steps between two readings of the losses", decides=False)

    export_path: Path | None = _option(
        None, File("a file .safetensors or .pt2"), USE, "write the trained student of --log_dir to this file",
        key="export", in_yaml=False)
    predict_images: tuple[Path, ...] = _option(
        (), Files("one image or more"), USE, "name what these images show, with the student of --log_dir",
        key="predict", in_yaml=False)
    check_data: bool = _option(
        False, Switch(), USE, "only check every image of the data set", in_yaml=False)
    eval_only: bool = _option(
        False, Switch(), USE, "only evaluate the saved models of --log_dir again", in_yaml=False)
    top: int = _option(
        5, Whole(1), USE, "how many classes --predict names", in_yaml=False)  # fmt: skip

    @property
    def action(self) -> str:
        """What to do: ``train``, or ``check_data``, ``eval_only``, ``export``, ``predict`` when asked for."""
        return self.actions[0] if self.actions else "train"

    @property
    def actions(self) -> tuple[str, ...]:
        """All that the flags ask for instead of training; more than one makes no sense."""
        return tuple(action for action, name in _ACTIONS.items() if getattr(self, name))

    @property
    def epochs(self) -> int:
        """Epochs per task of the teacher and of the student (0 without a schedule)."""
        return self.schedule[-1] if self.schedule else 0

    @property
    def without_effect(self) -> tuple[str, ...]:
        """The keys of the original that were set although they have no effect."""
        keys = ("model_type", "model_name", "rand_split", "debug_mode")
        return tuple(key for key in keys if getattr(self, key))

    def to_yaml_dict(self) -> dict[str, Any]:
        """All settings as plain values under their YAML keys; written to a file they are a ``--config``."""
        # Starting anew is a wish of one call: a file that says so would wipe every later resume.
        options = (option for option in OPTIONS.values() if option.in_yaml and option.name != "overwrite")
        return {option.key: _plain(getattr(self, option.name)) for option in options}

    def result_settings(self) -> dict[str, Any]:
        """The part of :meth:`to_yaml_dict` that decides the results: no folders, devices or logging."""
        settings = self.to_yaml_dict()
        return {option.key: settings[option.key] for option in OPTIONS.values() if option.decides}

    def settings_hash(self, without_seed: bool = False) -> str:
        """A hash of :meth:`result_settings`; ``without_seed`` makes it equal for runs of different seeds."""
        settings = self.result_settings()
        if without_seed:
            del settings["random_s"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def for_seed(self, seed: int) -> Config:
        """The configuration of one seed of ``--repeat``, in a folder of its own."""
        folders = {
            name: None if folder is None else folder / f"seed-{seed}"
            for name, folder in (("log_dir", self.log_dir), ("teacher_from", self.teacher_from))
        }
        return dataclasses.replace(self, seed=seed, repeat=1, **folders)


def _plain(value: Any) -> Any:
    """A setting as YAML and JSON write it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


OPTIONS: dict[str, Option] = {
    (each.metadata["key"] or each.name): Option(
        name=each.name, default=each.default, **{**each.metadata, "key": each.metadata["key"] or each.name}
    )
    for each in dataclasses.fields(Config)
    if each.metadata
}
"""Flag without its dashes = YAML key -> option, in the order of ``--help``."""

# -------------------------------------------------------------------------------------------------- reading


@dataclass
class Parsed:
    """What was read so far.

    Attributes:
        values: field name -> value, without those that were wrong.
        problems: one sentence for each mistake.
        wrong: fields whose value is unknown because it was wrong.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)

    def read(self, option: Option, label: str, items: Sequence[object]) -> None:
        """Read one option's value; ``label`` is what messages call the option."""
        try:
            self.values[option.name] = option.rule.read(items)
            self.wrong.discard(option.name)
        except ValueError as error:
            self.wrong.add(option.name)
            self.problems.append(f"{label} {error}")

    def config(self) -> Config:
        """The configuration, with defaults in place of what is missing or wrong."""
        return Config(**self.values)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the command line asks for ``--help``."""
    return "--help" in argv or "-h" in argv


def load_config(argv: Sequence[str]) -> Config:
    """Read a command line and the YAML file it names, and check each value by itself.

    Raises:
        ConfigError: with all problems at once. What depends on several values, on tables of other packages or
            on the machine is checked by ``learners.check``, not here.
    """
    parsed = parse_config(argv)
    if parsed.problems:
        raise ConfigError(parsed.problems)
    return parsed.config()


def parse_config(argv: Sequence[str]) -> Parsed:
    """As :func:`load_config`, but hands over what could be read along with the problems."""
    flags = Parsed()
    for key, words in _split_flags(argv, flags.problems).items():
        flags.read(OPTIONS[key], f"--{key}", words)
    parsed = Parsed()
    path, saved, readable = _file_to_read(flags.config()), False, False
    if path is not None:
        saved = "config" not in flags.values
        readable = _read_yaml(path, parsed, saved=saved)
    parsed.values.update(flags.values)
    parsed.wrong = (parsed.wrong - set(flags.values)) | flags.wrong
    parsed.problems = flags.problems + parsed.problems
    if readable or (path is None and "config" not in flags.wrong):
        parsed.problems += _missing_problems(parsed, path)
    return parsed


def _file_to_read(flags: Config) -> Path | None:
    """The file with the settings: ``--config``, or what a finished run wrote down about itself."""
    if flags.config is None and flags.action in _ON_A_RUN and flags.log_dir is not None:
        return flags.log_dir / "args.yaml"
    return flags.config


def _split_flags(argv: Sequence[str], problems: list[str]) -> dict[str, list[str]]:
    """Words of each known flag; a repeated flag counts as given last, as in argparse."""
    found: dict[str, list[str]] = {}
    words: list[str] | None = None
    for word in argv:
        # A single dash can start a negative number; a path may not start with one (--flag=-path can).
        if not word.startswith("-") or (not word.startswith("--") and _number(word) is not None):
            if words is None:
                problems.append(f"{_show(word)} follows no flag; see --help")
            else:
                words.append(word)
            continue
        name, has_value, value = word.removeprefix("--").partition("=")
        words = [value] if has_value else []
        if word.startswith("--") and name in OPTIONS:
            found[name] = words
        else:
            guess = nearest(name.lstrip("-"), list(OPTIONS))
            hint = f"did you mean --{guess}?" if guess else "see --help"
            problems.append(f"unknown flag {_show(word.partition('=')[0])[1:-1]}; {hint}")
    return found


def _read_yaml(path: Path, parsed: Parsed, *, saved: bool) -> bool:
    """Read a YAML file into ``parsed`` and say whether that was possible.

    A file ``saved`` by a run may come from a machine with other devices and folders, so these are left out.
    """
    if saved and not path.exists():
        parsed.problems.append(f"--log_dir: {path.parent} is not the folder of a run, it has no {path.name}")
        return False
    settings, problem = _load_yaml(path)
    if problem:
        parsed.problems.append(problem)
        return False
    for key, value in settings.items():
        option = OPTIONS.get(key) if isinstance(key, str) else None
        if option is None:
            guess = nearest(str(key), [key for key, other in OPTIONS.items() if other.in_yaml])
            hint = f"; did you mean {guess}?" if guess else "; see --help for all keys"
            parsed.problems.append(f"unknown key {_show(key)} in {path}{hint}")
        elif not option.in_yaml:
            parsed.problems.append(f"{key} in {path} belongs on the command line, as --{key}")
        elif value is None and option.default is not None:
            parsed.wrong.add(option.name)
            parsed.problems.append(f"{key} in {path} has no value; it must be {option.rule.describe()}")
        elif value is not None and not (saved and key in _OF_TRAINING):
            parsed.read(option, f"{key} in {path}", value if isinstance(value, list) else [value])
    return True


_LARGEST_FILE = 1 << 15  # a configuration has 2 KiB; PyYAML takes seconds for megabytes


def _load_yaml(path: Path) -> tuple[dict[Any, Any], str]:
    """The mapping in a YAML file, and what is wrong with the file (or an empty text)."""
    # PyYAML is loaded here, so that --help works before the packages are installed.
    import yaml

    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        return {}, _unreadable(path, error)
    if len(data) > _LARGEST_FILE:
        return {}, f"{path} is larger than 32 KiB, so it is no configuration; --config needs a YAML file"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return {}, f"{path} is not a text file; --config needs a YAML file"
    try:
        settings = yaml.load(text, Loader=_unique_key_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        return {}, f"{path} is not valid YAML ({line}{reason}); mend it or copy one of configs/*.yaml"
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return {}, f"{path} is not valid YAML ({reason}); mend it or copy one of configs/*.yaml"
    if settings is None:
        return {}, f"{path} is empty; copy one of configs/*.yaml"
    if not isinstance(settings, dict):
        return {}, f"{path} must hold lines 'key: value', not {_show(settings)}; copy one of configs/*.yaml"
    return settings, ""


def _unreadable(path: Path, error: OSError) -> str:
    """Why a configuration file cannot be read, with the nearest name in its folder."""
    if isinstance(error, FileNotFoundError):
        near = [str(other) for pattern in ("*.yaml", "*.yml") for other in path.parent.glob(pattern)]
        guess = nearest(str(path), near)
        return f"{path} does not exist; " + (f"did you mean --config {guess}?" if guess else "check --config")
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder; --config needs a YAML file"
    return f"{path} cannot be read ({error.strerror}); check --config"


def _unique_key_loader() -> type:
    """PyYAML's safe loader, which makes plain values only, refusing a key that stands twice."""
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {_show(key)} stands twice", key_node.start_mark
                    )
                if isinstance(key, Hashable):
                    seen.add(key)
            return super().construct_mapping(node, deep)

    return UniqueKeyLoader


def _missing_problems(parsed: Parsed, path: Path | None) -> list[str]:
    """Settings without which the action cannot start; ``path`` is the YAML file that was read."""
    config, problems = parsed.config(), []
    if parsed.wrong & set(_ACTIONS.values()):
        return []  # what is to be done is not known, nor what that needs
    needs = _NEEDED[:3] if config.action == "check_data" else _NEEDED
    missing = [name for name in needs if getattr(config, name) is None and name not in parsed.wrong]
    if missing and path is not None:
        problems += [f"{name} is missing: set it in {path} or give --{name}" for name in missing]
    elif missing and config.action not in _ON_A_RUN:
        flags = ", ".join(f"--{name}" for name in missing)
        problems.append(f"--config is missing: give a YAML file, such as {_EXAMPLE_CONFIG} (or {flags})")
    if config.log_dir is None and "log_dir" not in parsed.wrong and config.action != "check_data":
        what = "the folder of a finished run" if config.action in _ON_A_RUN else "a folder for the results"
        problems.append(f"--log_dir is missing: give {what}, such as --log_dir outputs/emoji-r")
    return problems


# ----------------------------------------------------------------------------------------------------- help


def help_text(choices: Mapping[str, Sequence[tuple[str, str]]] | None = None) -> str:
    """The text of ``--help``: all flags by group, with ranges, defaults and the paper's values.

    Args:
        choices: flag without dashes -> (name, description) of each choice, from tables above this package.
    """
    lines = [
        "usage: python run.py --config FILE --log_dir FOLDER [--FLAG VALUE ...]",
        "",
        "Continual distillation learning: a frozen ViT teacher and student learn task after task by prompts.",
        "Every flag is also a key of the YAML file, except those marked *. A flag beats the file, the file",
        "beats the default. A flag that takes 0 or 1 means 1 when it stands alone (but not --overwrite).",
    ]
    group = None
    for option in OPTIONS.values():
        if option.group != group:
            group = option.group
            lines += ["", f"{group}:"]
        lines += _help_lines(option, (choices or {}).get(option.key, ()))
    return "\n".join(lines) + "\n"


def _help_lines(option: Option, choices: Sequence[tuple[str, str]]) -> list[str]:
    """The lines of one flag."""
    notes = [] if isinstance(option.rule, Text) else [option.rule.describe()]
    if option.default not in (None, ()):
        notes.append(f"default: {_typed(option.default)}")
    if option.paper:
        notes.append(f"paper: {option.paper}")
    text = option.about + (f" ({'; '.join(notes)})" if notes else "")
    head = f"  --{option.key}{'' if option.in_yaml else ' *'}".ljust(22) + "  "
    lines = textwrap.wrap(text, 108, initial_indent=head, subsequent_indent=" " * 24)
    for name, about in choices:
        start = f"{' ' * 26}{name}: "
        lines += textwrap.wrap(about, 108, initial_indent=start, subsequent_indent=" " * 28)
    return lines


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    plain = _plain(value)
    if isinstance(plain, list):
        return " ".join(map(str, plain))
    return str(int(plain)) if isinstance(plain, bool) else str(plain)
