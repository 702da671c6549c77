import json
import math

import numpy as np
import pytest

from utils.metrics import (
    AccuracyMatrix,
    acc_csv,
    aggregate,
    build_metrics,
    mean_std,
    metrics_json,
    summary_lines,
    summary_table,
)

ROWS = [[80.0], [70.0, 90.0], [76.0, 60.0, 50.0]]
SETTINGS = {"dataset": "Emoji_R", "learner_name": "L2P", "KD_method": "KD", "t_model": "t", "s_model": "s",
            "random_s": 3, "lr": 0.005, "schedule": (20,)}


def test_measures_by_hand():
    matrix = AccuracyMatrix(ROWS)
    assert matrix.average_accuracy == [80.0, 80.0, 62.0]
    assert matrix.final_average_accuracy == 62.0
    assert matrix.average_incremental_accuracy == 74.0
    assert matrix.forgetting == pytest.approx((4 + 30 + 0) / 3)  # the last task's 0 counts
    assert matrix.forgetting_max == pytest.approx((4 + 30) / 2)
    assert matrix.backward_transfer == pytest.approx((-4 - 30) / 2)


def test_forgetting_from_best_looks_at_all_earlier_rows_but_not_the_last():
    matrix = AccuracyMatrix([[50.0], [70.0, 40.0], [60.0, 45.0, 90.0]])
    assert matrix.forgetting == pytest.approx((-10 - 5 + 0) / 3)
    assert matrix.forgetting_max == pytest.approx((10 - 5) / 2)
    assert matrix.backward_transfer == pytest.approx((10 + 5) / 2)


def test_against_numpy_on_random_matrices():
    draw = np.random.default_rng(0)
    for tasks in (2, 5, 20):
        a = draw.uniform(0, 100, (tasks, tasks))
        matrix = AccuracyMatrix([a[i, : i + 1].tolist() for i in range(tasks)])
        acc = [a[i, : i + 1].mean() for i in range(tasks)]
        best = np.array([a[j: tasks - 1, j].max() for j in range(tasks - 1)])
        diagonal = np.diag(a)
        assert matrix.average_accuracy == pytest.approx(acc)
        assert matrix.average_incremental_accuracy == pytest.approx(np.mean(acc))
        assert matrix.forgetting == pytest.approx((diagonal - a[-1]).mean())
        assert matrix.forgetting_max == pytest.approx((best - a[-1, :-1]).mean())
        assert matrix.backward_transfer == pytest.approx((a[-1] - diagonal)[:-1].mean())


def test_one_task():
    matrix = AccuracyMatrix([[33.0]])
    assert (matrix.forgetting, matrix.forgetting_max, matrix.backward_transfer) == (0.0, 0.0, 0.0)
    assert matrix.final_average_accuracy == matrix.average_incremental_accuracy == 33.0


def test_unfinished_run_has_the_measures_of_a_shorter_one():
    matrix = AccuracyMatrix()
    for task, row in enumerate(ROWS[:2]):
        matrix.set_row(task, row)
    assert matrix.to_dict() == AccuracyMatrix(ROWS[:2]).to_dict()
    assert matrix.forgetting == 5.0


def test_round_trip_and_replaced_row():
    matrix = AccuracyMatrix(ROWS)
    assert AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict()))).rows == ROWS
    matrix.set_row(2, [1, 2, 3])
    assert matrix.rows[2] == [1.0, 2.0, 3.0] and len(matrix) == 3


@pytest.mark.parametrize("task, row", [(1, [1.0, 2.0]), (-1, []), (0, []), (0, [1.0, 2.0]), (0, [101.0]),
                                       (0, [-0.1]), (0, [math.nan])])
def test_impossible_rows(task, row):
    with pytest.raises(ValueError):
        AccuracyMatrix().set_row(task, row)


def test_no_measure_without_a_row():
    with pytest.raises(ValueError, match="no task"):
        _ = AccuracyMatrix().final_average_accuracy


@pytest.mark.parametrize("values", [{}, [], *({"accuracy_matrix": a} for a in (3, [3], [[""]], [[1], [2]]))])
def test_damaged_dictionary(values):
    with pytest.raises(ValueError):
        AccuracyMatrix.from_dict(values)


def metrics(**changes):
    matrix = AccuracyMatrix(ROWS[:2])
    arguments = dict(
        settings=SETTINGS, settings_hash="abc", num_tasks=3, classes=[(0, 20), (20, 40), (40, 60)],
        teacher=matrix, student=matrix,
        parameters={"teacher": {"total": 10, "trained": 2}, "student": {"total": 5, "trained": 1}},
        losses={"student": [[{"ce": np.float32(0.1)}], [{"ce": math.nan}]],
                "teacher": [[{"ce": 1.0}], [{"ce": -0.0}]]},
        prompt_usage={"student": [{"block 0": np.array([0.25, 0.75])}] * 2, "teacher": []},
    )
    return build_metrics(**{**arguments, **changes})


def test_metrics_content():
    result = metrics()
    assert result["format"] == 1 and result["seed"] == 3 and result["learner_name"] == "L2P"
    assert (result["complete"], result["num_tasks"], result["tasks_done"]) == (False, 3, 2)
    assert result["settings"]["schedule"] == [20] and result["classes"][2] == [40, 60]
    assert result["student"]["final_average_accuracy"] == 80.0
    assert result["losses"]["student"][1][0]["ce"] is None  # JSON has no NaN
    assert result["prompt_usage"]["student"][0]["block 0"] == [0.25, 0.75]
    assert metrics(teacher=None)["teacher"] is None
    assert metrics(num_tasks=2, classes=[(0, 20), (20, 40)])["complete"] is True


def test_metrics_json_is_the_same_text_whatever_the_order():
    text = metrics_json(metrics())
    turned = metrics_json(metrics(settings=dict(reversed(SETTINGS.items()))))
    assert text == turned and text.endswith("}\n")
    assert json.loads(text) == metrics()
    assert "NaN" not in text and "-0.0" not in text


@pytest.mark.parametrize("changes", [
    {"settings": {"dataset": "x"}}, {"student": AccuracyMatrix()}, {"num_tasks": 1}, {"classes": [(0, 20)]},
    {"teacher": AccuracyMatrix([[1.0]])}, {"losses": {"student": [[]]}},
])
def test_parts_that_do_not_fit_together(changes):
    with pytest.raises(ValueError):
        metrics(**changes)


def test_acc_csv():
    assert acc_csv([80, 62.0, 7.129]) == "80.00\n62.00\n7.13\n"
    assert acc_csv([]) == ""


def test_summary_is_the_originals():
    assert summary_lines(AccuracyMatrix(ROWS).to_dict()) == [
        "===Summary of student experiment===", "Acc | mean: 62.00", "Forgetting: 11.33"]
    assert summary_lines(AccuracyMatrix([[10.0]]).to_dict())[2] == "Forgetting: 0.00"


def test_summary_table():
    student = AccuracyMatrix(ROWS).to_dict()
    both = summary_table(AccuracyMatrix([[1.0], [1.0, 1.0], [2.0, 2.0, 2.0]]).to_dict(), student).splitlines()
    assert both[0].split() == ["teacher", "student"]
    assert both[4].split() == "Accuracy after task 3 (%) 2.00 62.00".split()
    assert len({len(line) for line in both}) == 1
    assert "teacher" not in summary_table(None, student)


def test_mean_and_deviation_over_seeds():
    assert mean_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_std([5.0]) == (5.0, None)
    with pytest.raises(ValueError):
        mean_std([])
    summary = aggregate([AccuracyMatrix([[10.0]]).to_dict(), AccuracyMatrix([[20.0]]).to_dict()])
    assert summary["final_average_accuracy"]["mean"] == 15.0 and summary["forgetting"]["n"] == 2
