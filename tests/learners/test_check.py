"""The tables' rules and the checks of a configuration that need several values."""

import pytest

from learners import check
from models.prompts import PROMPTS
from models.sizes import known_size
from utils.config import DistillConfig, make_config

BASE, SMALL, LARGE = (known_size(f"vit_{size}_patch16_224") for size in ("base", "small", "large"))
FEWER_TOKENS = known_size("vit_base_patch32_224")


def problems_of(**changes) -> list[str]:
    values = {"dataset": "Icon_R", "first_split_size": 20, "other_split_size": 20, "schedule": (20,)}
    models = {"t_model": "mini_vit_base", "s_model": "mini_vit_small", "kd_prompt_param": (4, 6)}
    return check.check(make_config({**values, **models, "gpuid": (-1,), **changes}))


def test_parameters_become_keywords():
    coda = {"pool": 100, "length": 8, "ortho_weight": 0.0}
    assert PROMPTS["CODAPrompt"].parse((100, 8, 0.0), 10) == (coda, [])
    assert PROMPTS["DualPrompt"].parse((10, 20, 6), 10) == ({"pool": 10, "e_length": 20, "g_length": 6}, [])
    assert PROMPTS["L2P"].parse((30, 20, -1), 10) == ({"pool": 30, "length": 20, "deep": False}, [])
    assert PROMPTS["L2P"].parse((30, 20, 1), 10)[0]["deep"] is True


@pytest.mark.parametrize(
    ("name", "teacher", "student", "kd_prompt_param", "words"),
    [
        ("KD", SMALL, LARGE, (99, 5), []),
        ("none", FEWER_TOKENS, SMALL._replace(image_size=384), (12, 6), []),
        ("ReviewKD", LARGE, BASE, (12, 6), []),
        ("ReviewKD", FEWER_TOKENS, LARGE, (12, 6), ["tokens", "blocks"]),
        ("KD_Token", BASE, SMALL, (12, 6), []),
        ("KD_Token", None, None, (99, 6), []),
        ("KD", BASE, SMALL._replace(image_size=384), (12, 6), ["224 px and --s_model 384 px"]),
    ],
)
def test_requirements_of_kd_methods(name, teacher, student, kd_prompt_param, words):
    problems = check.model_problems(DistillConfig(name, kd_prompt_param), teacher, student)
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True))


def test_pool_is_not_compared_where_all_classes_are_one_task():
    assert problems_of(learner_name="DualPrompt", other_split_size=10, upper_bound_flag=True) == []


def test_nothing_is_said_about_values_that_were_wrong_already():
    wrong = make_config({"dataset": "Icon_R", "first_split_size": 300, "other_split_size": 20, "gpuid": (5, 6)})
    assert check.check(wrong, {"first_split_size", "gpuid"}) == []


def test_gpus(monkeypatch):
    cases = [(1, (0, 1), "no GPU 1 here, only GPU 0"), (2, (1, 2, 3), "no GPU 2 3 here, only GPUs 0 to 1")]
    cases += [(2, (0, 1), None), (None, (7,), None), (0, (-1,), None), (0, None, None)]
    for count, gpuid, words in cases:
        monkeypatch.setattr(check, "cuda_devices", lambda count=count: count)
        problems = problems_of(gpuid=gpuid, batch_size=6)
        assert (problems == []) if words is None else (words in problems[0])


def test_batch_divides_over_gpus_processes_and_parts(monkeypatch):
    monkeypatch.setattr(check, "cuda_devices", lambda: 4)
    assert "by the 3 GPUs of --gpuid: use 63 or 66" in problems_of(gpuid=(0, 1, 2), batch_size=64)[0]
    assert "32 images of a batch on each of 2 GPUs" in problems_of(gpuid=(0, 1), batch_size=64, accumulate=64)[0]
    for name, value in {"RANK": "0", "WORLD_SIZE": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "by the 5 processes: use 60 or 65" in problems_of(batch_size=64)[0]
    assert "by the 5 processes: use 5" in problems_of(batch_size=3)[0]


def test_paper_values_are_filled_in(tmp_path):
    words = "--dataset CIFAR100 --first_split_size 10 --other_split_size 10 --schedule 20 --gpuid -1".split()
    loaded = check.load_checked_config([*words, "--learner_name", "L2P", "--log_dir", str(tmp_path)])
    assert loaded.prompt_param == (30, 20, -1)


def test_seeds_of_a_repeat_need_teachers_each(tmp_path):
    (tmp_path / "seed-1").mkdir()
    problem = f"--teacher_from: there is no folder {tmp_path}/seed-2"
    assert problem in problems_of(teacher_from=tmp_path, repeat=2, random_s=1)[0]
