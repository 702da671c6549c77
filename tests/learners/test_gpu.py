"""Properties that only a GPU can show; skipped where there is none."""

import pytest
import torch

from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from tests.learners import small
from tests.learners.small import batch_of, classes_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def without_waiting(function, *arguments):
    """Anything in the call that makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduced", [None, torch.bfloat16])
@pytest.mark.parametrize("kd_method", DISTILLERS)
@pytest.mark.parametrize("learner_name", PROMPTS)
def test_no_step_waits_for_the_gpu(learner_name, kd_method, reduced):
    learner = small.learner(learner_name, kd_method, device="cuda", reduced=reduced)
    images, targets = (part.cuda() for part in batch_of(0))
    for role in learner.roles:
        training = learner.begin_training(role, classes_of(0))
        training.begin_epoch(0)
        training.train_step(images, targets)  # the first step makes the optimizer's state
        without_waiting(training.train_step, images, targets)
    evaluate = learner.evaluator()
    with torch.inference_mode():
        evaluate(images, targets, 2)
        without_waiting(evaluate, images, targets, 2)
