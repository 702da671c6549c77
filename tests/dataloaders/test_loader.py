"""Batches: what they hold, that no number of workers or processes changes them, and how loading ends."""

import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import transforms as v1

from dataloaders.base import BadImageError, DataError
from dataloaders.loader import BatchRequest, DataPipeline, StreamImages
from tests.dataloaders.conftest import array_stream, file_stream, picture
from utils.seed import derive_seed


def pipeline(stream, **settings) -> DataPipeline:
    return DataPipeline(stream, **{"batch_size": 4, "eval_batch_size": 5, "seed": 7, **settings})


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(joined(first), joined(second), strict=True))


@pytest.fixture(scope="module")
def stream():
    return array_stream([6, 7, 6, 6, 6])


@pytest.fixture(scope="module")
def with_workers(stream):
    loader = pipeline(stream, workers=2)
    yield loader
    loader.close()


def test_training_batches_are_full_and_of_the_task(stream):
    data = pipeline(stream)
    batches = list(data.train(0, "teacher", 0))
    assert len(batches) == data.steps_per_epoch(0) == 3  # 13 images: one is left out
    for images, labels in batches:
        assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32
        assert images.is_contiguous() and 0 <= images.min() and images.max() <= 1
        assert labels.shape == (4,) and labels.dtype == torch.int64
        assert set(labels.tolist()) <= {0, 1}


def test_an_epoch_holds_no_image_twice_and_every_epoch_and_phase_has_its_own_order(stream):
    data = pipeline(array_stream([6, 7, 6, 6, 6], train_aug=False))
    images, _ = joined(data.train(1, "teacher", 0))
    assert len(torch.unique(images, dim=0)) == len(images) == 12
    assert not same(data.train(1, "teacher", 0), data.train(1, "teacher", 1))
    assert not same(data.train(1, "teacher", 0), data.train(1, "student", 0))


def test_an_augmented_image_is_what_torchvision_makes_of_it_with_the_seed_of_its_sample(stream):
    images, labels = next(iter(pipeline(stream).train(0, "student", 2)))
    plain = v1.Compose([v1.RandomResizedCrop(16), v1.RandomHorizontalFlip(), v1.ToTensor()])
    expected = []
    for index in stream.train_indices(0):
        torch.manual_seed(derive_seed(7, "augment", 0, "student", 2, int(index)))
        expected.append(plain(stream.train_images.store.open(index)))
    for image in images:
        assert any(torch.equal(image, other) for other in expected)


def test_an_epoch_goes_on_where_it_was_left(stream):
    data = pipeline(stream)
    rest = list(data.train(0, "teacher", 0, first_step=2))
    assert len(rest) == 1 and same(rest, list(data.train(0, "teacher", 0))[2:])


def test_workers_change_nothing(stream, with_workers):
    alone = pipeline(stream)
    for task, phase, epoch in [(0, "teacher", 0), (2, "student", 1), (0, "teacher", 1)]:
        assert same(alone.train(task, phase, epoch), with_workers.train(task, phase, epoch))
        assert same(alone.test(task), with_workers.test(task))


def test_the_same_workers_serve_all_passes(with_workers):
    list(with_workers.test(0))
    before = {child.pid for child in multiprocessing.active_children()}
    start = time.perf_counter()
    list(with_workers.test(1))
    assert time.perf_counter() - start < 0.2
    list(with_workers.train(1, "teacher", 0))
    assert {child.pid for child in multiprocessing.active_children()} == before


def test_a_batch_that_is_held_is_never_written_again(stream):
    data = pipeline(stream)
    weight = torch.ones((), requires_grad=True)
    copies, held, losses = [], [], []
    for epoch in range(3):
        for images, _ in data.train(0, "teacher", epoch):
            copies.append(images.clone())
            held.append(images[1:])  # a view of it
            losses.append((images * weight).sum())  # autograd keeps it
            del images
    assert all(torch.equal(view, copy[1:]) for view, copy in zip(held, copies, strict=True))
    del held
    for loss, copy in zip(losses, copies, strict=True):
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient == copy.sum()


def test_memory_is_used_again(stream):
    buffers = pipeline(stream)._buffers
    first = buffers.take((2, 3))
    address = first.data_ptr()
    second = buffers.take((2, 3))
    assert second.data_ptr() != address
    view = first[1:]
    del first
    assert buffers.take((2, 3)).data_ptr() != address
    del view
    assert buffers.take((2, 3)).data_ptr() == address
    held = [buffers.take((2, 3)) for _ in range(9)]
    assert len({tensor.data_ptr() for tensor in held}) == 9
    assert buffers.take((5,)).shape == (5,)


def test_the_global_random_state_is_left_alone(stream):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data = pipeline(stream)
    list(data.train(0, "teacher", 0))
    list(data.test(0))
    parallel = pipeline(stream, workers=1)
    list(parallel.test(0))
    parallel.close()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_and_starting_anew(stream, workers):
    data = pipeline(stream, workers=workers)
    for _ in data.train(0, "teacher", 0):
        break
    left = iter(data.train(1, "teacher", 0))
    next(left)
    assert same(data.train(2, "teacher", 0), pipeline(stream).train(2, "teacher", 0))
    with pytest.raises(RuntimeError, match="new pass"):
        next(left)
    data.close()
    data.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(data.test(0)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_what_one_process_would_see(stream, world_size):
    parts = [pipeline(stream, rank=r, world_size=world_size, batch_size=6) for r in range(world_size)]
    whole = list(pipeline(stream, batch_size=6).train(0, "student", 0))
    shared = zip(*(part.train(0, "student", 0) for part in parts), strict=True)
    for batch, rows in zip(whole, shared, strict=True):
        assert {len(labels) for _, labels in rows} == {6 // world_size}
        assert same([batch], rows)
    shares = [joined(part.test(0)) for part in parts]
    sizes = [len(labels) for _, labels in shares]
    assert sum(sizes) == stream.test_size(0) and max(sizes) - min(sizes) <= 1
    images = torch.cat([images for images, _ in shares])
    assert len(torch.unique(images, dim=0)) == len(images)


def test_replayed_images_double_the_epoch_and_are_augmented_anew_each_time():
    stream = array_stream([8, 8, 8, 8], memory=1)
    data = pipeline(stream)
    assert (data.steps_per_epoch(0), data.steps_per_epoch(1)) == (4, 8)
    images, labels = joined(data.train(1, "teacher", 0))
    replayed = images[labels < 2]
    assert len(replayed) == 16
    assert len(torch.unique(replayed, dim=0)) == 16  # one image, drawn 16 times


def test_without_augmentation_training_images_get_the_test_transform():
    stream = array_stream(train_aug=False)
    images, labels = joined(pipeline(stream).train(0, "teacher", 0))
    expected = [v1.ToTensor()(stream.test_transform(stream.train_images.store.open(i))) for i in range(12)]
    assert all(any(torch.equal(image, other) for other in expected) for image in images)


def test_fewer_images_than_a_batch_is_an_error():
    with pytest.raises(DataError, match="task 0 has 12 training images, fewer than batch_size 13"):
        pipeline(array_stream(), batch_size=13).train(0, "teacher", 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_and_the_next_pass_works(tmp_path, workers):
    names = [f"{i}.png" for i in range(8)]
    for i, name in enumerate(names):
        picture(i).save(tmp_path / name)
    data = pipeline(file_stream(tmp_path, names), workers=workers, batch_size=8)
    (tmp_path / "5.png").write_bytes(b"")
    with pytest.raises(BadImageError) as caught:
        list(data.train(0, "teacher", 0))
    assert str(caught.value) == f"cannot read the image {tmp_path}/5.png: the file is empty"
    picture(5).save(tmp_path / "5.png")
    assert len(joined(data.train(0, "teacher", 0))[1]) == 8
    data.close()


def test_workers_survive_the_signals_of_a_terminal_but_not_the_end_of_their_parent(stream):
    data = pipeline(stream, workers=2)
    list(data.test(0))
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        # Not from the parent: a process in between sends it, as a batch system would.
        os.system(f"kill -TERM {worker.pid}")
    time.sleep(0.2)
    assert len(joined(data.test(0))[1]) == stream.test_size(0)
    for worker in workers:
        worker.terminate()
        worker.join(timeout=5)
        assert not worker.is_alive()
    data.close()


def test_a_pipeline_that_is_dropped_ends_its_workers(stream):
    before = set(multiprocessing.active_children())
    data = pipeline(stream, workers=1)
    list(data.test(0))
    workers = set(multiprocessing.active_children()) - before
    assert workers
    del data
    for worker in workers:
        worker.join(timeout=5)
        assert not worker.is_alive()


def test_the_images_pickle_and_load_in_spawned_workers(stream):
    images = StreamImages(stream)
    request = BatchRequest(True, np.arange(4), [1, 2, 3, 4])
    expected = images.__getitems__(request)
    copied = pickle.loads(pickle.dumps(images)).__getitems__(request)
    loader = DataLoader(
        images,
        batch_sampler=[request],
        num_workers=1,
        collate_fn=as_it_is,
        multiprocessing_context="spawn",
    )
    for pixels, labels in [copied, *loader]:
        assert torch.equal(pixels, expected[0]) and torch.equal(labels, expected[1])


def as_it_is(batch):
    return batch
