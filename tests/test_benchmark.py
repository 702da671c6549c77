"""The benchmark runs, says what it should, and counts arithmetic right."""

from __future__ import annotations

import json

import pytest
import torch

from tests import benchmark, benchmark_savings, benchmark_step
from tests.benchmark_savings import CHANGES, PLAIN, SAVINGS, WHOLE, without
from tests.benchmark_step import count_flops

SMALL = "--t_model mini_vit_base --s_model mini_vit_small --kd_prompt_param 4 6 --batch_size 2 --repeats 1".split()


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setitem(benchmark_step.GEMM_SIZE, "cpu", 128)


def linear(rows: int, wide: int, narrow: int) -> int:
    return 2 * rows * wide * narrow


def vit_flops(batch: int, width: int, depth: int, keys: int = 0, tokens: int = 17, read: int = 1) -> int:
    """Blocks of a mini ViT, the last one for the rows that are read only; ``keys``: prompts on five blocks."""
    total = 0
    for block in range(depth):
        rows = tokens if block < depth - 1 else read
        attended = tokens + (keys if block < 5 else 0)
        total += linear(rows, width, width) + linear(tokens, width, 2 * width) + linear(rows, width, width)
        total += 2 * linear(rows, attended, width) + 2 * linear(rows, width, 4 * width)
    return batch * total


def stem_flops(batch: int, width: int) -> int:
    widths = [3] + [max(16, width >> shift) for shift in (3, 2, 1, 0)]
    sides = (32, 16, 8, 4)
    pairs = zip(widths[:-1], widths[1:], sides, strict=True)
    return batch * (sum(2 * 9 * a * b * side**2 for a, b, side in pairs) + 2 * width * width * 16)


def test_step(capsys):
    assert benchmark.main(["step", *SMALL, "--prompt_param", "20", "8", "0", "--KD_method", "KD", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for operation in ("teacher", "student", "evaluate"):
        assert result[f"{operation}_s"] > 0
        assert result["flops"][operation] > 0
        rate = result["flops"][operation] / result[f"{operation}_s"] / 1e9
        assert result["mfu"][operation] == pytest.approx(rate / result["gemm_gflops"])
    assert result["latency_ms"].keys() == {"teacher", "student"}
    assert result["peak_rss_mb"] > 100 and result["build_s"] > 0 and result["threads"] >= 1
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]

    needed = stem_flops(2, 96) + stem_flops(2, 192)  # the query and the student share their tokens
    needed += vit_flops(2, 96, 4) + vit_flops(2, 96, 4, keys=4) + vit_flops(2, 192, 6, keys=4)
    heads_and_pools = result["flops"]["evaluate"] - needed
    assert 0 < heads_and_pools < 0.01 * needed


@pytest.mark.parametrize(
    "options",
    [
        ["--learner_name", "L2P", "--KD_method", "ReviewKD", "--precision", "bf16", "--profile"],
        ["--learner_name", "DualPrompt", "--KD_method", "none", "--task", "3", "--accumulate", "2"],
    ],
)
def test_other_options(options, capsys):
    assert benchmark.main(["step", *SMALL, *options]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    roles = {"teacher", "student", "evaluate"} - ({"teacher"} if "none" in options else set())
    assert json.loads(lines["flops"]).keys() == roles
    if "--profile" in options:
        assert json.loads(lines["profile"]).keys() == roles


def savings_case(*, batch_size: int = 2) -> tuple:
    options = ["--t_model", "mini_vit_base", "--s_model", "mini_vit_small", "--prompt_param", "20", "8", "0"]
    options = benchmark_savings.parse([*options, "--batch_size", str(batch_size)])
    learner, batch = benchmark_savings.build(options, torch.device("cpu"))
    return learner, benchmark_savings.make_operations(learner, batch)


def test_without_a_saving_the_losses_are_the_same():
    learner, operations = savings_case()
    start = {role: {k: v.clone() for k, v in learner.state(role).items()} for role in learner.phases}

    def losses(saving: str, operation: str) -> list[float]:
        for role, state in start.items():
            learner.load_state(role, state)
        with without(saving, learner, operation):
            return [value.item() for value in operations[operation]().values()]

    for operation in ("teacher", "student", "evaluate"):
        expected = losses(WHOLE, operation)
        for saving in (PLAIN, *SAVINGS):
            assert losses(saving, operation) == pytest.approx(expected, abs=1e-5), (saving, operation)


def test_pools_grow_the_same_without_matrix_products():
    learner, operations = savings_case()
    grown = []
    for variant in (WHOLE, PLAIN):
        with without(variant, learner, "growth"):
            operations["growth"]()
        grown.append({key: value.clone() for key, value in learner.state("teacher").items()})
    for key, value in grown[0].items():
        torch.testing.assert_close(grown[1][key], value, atol=1e-5, rtol=0)


def test_each_saving_saves_what_it_is_for():
    """In arithmetic, where it is arithmetic that it saves, and in gradients that nobody reads."""
    learner, operations = savings_case()

    def flops(saving: str, operation: str) -> int:
        with without(saving, learner, operation):
            return count_flops(operations[operation])

    for saving in ("no weight gradients", "one query", "last block's read rows"):
        for operation in CHANGES[saving]:
            assert flops(saving, operation) > 1.02 * flops(WHOLE, operation), (saving, operation)
    assert all(not p.requires_grad and p.grad is None for p in learner.student.vit.parameters())


def test_savings_and_growth_report(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_savings, "peak_of_process", lambda argv, variant: {"cpu": 1.0})
    small = ["--t_model", "mini_vit_base", "--s_model", "mini_vit_small", "--batch_size", "2", "--repeats", "1"]
    assert benchmark.main(["savings", *small, "--prompt_param", "20", "8", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["teacher"][PLAIN]["ratio"] > 0 and result["teacher"][WHOLE]["ratio"] == 1
    assert benchmark.main(["growth", *small, "--case", "4", "20"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row["components"]) for row in rows] == [(1, 5), (2, 10), (4, 20)]
    assert rows[2]["student_gflop"] == pytest.approx(rows[0]["student_gflop"], rel=0.01)


def test_flops_of_attention_are_counted():
    query = torch.rand(1, 2, 5, 8)
    keys = torch.rand(1, 2, 7, 8)
    run = lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, keys)  # noqa: E731
    assert count_flops(run) == 2 * 2 * 2 * 5 * 7 * 8


def test_unknown_benchmark(capsys):
    assert benchmark.main([]) == 2
    assert benchmark.main(["stpe"]) == 2
    assert "{step,savings,growth,data}" in capsys.readouterr().err
