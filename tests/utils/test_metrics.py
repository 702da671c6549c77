import json
import math

import pytest

from utils.metrics import acc_csv, aggregate, mean_std, measure, metrics_json, summary_lines, summary_table

ROWS = [[80.0], [70.0, 90.0], [76.0, 60.0, 50.0]]


def test_measures_by_hand():
    matrix = measure(ROWS)
    assert matrix["average_accuracy"] == [80.0, 80.0, 62.0]
    assert matrix["final_average_accuracy"] == 62.0
    assert matrix["average_incremental_accuracy"] == 74.0
    assert matrix["forgetting"] == pytest.approx((4 + 30 + 0) / 3)  # the last task's 0 counts
    assert matrix["forgetting_max"] == pytest.approx((4 + 30) / 2)
    assert matrix["backward_transfer"] == pytest.approx((-4 - 30) / 2)
    first = measure([[33.0]])
    assert first["forgetting"] == first["forgetting_max"] == first["backward_transfer"] == 0.0
    assert first["final_average_accuracy"] == first["average_incremental_accuracy"] == 33.0


def test_files():
    assert acc_csv([80, 62.0, 7.129]) == "80.00\n62.00\n7.13\n"
    metrics = {"b": {"ce": math.nan, "prompt": -0.0}, "a": (1, 1 / 3, True, None), "c": "ä"}
    text = metrics_json(metrics)
    assert text == metrics_json(dict(reversed(metrics.items()))) and text.endswith("}\n")
    assert json.loads(text) == {"a": [1, 0.3333333333, True, None], "b": {"ce": None, "prompt": 0.0}, "c": "ä"}
    assert "-0.0" not in text


def test_summary_is_the_originals():
    lines = ["===Summary of student experiment===", "Acc | mean: 62.00", "Forgetting: 11.33"]
    assert summary_lines(measure(ROWS)) == lines
    better = measure([[10.0], [10.001, 10.0]])
    assert summary_lines(better)[2] == "Forgetting: 0.00"  # not -0.00


def test_summary_table():
    student = measure(ROWS)
    both = summary_table(measure([[1.0], [1.0, 1.0], [2.0, 2.0, 2.0]]), student).splitlines()
    assert both[0].split() == ["teacher", "student"]
    assert both[4].split() == "Accuracy after task 3 (%) 2.00 62.00".split()
    assert both[6].split() == "Final average accuracy (%) 2.00 62.00".split()
    assert len({len(line) for line in both}) == 1
    assert "teacher" not in summary_table(None, student)


def test_mean_and_deviation_over_seeds():
    assert mean_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_std([5.0]) == (5.0, None)
    summary = aggregate([measure([[10.0]]), measure([[20.0]])])
    expected = {"mean": 15.0, "std": pytest.approx(math.sqrt(50)), "n": 2, "values": [10.0, 20.0]}
    assert summary["final_average_accuracy"] == expected
