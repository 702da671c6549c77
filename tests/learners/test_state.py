"""States hold what differs from a base, to the bit."""

import math

import pytest
import torch

from learners.state import copy_to_cpu, describe, pack, unpack, unpack_plain


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        bits = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and bits[0].equal(bits[1])
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_all_kinds_of_values():
    tree = {
        "float": torch.randn(5, 2, 3), "half": torch.randn(5, 3).half(), "whole": torch.arange(6).view(2, 3),
        "transposed": torch.randn(4, 6).t(), "scalar": torch.tensor(-0.0), "empty": torch.zeros(0, 4),
        "row": torch.zeros(3),
        "list": [1, 2.5, None, True, "text", 0.1 + 0.2, -0.0], "numbers": {0: {"step": torch.tensor(3.0)}, 1: {}},
    }  # fmt: skip
    assert same(unpack(pack(tree)), tree)
    assert unpack_plain(pack(tree))["list"] == tree["list"]
    assert math.copysign(1, unpack(pack(tree))["list"][-1]) == -1


def test_only_rows_that_differ_are_saved():
    base = {"models": {"a": torch.randn(1000, 50), "b": torch.randn(1000, 50)}}
    now = {"models": copy_to_cpu(base["models"]), "moments": torch.zeros(1000, 50)}
    now["models"]["a"][7, 3] += 1
    now["moments"][[1, 5]] = 0.5
    data = pack(now, base)
    assert len(data) < 3 * 50 * 4 + 1000
    assert same(unpack(data, base), now)


@pytest.mark.parametrize(("before", "after"), [(0.0, -0.0), (-0.0, 0.0), (1.0, math.nextafter(1.0, 2.0))])
def test_differences_to_the_bit(before, after):
    base = {"a": torch.full((2, 3), before, dtype=torch.float64)}
    now = copy_to_cpu(base)
    now["a"][1, 1] = after
    assert same(unpack(pack(now, base), base), now)
    assert same(unpack(pack({"a": now["a"] * 0}), {}), {"a": now["a"] * 0})


def test_base_and_result_share_no_memory():
    base = {"a": torch.zeros(3, 2)}
    result = unpack(pack(base, base), base)
    result["a"] += 1
    assert base["a"].sum() == 0
    copy = copy_to_cpu(base)
    copy["a"] += 1
    assert base["a"].sum() == 0


def test_described_parts_are_as_if_packed_at_once():
    base = {"models": {"teacher": {"w": torch.zeros(4, 2)}, "student": {"w": torch.ones(4, 2)}}}
    now = copy_to_cpu(base)
    now["models"]["teacher"]["w"][2] = 5
    now["models"]["student"]["w"][1] = 7
    models = now["models"] | {"teacher": describe(now["models"]["teacher"], base["models"]["teacher"])}
    assert pack({"models": models}, base) == pack(now, base)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    tree = {"models": {"student": {"last.weight": torch.tensor([[0.0], [value]])}}}
    with pytest.raises(ValueError, match="models student last.weight is not finite"):
        pack(tree)


def test_other_shape_than_the_base():
    with pytest.raises(ValueError, match="a changed its type or shape"):
        pack({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
