"""A batch computed in parts is the whole batch; tests/utils/test_parallel.py has it for replicas and processes."""

import itertools

import pytest
import torch

from models.prompts import PROMPTS
from tests.learners import small
from tests.learners.small import batch_of, classes_of


@pytest.mark.parametrize(("learner_name", "kd_method"), list(itertools.product(PROMPTS, small.MEANS)))
def test_accumulation(learner_name, kd_method):
    """In the second task, in which past components, heads and a trained teacher matter."""
    results = []
    for parts in (1, 2):
        prompt_param = (7, 4, 0.1) if learner_name == "CODAPrompt" else None
        options = {"prompt_param": prompt_param, "dtype": torch.float64, "aux_loss_scale": 2.0, "accumulate": parts}
        learner = small.learner(learner_name, kd_method, **options)
        learner.begin_task(1)
        results.append([])
        for role in learner.roles:
            training = learner.begin_training(role, classes_of(1))
            results[-1].append(training.train_step(*batch_of(1, torch.float64, size=8)))
            results[-1] += [parameter.grad.clone() for parameter in training.parameters]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9, check_dtype=False)
