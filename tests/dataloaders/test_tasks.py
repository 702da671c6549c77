"""The split into tasks, the class order, validation, replay and class weights."""

import numpy as np
import pytest

from dataloaders.base import DataError, seeded_split
from dataloaders.tasks import ClassRange, balanced_counts, split_classes
from tests.dataloaders.conftest import array_stream


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((10, 2, 4), [(0, 2), (2, 6), (6, 10)]),
        ((10, 3, 3), [(0, 3), (3, 6), (6, 9), (9, 10)]),
        ((10, 10, 5), [(0, 10)]),
        ((3, 20, 20), [(0, 3)]),
    ],
)
def test_a_smaller_last_task_takes_the_rest(numbers, expected):
    assert split_classes(*numbers) == [ClassRange(*classes) for classes in expected]


def test_natural_order_keeps_labels_and_each_task_sees_its_own_images():
    stream = array_stream([4, 5, 6, 7, 8])
    assert len(stream) == 3
    assert [tuple(stream.classes(t)) for t in range(3)] == [(0, 2), (2, 4), (4, 5)]
    assert [stream.train_size(t) for t in range(3)] == [9, 13, 8]
    assert [stream.test_size(t) for t in range(3)] == [6, 6, 3]
    for task in range(3):
        labels = stream.train_images.labels[stream.train_indices(task)]
        assert set(labels) == set(range(*stream.classes(task)))
    assert stream.task_names(1) == ["class 2", "class 3"]


def test_a_shuffled_order_relabels_so_that_tasks_stay_ranges():
    natural, shuffled = array_stream(), array_stream(class_order="shuffled", seed=3)
    assert shuffled.class_names != natural.class_names
    assert sorted(shuffled.class_names) == natural.class_names
    for index in range(30):  # the same image has the same name, under another number
        name = natural.class_names[natural.train_images.labels[index]]
        assert shuffled.class_names[shuffled.train_images.labels[index]] == name
    assert array_stream(class_order="shuffled", seed=3).class_names == shuffled.class_names
    assert array_stream(class_order="shuffled", seed=4).class_names != shuffled.class_names


def test_validation_tests_on_a_fifth_of_the_training_images():
    stream = array_stream([10, 10, 10, 10], validation=True, seed=1)
    train, test = stream.train_images, stream.test_images
    assert train.store is test.store
    assert (len(train.used), len(test.used)) == (32, 8)
    assert not set(train.used) & set(test.used)
    assert np.bincount(test.labels[test.used]).tolist() == [2, 2, 2, 2]
    assert np.array_equal(array_stream([10] * 4, validation=True, seed=1).test_images.used, test.used)
    assert not np.array_equal(array_stream([10] * 4, validation=True, seed=2).test_images.used, test.used)


def test_upper_bound_is_one_task_with_all_classes():
    stream = array_stream(upper_bound=True)
    assert len(stream) == 1
    assert stream.classes(0) == ClassRange(0, 5)
    assert stream.train_size(0) == 30


def test_a_task_without_images_is_named():
    with pytest.raises(DataError, match=r"task 1 \(class 2, class 3\) has no training images"):
        array_stream([3, 3, 0, 0, 3])


def test_seeded_split_has_the_exact_total_and_takes_the_same_share_of_each_class():
    labels = np.repeat(np.arange(7), [1, 2, 3, 14, 11, 9, 24])
    chosen = seeded_split(labels, 0.2, np.random.RandomState(0))
    assert chosen.sum() == round(0.2 * len(labels))
    taken = np.bincount(labels[chosen], minlength=7)
    assert taken[0] == 0  # the only image of a class is kept
    assert (np.abs(taken - 0.2 * np.bincount(labels)) < 1).all()


def test_nothing_is_replayed_without_memory_or_in_the_first_task():
    assert len(array_stream().replay(2)) == 0
    assert len(array_stream(memory=4).replay(0)) == 0


def test_the_coreset_is_balanced_and_never_takes_an_image_back():
    stream = array_stream([6, 2, 6, 6, 6, 6, 6], memory=8, seed=5)
    labels = stream.train_images.labels
    earlier = None
    for task in range(1, len(stream)):
        coreset = stream.coreset(task)
        start = stream.classes(task).start
        assert len(coreset) == 8 == len(set(coreset))
        counts = np.bincount(labels[coreset], minlength=start)
        assert len(counts) == start
        full = counts[[c for c in range(start) if c != 1]]
        assert full.max() - full.min() <= 1
        if earlier is not None:
            old = stream.classes(task - 1).start
            assert set(coreset[labels[coreset] < old]) <= set(earlier)
        earlier = coreset
    other = array_stream([6, 2, 6, 6, 6, 6, 6], memory=8, seed=6)
    assert not np.array_equal(other.coreset(2), stream.coreset(2))


def test_replay_draws_as_many_images_as_the_task_has_from_the_coreset():
    stream = array_stream(memory=3)
    draws = stream.replay(1)
    assert len(draws) == stream.train_size(1)
    assert set(draws) <= set(stream.coreset(1))
    assert np.array_equal(draws, stream.replay(1))


@pytest.mark.parametrize(
    ("available", "total", "expected"),
    [([5, 5, 5], 6, [2, 2, 2]), ([5, 5, 5], 7, [2, 3, 2]), ([1, 5, 5], 9, [1, 4, 4]), ([1, 1], 9, [1, 1])],
)
def test_balanced_counts(available, total, expected):
    rank = np.array([2, 0, 1])[: len(available)]
    assert balanced_counts(np.array(available), rank, total).tolist() == expected


def test_class_weights_are_inverse_to_the_frequency_with_mean_one():
    weights = array_stream([2, 6, 4, 4, 4]).class_weights(0)
    assert weights.dtype == np.float32
    assert weights.tolist() == pytest.approx([1.5, 0.5, 1, 1, 1])


def test_class_weights_count_replayed_images():
    stream = array_stream([6, 6, 6, 6], memory=2)
    labels = stream.train_images.labels
    counts = np.bincount(labels[np.concatenate([stream.train_indices(1), stream.replay(1)])], minlength=4)
    weights = stream.class_weights(1)
    present = counts > 0
    assert weights[present].mean() == pytest.approx(1)
    assert np.allclose(weights[present] * counts[present], (weights * counts)[2])
    assert (weights[~present] == 1).all()
