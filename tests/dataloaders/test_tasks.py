"""The split into tasks, the class order, validation, replay and class weights."""

import numpy as np
import pytest

from dataloaders.base import DataError, seeded_split
from dataloaders.tasks import ClassRange, split_classes
from tests.dataloaders.conftest import array_stream


def test_a_smaller_last_task_takes_the_rest():
    assert split_classes(10, 2, 4) == [(0, 2), (2, 6), (6, 10)]
    assert split_classes(10, 3, 3) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert split_classes(3, 20, 20) == [ClassRange(0, 3)]


def test_without_sizes_tasks_are_as_equal_as_possible():
    for classes, sizes in {1: [1], 3: [3], 5: [2, 3], 23: [2, 2, 2, 3, 2, 2, 3, 2, 2, 3], 200: [20] * 10}.items():
        assert [stop - start for start, stop in split_classes(classes, None, None)] == sizes
    assert split_classes(6, 2, None) == split_classes(6, None, 2) == [(0, 2), (2, 4), (4, 6)]


def test_natural_order_keeps_labels_and_each_task_sees_its_own_images():
    stream = array_stream([4, 5, 6, 7, 8])
    assert [tuple(stream.classes(t)) for t in range(len(stream))] == [(0, 2), (2, 4), (4, 5)]
    assert [(stream.train_size(t), stream.test_size(t)) for t in range(3)] == [(9, 6), (13, 6), (8, 3)]
    assert set(stream.train_images.labels[stream.train_indices(1)]) == {2, 3}
    assert stream.task_names(1) == ["class 2", "class 3"]


def test_a_shuffled_order_relabels_so_that_tasks_stay_ranges():
    natural, shuffled = array_stream(), array_stream(class_order="shuffled", seed=3)
    assert shuffled.class_names != natural.class_names == sorted(shuffled.class_names)
    for index in range(30):  # the same image has the same name, under another number
        name = natural.class_names[natural.train_images.labels[index]]
        assert shuffled.class_names[shuffled.train_images.labels[index]] == name
    assert array_stream(class_order="shuffled", seed=4).class_names != shuffled.class_names


def test_validation_tests_on_a_fifth_of_the_training_images():
    stream = array_stream([10] * 4, validation=True)
    train, test = stream.train_images, stream.test_images
    assert sorted([*train.used, *test.used]) == list(range(40))
    assert np.bincount(test.labels[test.used]).tolist() == [2, 2, 2, 2]
    assert not np.array_equal(array_stream([10] * 4, validation=True, seed=2).test_images.used, test.used)


def test_upper_bound_is_one_task_and_a_task_without_images_is_named():
    stream = array_stream(upper_bound=True)
    assert (len(stream), stream.classes(0), stream.train_size(0)) == (1, ClassRange(0, 5), 30)
    with pytest.raises(DataError, match=r"task 2 \(class 2, class 3\) has no training images"):
        array_stream([3, 3, 0, 0, 3])


def test_seeded_split_has_the_exact_total_and_takes_the_same_share_of_each_class():
    labels = np.repeat(np.arange(7), [1, 2, 3, 14, 11, 9, 24])
    taken = np.bincount(labels[seeded_split(labels, 0.2, np.random.RandomState(0))], minlength=7)
    assert taken.sum() == round(0.2 * len(labels)) and taken[0] == 0  # the only image of a class is kept
    assert (np.abs(taken - 0.2 * np.bincount(labels)) < 1).all()


def test_the_coreset_is_balanced_and_never_takes_an_image_back():
    stream = array_stream([6, 2, 6, 6, 6, 6, 6], memory=8, seed=5)
    labels = stream.train_images.labels
    earlier = None
    for task in range(1, len(stream)):
        coreset, start = stream.coreset(task), stream.classes(task).start
        assert len(coreset) == 8 == len(set(coreset)) and labels[coreset].max() < start
        assert np.ptp(np.delete(np.bincount(labels[coreset], minlength=start), 1)) <= 1  # class 1 has too few images
        if earlier is not None:
            assert set(coreset[labels[coreset] < stream.classes(task - 1).start]) <= set(earlier)
        earlier = coreset


def test_class_weights_are_inverse_to_the_frequency_with_mean_one_and_count_replayed_images():
    weights = array_stream([2, 6, 4, 4, 4]).class_weights(0)
    assert weights.dtype == np.float32 and weights.tolist() == pytest.approx([1.5, 0.5, 1, 1, 1])
    stream = array_stream([6, 2, 4, 4], memory=100)  # replays 8 images
    counts = np.bincount(stream.train_images.labels[stream.replay(1)], minlength=4)
    expected = 1 / (counts + [0, 0, 4, 4])
    assert len(stream.replay(1)) == 8 and stream.class_weights(1) == pytest.approx(expected / expected.mean())
