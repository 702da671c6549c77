"""NoPrompt: a linear classifier on the frozen backbone."""

import torch

from tests.learners import small


def test_the_head_alone_is_trained_on_the_backbones_features():
    learner = small.learner("NoPrompt", "none")
    training = learner.begin_training("student", small.classes_of(0))
    assert {id(parameter) for parameter in training.parameters} == {id(p) for p in learner.student.last.parameters()}
    images, _ = small.batch_of(0)
    with torch.no_grad():
        features = learner.query_vit(learner.query_vit.embed(images)).cls
        expected = learner.student.last(features)[:, :2]
        torch.testing.assert_close(learner.eval_step().answer(images, 2)[1]["student"], expected)
