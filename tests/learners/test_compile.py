"""``--compile``: steps stay compiled from task to task, and run as they are where there is no compiler."""

import logging

import pytest
import torch
from torch import nn

from learners.build import StepCompiler
from tests.learners import small
from tests.learners.small import batch_of, classes_of


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    torch.compiler.reset()
    limits = ("cache_size_limit", "accumulated_cache_size_limit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in limits}):
        yield  # and restore what a step compiler has set
    torch.compiler.reset()


class Backend:
    """Of ``torch.compile``; counts what it is asked to compile and what of it runs, or fails."""

    def __init__(self, failure: str | None = None, error: Exception | None = None) -> None:
        self.failure, self.error = failure, error
        self.asked = self.runs = 0

    def __call__(self, graph, examples):
        self.asked += 1
        if self.failure is not None:
            raise RuntimeError(self.failure)

        def run(*inputs):
            self.runs += 1
            if self.error is not None:
                raise self.error
            return graph.forward(*inputs)

        return run


class ForOneTask(nn.Module):
    """A step that depends on its task as the pools do: by a number that is an attribute of a module."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return x[: self.pool.task + 1].sum()


def test_later_tasks_are_compiled_too(tasks=12):
    """torch itself would stop after 8 and only tell the standard error."""
    pool, backend, x = nn.Module(), Backend(), torch.arange(20.0)
    compiler = StepCompiler(backend)
    for pool.task in range(tasks):
        step = compiler(ForOneTask(pool))
        before = backend.runs
        for _ in range(2):
            assert step(x) == ForOneTask(pool)(x)
        assert backend.runs == before + 2, f"task {pool.task + 1}"


def test_all_steps_of_a_learner_are_compiled():
    backend = Backend()
    learner = small.learner("CODAPrompt", "KD", compile_step=StepCompiler(backend), teacher_depth=1, student_depth=1)
    for role in learner.roles:
        before = backend.runs
        learner.begin_training(role, classes_of(0)).train_step(*batch_of(0))
        assert backend.runs > before, role
    before = backend.runs
    with torch.inference_mode():
        learner.evaluator()(*batch_of(0), 2)
    assert backend.runs > before


def test_without_a_compiler_all_steps_run_as_they_are(caplog):
    """One attempt and one sentence in the log, for the whole process."""
    backend = Backend(failure="No working C++ compiler found\nand twenty lines more")
    results = []
    with caplog.at_level(logging.WARNING):
        for compile_step in (None, StepCompiler(backend)):
            learner = small.learner("L2P", "KD_Token", compile_step=compile_step)
            results.append([])
            for role in learner.roles:
                training = learner.begin_training(role, classes_of(0))
                results[-1] += [training.train_step(*batch_of(0, seed=seed)) for seed in range(2)]
            with torch.inference_mode():
                results[-1].append(learner.evaluator()(*batch_of(0), 2))
    assert backend.asked == 1
    (record,) = caplog.records
    assert record.name == "learners.build"  # a logger whose warnings reach output.log
    assert record.getMessage().endswith("torch.compile fails: RuntimeError: No working C++ compiler found")
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=0, rtol=0)


def test_errors_of_the_step_itself_are_raised(caplog):
    compiler = StepCompiler(Backend(error=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        compiler(nn.Linear(2, 2))(torch.ones(1, 2))
    assert not compiler.failed and "--compile" not in caplog.text
