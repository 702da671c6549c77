"""The benchmarks run, leave the losses as they are, and count arithmetic right."""

from __future__ import annotations

import json

import pytest
import torch

from learners.speed import count_flops
from tests import benchmark, benchmark_growth, benchmark_step
from tests.benchmark_savings import PLAIN, SAVINGS, WHOLE, without
from tests.benchmark_step import build, make_operations, step_config

SMALL = "--t_model mini_vit_base --s_model mini_vit_small --batch_size 2 --gpuid -1 --prompt_param 20 8 0".split()
SMALL += ["--kd_prompt_param", "4", "6"]


def test_step_and_growth(capsys, monkeypatch):
    monkeypatch.setitem(benchmark_step.GEMM_SIZE, "cpu", 128)
    monkeypatch.setattr(benchmark_growth, "CASES", ((4, 20),))
    assert benchmark.main(["step", *SMALL, "--repeats", "1", "--task", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for operation in ("teacher", "student", "evaluate"):
        rate = result["flops"][operation] / result[f"{operation}_s"] / 1e9
        assert result["mfu"][operation] == pytest.approx(rate / result["gemm_gflops"])
    assert result["latency_ms"].keys() == {"teacher", "student"}
    assert result["peak_rss_mb"] > 100 and result["build_s"] > 0

    assert benchmark.main(["growth", *SMALL, "--repeats", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row["components"]) for row in rows] == [(1, 5), (2, 10), (4, 20)]


def test_savings_save_arithmetic_and_leave_the_losses_as_they_are():
    learner, batch, _ = build(step_config(10, SMALL), 10, 10)
    start = {role: {k: v.clone() for k, v in learner.state(role).items()} for role in learner.roles}
    for name, operation in make_operations(learner, batch).items():

        def outcome(saving: str, name: str = name, operation=operation) -> tuple[torch.Tensor, int]:
            with without(saving, learner, name):
                flops = count_flops(operation)
                for role, state in start.items():
                    learner.load_state(role, state)
                result = operation()
            return torch.stack([*(result.correct.values() if "evaluate" in name else result.terms.values())]), flops

        expected, least = outcome(WHOLE)
        for saving in (PLAIN, *SAVINGS):
            values, flops = outcome(saving)
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
            if name in SAVINGS.get(saving, [()])[0] and saving not in ("fused attention", "selection as products"):
                assert flops > 1.02 * least, (saving, name)
    assert all(not p.requires_grad and p.grad is None for p in learner.student.vit.parameters())


def test_unknown_benchmark(capsys):
    assert benchmark.main(["stpe"]) == 2
    assert "{step,savings,growth,data}" in capsys.readouterr().err
