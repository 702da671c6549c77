"""The benchmark runs, says what it should, and counts arithmetic right."""

from __future__ import annotations

import json

import pytest
import torch

from tests import benchmark, benchmark_step
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


def test_flops_of_attention_are_counted():
    query = torch.rand(1, 2, 5, 8)
    keys = torch.rand(1, 2, 7, 8)
    run = lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, keys)  # noqa: E731
    assert count_flops(run) == 2 * 2 * 2 * 5 * 7 * 8


def test_unknown_benchmark(capsys):
    assert benchmark.main([]) == 2
    assert benchmark.main(["stpe"]) == 2
    assert "{step,data}" in capsys.readouterr().err
