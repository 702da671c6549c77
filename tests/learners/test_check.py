"""The tables' rules and the checks of a configuration that need several values."""

import dataclasses
import sys

import pytest

from learners import check
from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from models.sizes import ViTSize, known_size
from utils.config import Config, ConfigError

BASE, SMALL, LARGE = (known_size(f"vit_{size}_patch16_224") for size in ("base", "small", "large"))
FEWER_TOKENS = known_size("vit_base_patch32_224")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Weights are taken as given unless a test says otherwise; nobody asks the hub."""
    monkeypatch.setattr(check, "missing_weights", lambda name, weights=None: None)


def config(**changes) -> Config:
    values = {"dataset": "Emoji_R", "first_split_size": 20, "other_split_size": 20, "schedule": (20,)}
    models = {"teacher_model": "mini_vit_base", "student_model": "mini_vit_small", "kd_prompt_param": (4, 6)}
    return Config(**{**values, **models, "gpuid": (-1,), **changes})


def problem_of(**changes) -> str:
    problems = check.check(config(**changes))
    assert len(problems) == 1, problems
    return problems[0]


def test_parameters_become_keywords():
    coda = {"pool": 100, "length": 8, "ortho_weight": 0.0}
    assert PROMPTS["CODAPrompt"].parse((100, 8, 0.0), 10) == (coda, [])
    assert PROMPTS["DualPrompt"].parse((10, 20, 6), 10) == ({"pool": 10, "e_length": 20, "g_length": 6}, [])
    assert PROMPTS["L2P"].parse((30, 20, -1), 10) == ({"pool": 30, "length": 20, "deep": False}, [])
    assert PROMPTS["L2P"].parse((30, 20, 1), 10)[0]["deep"] is True


@pytest.mark.parametrize("name", PROMPTS)
def test_the_papers_parameters_are_allowed(name):
    entry = PROMPTS[name]
    keywords, problems = entry.parse(entry.paper, 10)
    assert problems == [] and len(keywords) == len(entry.fields)


def test_unknown_number_of_tasks_skips_only_what_needs_it():
    assert PROMPTS["DualPrompt"].parse((1, 3, 6), None)[1] == PROMPTS["DualPrompt"].parse((1, 3, 6), 1)[1]


@pytest.mark.parametrize(
    ("name", "teacher", "student", "kd_prompt_param", "words"),
    [
        ("KD", BASE, SMALL, (12, 6), []),
        ("KD", SMALL, LARGE, (99, 5), []),
        ("none", FEWER_TOKENS, SMALL._replace(image_size=384), (12, 6), []),
        ("FitNets", BASE, SMALL, (12, 6), []),
        ("FitNets", FEWER_TOKENS, SMALL, (12, 6), ["equally many tokens, but have 50"]),
        ("ReviewKD", LARGE, BASE, (12, 6), []),
        ("ReviewKD", SMALL, LARGE, (12, 6), ["12 (--t_model) against 24"]),
        ("ReviewKD", FEWER_TOKENS, LARGE, (12, 6), ["tokens", "blocks"]),
        ("KD_Token", BASE, SMALL, (12, 6), []),
        ("KD_Token", BASE, SMALL, (1, 2), []),
        ("KD_Token", BASE, SMALL, (13, 6), ["must be 1 to 12"]),
        ("KD_Token", BASE, SMALL, (12, 7), ["must be even"]),
        ("KD_Token", None, None, (99, 6), []),
        ("KD", BASE, SMALL._replace(image_size=384), (12, 6), ["224 px and --s_model 384 px"]),
    ],
)
def test_requirements_of_kd_methods(name, teacher, student, kd_prompt_param, words):
    problems = check.size_problems(name, kd_prompt_param, teacher, student)
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True))


@pytest.mark.parametrize("name", DISTILLERS)
def test_classes_and_table_agree_on_the_teacher(name):
    pytest.importorskip(DISTILLERS[name].path.partition(":")[0])
    assert DISTILLERS.load(name).needs_teacher == DISTILLERS[name].needs_teacher


@pytest.mark.parametrize(
    ("arguments", "tasks"),
    [((100, 10, 10), 10), ((100, 50, 10), 6), ((100, 10, 40), 4), ((9, 9, 7), 1), ((100, 10, 10, True), 1)],
)
def test_number_of_tasks(arguments, tasks):
    assert check.num_tasks_of(*arguments) == tasks


def test_a_good_configuration_has_no_problems():
    assert check.check(config()) == []


def test_pool_is_compared_with_the_number_of_tasks():
    assert "number of tasks, 20" in problem_of(
        learner_name="DualPrompt", first_split_size=10, other_split_size=10
    )
    assert check.check(config(learner_name="DualPrompt", other_split_size=10, upper_bound=True)) == []


def test_nothing_is_said_about_what_was_wrong_already():
    wrong = config(first_split_size=300, gpuid=(5, 6))
    assert check.check(wrong, wrong={"first_split_size", "gpuid"}) == []


@pytest.mark.parametrize(
    ("count", "gpuid", "words"),
    [
        (0, (0,), "no CUDA device here; use --gpuid -1"),
        (0, (0, 1), "no CUDA device here"),
        (1, (0, 1), "no GPU 1 here, only GPU 0"),
        (2, (1, 2, 3), "no GPU 2 3 here, only GPUs 0 to 1"),
    ],
)
def test_gpus_that_are_not_there(monkeypatch, count, gpuid, words):
    monkeypatch.setattr(check, "cuda_devices", lambda: count)
    assert words in problem_of(gpuid=gpuid, batch_size=6)


@pytest.mark.parametrize(("count", "gpuid"), [(2, (0, 1)), (1, (0,)), (None, (7,)), (0, (-1,)), (0, None)])
def test_gpus_that_are_there(monkeypatch, count, gpuid):
    monkeypatch.setattr(check, "cuda_devices", lambda: count)
    assert check.check(config(gpuid=gpuid)) == []


def test_batch_divides_over_gpus_processes_and_parts(monkeypatch):
    monkeypatch.setattr(check, "cuda_devices", lambda: 4)
    assert "by the 3 GPUs of --gpuid: use 63 or 66" in problem_of(gpuid=(0, 1, 2), batch_size=64)
    assert "use for example 4" in problem_of(batch_size=64, accumulate=7)
    assert "32 images of a batch on each of 2 GPUs" in problem_of(gpuid=(0, 1), batch_size=64, accumulate=64)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "5"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert "by the 5 processes: use 60 or 65" in problem_of(batch_size=64)
    assert "by the 5 processes: use 5" in problem_of(batch_size=3)


def test_folder_is_tried_without_leaving_anything(tmp_path):
    assert check.check(config(log_dir=tmp_path / "a" / "b")) == []
    assert list(tmp_path.iterdir()) == []


def test_sizes_unknown_by_name_are_checked_when_they_are_known():
    assert check.check(config(teacher_model="vit_base_patch14_dinov2", kd_method="FitNets")) == []
    dinov2 = ViTSize(768, 12, 12, 518, 14, 1370)
    assert len(check.size_problems("FitNets", (4, 6), dinov2, known_size("mini_vit_small"))) == 2


EMOJI = "--dataset Emoji_R --first_split_size 20 --other_split_size 20 --schedule 1 --gpuid -1 --log_dir x".split()


def test_missing_weights_of_both_models_are_named(monkeypatch):
    monkeypatch.setattr(check, "missing_weights", lambda name, weights=None: f"no weights of {name}")
    with pytest.raises(ConfigError) as error:
        check.load_checked_config(EMOJI)
    assert [problem.split(":")[0] for problem in error.value.problems] == ["--t_model", "--s_model"]
    with pytest.raises(ConfigError) as error:
        check.load_checked_config([*EMOJI, "--KD_method", "none"])
    assert len(error.value.problems) == 1


def test_missing_weights_and_data_are_named_together(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "missing_weights", lambda name, weights=None: f"no weights of {name}")
    with pytest.raises(ConfigError) as error:
        check.load_checked_config([*EMOJI, "--dataset", "ImageNet_R", "--dataroot", str(tmp_path)])
    assert len(error.value.problems) == 3 and str(tmp_path) in error.value.problems[0]


def test_nobody_is_asked_for_weights_while_there_are_other_mistakes(monkeypatch):
    monkeypatch.setattr(check, "missing_weights", lambda *model: pytest.fail("asked"))
    with pytest.raises(ConfigError):
        check.load_checked_config([*EMOJI, "--lr", "0"])
    check.load_checked_config([*EMOJI, "--check_data"])


def test_paper_values_are_filled_in(tmp_path):
    words = "--dataset CIFAR100 --first_split_size 10 --other_split_size 10 --schedule 20 --gpuid -1".split()
    loaded = check.load_checked_config([*words, "--learner_name", "L2P", "--log_dir", str(tmp_path)])
    assert loaded.prompt_param == (30, 20, -1)
    assert dataclasses.replace(loaded, prompt_param=None).prompt_param is None


def test_a_tensorboard_that_cannot_be_loaded(monkeypatch, tmp_path):
    package = tmp_path / "tensorboard"
    package.mkdir()
    (package / "__init__.py").write_text("raise AttributeError('np.bool8 is gone')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    reason = "AttributeError: np.bool8 is gone"
    assert f"--tensorboard: the package cannot be loaded ({reason})" in problem_of(tensorboard=True)
