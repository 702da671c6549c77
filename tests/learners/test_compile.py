"""``--compile``: blocks are compiled in the first task, and run as they are where there is no compiler."""

import logging

import pytest
import torch

from learners.build import BlockCompiler
from models.prompts import PROMPTS
from tests.learners import small
from tests.learners.small import batch_of, classes_of


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    torch.compiler.reset()
    limits = ("cache_size_limit", "accumulated_cache_size_limit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in limits}):
        yield  # and restore what a compiler has set
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


# FitNets reads the outputs of all blocks.
@pytest.mark.parametrize(("learner_name", "kd_method"), [("L2P", "FitNets"), *((name, "KD_Token") for name in PROMPTS)])
def test_all_blocks_are_compiled_in_the_first_task(learner_name, kd_method):
    """And used in the others, though pools and classes change; other sizes of a batch run as they are."""
    backend = Backend()
    learner = small.learner(learner_name, kd_method, run_block=BlockCompiler((small.BATCH,), backend))
    asked, of_query = [], 2 * learner.student.prompt.needs_query
    for task in range(small.TASKS):
        learner.begin_task(task)
        for role in learner.roles:
            training, before = learner.begin_training(role, classes_of(task)), backend.runs
            training.train_step(*batch_of(task))
            blocks = sum(model.vit.depth for model in learner.models.values()) if role == "student" else 3
            assert backend.runs == before + blocks + of_query, role
        before = backend.runs
        with torch.inference_mode():
            learner.evaluator()(*batch_of(task), 2 * task + 2)
            learner.evaluator()(*batch_of(task, size=1 + task), 2 * task + 2)
        assert backend.runs == before + 5 + of_query
        asked.append(backend.asked)
    assert asked[0] == asked[-1] > 0


def test_without_a_compiler_all_steps_run_as_they_are(caplog):
    """One attempt and one sentence in the log, for the whole process."""
    backend = Backend(failure="No working C++ compiler found\nand twenty lines more")
    results = []
    with caplog.at_level(logging.WARNING):
        for run_block in (None, BlockCompiler((small.BATCH,), backend)):
            learner = small.learner("L2P", "KD_Token", run_block=run_block)
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


def test_errors_of_the_block_itself_are_raised(caplog):
    compiler = BlockCompiler((small.BATCH,), Backend(error=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        small.learner("L2P", "none", run_block=compiler).begin_training("student", classes_of(0)).train_step(
            *batch_of(0)
        )
    assert not compiler.failed and "--compile" not in caplog.text
