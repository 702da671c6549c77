"""Arithmetic is counted without touching a run, and queries of test images are computed once."""

import pytest
import torch

from learners.build import build_run
from learners.check import load_checked_config
from learners.evaluate import evaluate
from learners.learner import TaskTraining
from learners.speed import count_flops, flop_per_image
from models.vit import PromptedViT
from tests import runs
from tests.learners import small
from tests.learners.small import batch_of, classes_of
from utils.parallel import Parallel


def test_of_a_product():
    assert count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


@pytest.mark.parametrize(("learner_name", "kd_method"), small.EACH)
def test_counting_changes_nothing_and_counts_a_step(learner_name, kd_method):
    learner = small.learner(learner_name, kd_method)
    for role in learner.roles:
        training: TaskTraining = learner.begin_training(role, classes_of(0))
        before, state = small.snapshot(training.step), torch.get_rng_state()
        counted = flop_per_image(learner, training)
        assert not small.changed(training.step, before) and torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in training.step.parameters())
        whole = count_flops(lambda training=training: training.train_step(*batch_of(0)))
        assert counted == pytest.approx(whole / small.BATCH, rel=0.02)  # what does not depend on the images
        training.optimizer.zero_grad()
    with torch.no_grad():
        whole = count_flops(lambda: learner.eval_step()(*batch_of(0), 2))
    known = flop_per_image(learner)  # with the query of an earlier evaluation
    assert known < whole / small.BATCH if learner.student.prompt.needs_query else known == whole / small.BATCH


def test_queries_of_test_images_are_kept(config, tmp_path, monkeypatch):
    """The second evaluation of a task takes two passes of a backbone, not three, and gives the same."""
    argv = runs.arguments(config, tmp_path / "run")
    run = build_run(load_checked_config(argv), Parallel(torch.device("cpu")))
    passes, real = [], PromptedViT.forward
    monkeypatch.setattr(PromptedViT, "forward", lambda *inputs, **more: passes.append(1) or real(*inputs, **more))
    results = []
    for task, number in ((0, 3), (0, 2), (1, 5), (1, 4)):
        passes.clear()
        results.append(evaluate(run, task))
        assert len(passes) == number
    assert results[0] == results[1] and results[2] == results[3]
