"""Both phases of the learner, for every pair of learner and KD method: what moves and what must not."""

from __future__ import annotations

import shutil

import pytest
import torch

from learners.distillers import DISTILLERS
from learners.optim import OptimSettings
from models.prompts import PROMPTS
from tests.learners import small
from tests.learners.small import batch_of, changed, classes_of, snapshot

PAIRS = [(learner, method) for learner in PROMPTS for method in DISTILLERS]


def train(learner, task: int, phase: str, steps: int = 2):
    """A few steps of one phase of a task; returns the last result."""
    stage = learner.begin_phase(phase, classes_of(task))
    stage.begin_epoch(0)
    for step in range(steps):
        result = stage.train_step(*batch_of(task, seed=step))
    return result


def head_rows_changed(model, before) -> list[bool]:
    """For each class, whether its row of the head moved."""
    return (model.last.weight != before["last.weight"]).any(dim=1).tolist()


@pytest.mark.parametrize(("learner_name", "kd_method"), PAIRS)
def test_each_phase_trains_its_model_and_leaves_the_rest(learner_name, kd_method):
    learner = small.learner(learner_name, kd_method)
    for task in range(2):
        learner.begin_task(task)
        for phase in learner.phases:
            models = {role: snapshot(model) for role, model in learner.models.items()}
            distiller = snapshot(learner.distiller)
            result = train(learner, task, phase)
            assert all(value.isfinite().all() for value in result.values())
            assert result["loss"] > 0 and result["gradient"] > 0

            for role, model in learner.models.items():
                names = changed(model, models[role])
                assert not any(name.startswith("vit.") for name in names)  # backbones never change
                if role != phase:
                    assert not names  # the teacher in the student's phase, and the other way round
                    continue
                assert any(name.startswith("prompt.") for name in names)
                assert names >= {"last.weight", "last.bias"}
                current = classes_of(task)
                moved = head_rows_changed(model, models[role])
                assert moved == [current.start <= c < current.stop for c in range(small.CLASSES)]
            moved = changed(learner.distiller, distiller)
            if phase == "teacher":
                assert not moved
            else:
                trained = {name for name, p in learner.distiller.named_parameters() if p.requires_grad}
                assert moved == trained


@pytest.mark.parametrize(("learner_name", "kd_method"), PAIRS)
def test_gradients_reach_what_is_declared_and_nothing_else(learner_name, kd_method):
    learner = small.learner(learner_name, kd_method)
    for phase in learner.phases:
        stage = learner.begin_phase(phase, classes_of(0))
        stage.train_step(*batch_of(0))
        declared = {id(p) for p in stage.parameters}
        everything = [p for model in learner.models.values() for p in model.parameters()]
        for parameter in [*everything, *learner.distiller.parameters()]:
            assert (parameter.grad is not None) == (id(parameter) in declared)
        for parameter in stage.parameters:
            parameter.grad = None


@pytest.mark.parametrize("kd_method", DISTILLERS)
def test_past_components_of_coda_do_not_move(kd_method):
    learner = small.learner("CODAPrompt", kd_method, prompt_param=(7, 4, 0.1))
    learner.begin_task(0)
    for phase in learner.phases:
        train(learner, 0, phase)
    learner.begin_task(1)
    for phase in learner.phases:
        pool = learner.models[phase].prompt
        before = snapshot(pool)
        train(learner, 1, phase)
        for name, value in pool.state_dict().items():
            rows = (value != before[name]).flatten(1).any(dim=1).tolist()
            assert rows == [False, False, True, True, False, False, False], name


@pytest.mark.parametrize("depths", [(3, 3), (24, 24)])
@pytest.mark.parametrize(("learner_name", "kd_method"), PAIRS)
def test_depths(learner_name, kd_method, depths):
    learner = small.learner(learner_name, kd_method, teacher_depth=depths[0], student_depth=depths[1])
    for phase in learner.phases:
        assert train(learner, 0, phase, steps=1)["loss"].isfinite()
    assert all(logits.isfinite().all() for logits in learner.eval_step().logits(batch_of(0)[0], 2).values())


@pytest.mark.parametrize(("learner_name", "kd_method"), PAIRS)
def test_state_round_trips(learner_name, kd_method):
    trained, fresh = (small.learner(learner_name, kd_method, seed=seed) for seed in (1, 2))
    for task in range(2):
        trained.begin_task(task)
        for phase in trained.phases:
            train(trained, task, phase, steps=1)
    for role in trained.phases:
        assert not any(key.startswith("vit.") for key in trained.state(role))
        fresh.load_state(role, trained.state(role))
    fresh.resume_task(1)
    images, _ = batch_of(1)
    expected = trained.eval_step().logits(images, 4)
    logits = fresh.eval_step().logits(images, 4)
    assert logits.keys() == set(trained.phases)
    assert all(torch.equal(logits[role], expected[role]) for role in expected)


@pytest.mark.parametrize("kd_method", DISTILLERS)
def test_a_state_that_does_not_fit_is_an_error(kd_method):
    learner = small.learner("L2P", kd_method)
    state = learner.state("student")
    with pytest.raises(RuntimeError):
        learner.load_state("student", {key: state[key] for key in list(state)[1:]})
    with pytest.raises(RuntimeError):
        learner.load_state("student", state | {"prompt.e_p_9": torch.zeros(1)})


@pytest.mark.parametrize("learner_name", PROMPTS)
def test_parts_start_equal_whatever_else_a_run_has(learner_name):
    """The student's pool and head, and the teacher, do not depend on the KD method; the seed decides."""
    states = [small.learner(learner_name, method, seed=5) for method in DISTILLERS]
    for role in ("teacher", "student"):
        models = [learner.models[role] for learner in states if role in learner.models]
        for model in models[1:]:
            assert not changed(model, snapshot(models[0]))
    other = small.learner(learner_name, "KD", seed=6)
    assert changed(other.student, snapshot(states[0].student))


def test_the_query_network_is_the_students_backbone():
    learner = small.learner("CODAPrompt", "KD_Token")
    assert learner.query_vit is learner.student.vit
    assert learner.eval_step().query_vit is learner.student.vit


def test_alpha_zero_trains_the_student_with_plain_cross_entropy():
    """The limit alpha = 0 of KD equals no distillation, step by step."""
    losses = {}
    for kd_method in ("KD", "DKD", "none"):
        learner = small.learner("L2P", kd_method, alpha=0.0)
        losses[kd_method] = [train(learner, 0, "student", steps=n)["loss"].item() for n in (1, 2)]
    assert losses["KD"] == pytest.approx(losses["none"], rel=1e-6)
    assert losses["DKD"] == pytest.approx(losses["none"], rel=1e-6)


@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_aux_loss_scale_counts_prompt_and_feature_losses_only(phase):
    first, second = (
        small.learner("L2P", "FitNets", aux_loss_scale=scale).begin_phase(phase, classes_of(0)) for scale in (1, 2)
    )
    one, two = (stage.train_step(*batch_of(0)) for stage in (first, second))
    for name in one.keys() - {"loss", "gradient", "correct"}:
        factor = 2 if name in ("prompt", "feature") else 1
        torch.testing.assert_close(two[name], factor * one[name])
    terms = [value for name, value in two.items() if name not in ("loss", "gradient", "correct")]
    torch.testing.assert_close(two["loss"], sum(terms))


@pytest.mark.parametrize("kd_method", ["KD", "DKD", "KD_Token"])
def test_the_teacher_runs_in_inference_mode_in_the_students_phase(kd_method):
    """But for methods that compare features, whose copies would be too large."""
    learner = small.learner("CODAPrompt", kd_method)
    modes = {}
    for role, model in learner.models.items():
        model.register_forward_hook(lambda *_, role=role: modes.update({role: torch.is_inference_mode_enabled()}))
    train(learner, 0, "student")
    assert modes == {"teacher": True, "student": False}


def test_evaluation_counts_what_the_logits_say():
    learner = small.learner("DualPrompt", "KD_Token")
    images, targets = batch_of(1, size=16)
    step = learner.eval_step()
    logits = step.logits(images, 4)
    counts = step(images, targets, 4)
    assert counts.keys() == {*learner.phases, "not finite"} and counts["not finite"] == 0
    for role in learner.phases:
        assert logits[role].shape == (16, 4)
        assert counts[role].tolist() == [(logits[role].argmax(1) == targets).sum().item()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_close(dtype):
    """Losses of both phases differ from float32 by what 8 or 11 bits of mantissa allow."""
    results = []
    for reduced in (None, dtype):
        learner = small.learner("CODAPrompt", "ReviewKD", reduced=reduced)
        results.append([train(learner, 0, phase, steps=1) for phase in learner.phases])
    for exact, reduced in zip(*results, strict=True):
        for name in exact.keys() - {"correct"}:
            assert reduced[name].dtype == torch.float32
            assert reduced[name].item() == pytest.approx(exact[name].item(), rel=0.05, abs=0.02), name


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_compute_the_same():
    """In all three steps, one after the other; without the fallback of ``--compile``, which would hide a failure."""
    results = []
    for compile_step in (None, torch.compile):
        learner = small.learner("CODAPrompt", "KD_Token", compile_step=compile_step)
        results.append([train(learner, 0, phase) for phase in learner.phases])
        with torch.inference_mode():
            results[-1].append(learner.evaluator()(*batch_of(0, size=16), 4))
    for eager, compiled in zip(*results, strict=True):
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-5)


def test_class_weights_weigh_the_cross_entropy():
    weights = torch.full((small.CLASSES,), 3.0)
    for phase in ("teacher", "student"):
        terms = []
        for class_weights in (None, weights):
            learner = small.learner("L2P", "KD")
            stage = learner.begin_phase(phase, classes_of(0), class_weights)
            terms.append(stage.train_step(*batch_of(0)))
        torch.testing.assert_close(terms[1]["ce"], 3 * terms[0]["ce"])
        torch.testing.assert_close(terms[1]["prompt"], terms[0]["prompt"])


@pytest.mark.parametrize("optimizer", ["Adam", "amsgrad", "SGD", "RMSprop", "Rprop"])
def test_same_seed_same_bytes(optimizer):
    states = []
    for _ in range(2):
        optim = OptimSettings(optimizer, lr=0.01, schedule=(2,))
        learner = small.learner("CODAPrompt", "KD_Token", optim=optim)
        for task in range(2):
            learner.begin_task(task)
            for phase in learner.phases:
                train(learner, task, phase)
        states.append(learner.state("teacher") | learner.state("student"))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
