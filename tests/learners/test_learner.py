"""Training of both models, for every pair of learner and KD method: what moves and what must not."""

import shutil

import pytest
import torch

from learners.build import BlockCompiler
from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from tests.learners import small
from tests.learners.small import batch_of, changed, classes_of, snapshot

PAIRS = [(learner, method) for learner in PROMPTS for method in DISTILLERS]
ROLES = ("teacher", "student")


def train(learner, task: int, role: str, steps: int = 2):
    """A few steps of training one model on a task; returns the last result."""
    training = learner.begin_training(role, classes_of(task))
    training.begin_epoch(0)
    for step in range(steps):
        result = training.train_step(*batch_of(task, seed=step))
    return result


def logits_of(learner, images, seen: int):
    with torch.no_grad():
        return learner.eval_step().answer(images, seen)[1]


@pytest.mark.parametrize(("learner_name", "kd_method"), PAIRS)
def test_training_moves_one_model_and_leaves_the_rest(learner_name, kd_method):
    learner = small.learner(learner_name, kd_method)
    for task in range(2):
        learner.begin_task(task)
        for trained_role in learner.roles:
            models = {role: snapshot(model) for role, model in learner.models.items()}
            distiller = snapshot(learner.distiller)
            result = train(learner, task, trained_role)
            assert all(value.isfinite() for value in (result.loss, result.gradient, *result.terms.values()))
            assert result.loss > 0 and result.gradient > 0
            for role, model in learner.models.items():
                names = changed(model, models[role])
                assert not any(name.startswith("vit.") for name in names)
                if role != trained_role:
                    assert not names
                    continue
                assert any(name.startswith("prompt.") for name in names) == bool([*model.prompt.parameters()])
                assert names >= {"last.weight", "last.bias"}
                moved = (model.last.weight != models[role]["last.weight"]).any(dim=1).tolist()
                assert moved == [label in range(*classes_of(task)) for label in range(small.CLASSES)]
            trained = {name for name, p in learner.distiller.named_parameters() if p.requires_grad}
            assert changed(learner.distiller, distiller) == (trained if trained_role == "student" else set())


@pytest.mark.parametrize("kd_method", DISTILLERS)
def test_past_components_of_coda_do_not_move(kd_method):
    learner = small.learner("CODAPrompt", kd_method, prompt_param=(7, 4, 0.1))
    for role in learner.roles:
        train(learner, 0, role)
    learner.begin_task(1)
    for role in learner.roles:
        pool = learner.models[role].prompt
        before = snapshot(pool)
        train(learner, 1, role)
        for name, value in pool.state_dict().items():
            rows = (value != before[name]).flatten(1).any(dim=1).tolist()
            assert rows == [False, False, True, True, False, False, False], name


@pytest.mark.parametrize(("learner_name", "kd_method"), PAIRS)
def test_state_round_trips(learner_name, kd_method):
    trained, fresh = (small.learner(learner_name, kd_method, seed=seed) for seed in (1, 2))
    for task in range(2):
        trained.begin_task(task)
        for role in trained.roles:
            train(trained, task, role, steps=1)
    for role in trained.roles:
        assert not any(key.startswith("vit.") for key in trained.state(role))
        fresh.load_state(role, trained.state(role))
    fresh.resume_task(1)
    images, _ = batch_of(1)
    expected, found = logits_of(trained, images, 4), logits_of(fresh, images, 4)
    assert found.keys() == set(trained.roles)
    assert all(torch.equal(found[role], expected[role]) for role in expected)


@pytest.mark.parametrize("learner_name", PROMPTS)
def test_parts_start_equal_whatever_else_a_run_has(learner_name):
    """The student's pool and head, and the teacher, do not depend on the KD method; the seed decides."""
    built = [small.learner(learner_name, method, seed=5) for method in DISTILLERS]
    for role in ROLES:
        models = [learner.models[role] for learner in built if role in learner.models]
        for model in models[1:]:
            assert not changed(model, snapshot(models[0]))
    assert changed(small.learner(learner_name, "KD", seed=6).student, snapshot(built[0].student))


def test_a_term_that_is_no_scalar_is_named():
    learner = small.learner("L2P", "FitNets")
    learner.distiller.feature = lambda student, teacher: student.features.mean(1)
    with pytest.raises(ValueError, match="FitNets: the term 'feature' of the loss must be a scalar, .* shape \\(4,\\)"):
        train(learner, 0, "student")


@pytest.mark.parametrize("role", ROLES)
def test_aux_loss_scale_counts_prompt_and_feature_losses_only(role):
    one, two = (
        small.learner("L2P", "FitNets", aux_loss_scale=scale)
        .begin_training(role, classes_of(0))
        .train_step(*batch_of(0))
        for scale in (1.0, 2.0)
    )
    for name in one.terms:
        factor = 2 if name in ("prompt", "feature") else 1
        torch.testing.assert_close(two.terms[name], factor * one.terms[name])
    torch.testing.assert_close(two.loss, sum(two.terms.values()))


@pytest.mark.parametrize("kd_method", ["KD", "DKD", "KD_Token"])
def test_the_teacher_answers_in_inference_mode(kd_method):
    """But for methods that compare features, whose copies would be too large."""
    learner = small.learner("CODAPrompt", kd_method)
    modes = {}
    for role, model in learner.models.items():
        model.register_forward_hook(lambda *_, role=role: modes.update({role: torch.is_inference_mode_enabled()}))
    train(learner, 0, "student")
    assert modes == {"teacher": True, "student": False}


@pytest.mark.parametrize("learner_name", PROMPTS)
def test_a_query_is_computed_once_per_batch_where_the_pool_needs_it(learner_name):
    learner = small.learner(learner_name, "KD")
    calls, queries = [], int(learner.student.prompt.needs_query)
    learner.query_vit.register_forward_hook(lambda *_: calls.append(1))
    train(learner, 0, "teacher", steps=1)
    assert len(calls) == queries
    train(learner, 0, "student", steps=1)
    logits_of(learner, batch_of(0)[0], 2)
    assert len(calls) == 3 * queries + 2  # and the student's own passes


def test_evaluation_counts_what_the_logits_say():
    learner = small.learner("DualPrompt", "KD_Token")
    images, targets = batch_of(1, size=16)
    logits = logits_of(learner, images, 4)
    result = learner.eval_step()(images, targets, 4)
    assert result.not_finite == 0 and result.correct.keys() == set(ROLES)
    for role in ROLES:
        assert logits[role].shape == (16, 4)
        assert result.correct[role].tolist() == [(logits[role].argmax(1) == targets).sum().item()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_close(dtype):
    """Losses of both models differ from float32 by what 8 or 11 bits of mantissa allow."""
    results = []
    for reduced in (None, dtype):
        learner = small.learner("CODAPrompt", "ReviewKD", reduced=reduced)
        results.append([train(learner, 0, role, steps=1) for role in ROLES])
    for exact, reduced in zip(*results, strict=True):
        for name, value in {**exact.terms, "loss": exact.loss, "gradient": exact.gradient}.items():
            found = reduced.terms.get(name, getattr(reduced, name, None))
            assert found.dtype == torch.float32
            assert found.item() == pytest.approx(value.item(), rel=0.05, abs=0.02), name


def test_class_weights_weigh_the_cross_entropy():
    for role in ROLES:
        terms = []
        for class_weights in (None, torch.full((small.CLASSES,), 3.0)):
            training = small.learner("L2P", "KD").begin_training(role, classes_of(0), class_weights)
            terms.append(training.train_step(*batch_of(0)).terms)
        torch.testing.assert_close(terms[1]["ce"], 3 * terms[0]["ce"])
        torch.testing.assert_close(terms[1]["prompt"], terms[0]["prompt"])


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_compute_the_same():
    """In all three steps, one after the other."""
    results, compiler = [], BlockCompiler((small.BATCH,))
    for run_block in (None, compiler):
        learner = small.learner("L2P", "KD_Token", teacher_depth=2, run_block=run_block)
        results.append([train(learner, 0, role) for role in ROLES])
        with torch.inference_mode():
            results[-1].append(learner.evaluator()(*batch_of(0), 4))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
    assert not compiler.failed
