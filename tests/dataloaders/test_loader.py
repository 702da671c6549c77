"""Batches: what they hold, that no number of workers or processes changes them, and how loading ends."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import transforms as v1

from dataloaders.base import BadImageError, DataError
from dataloaders.loader import BatchRequest, DataPipeline, StreamDataset
from dataloaders.tasks import build_stream
from tests.dataloaders.conftest import array_stream, class_folders, config, picture, pipeline
from tests.processes import ROOT
from utils.parallel import Parallel
from utils.seed import derive_seed


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(joined(first), joined(second), strict=True))


@pytest.fixture(scope="module")
def stream():
    return array_stream([6, 7, 6, 6, 6])


def test_an_epoch_has_full_batches_of_the_task_and_no_image_twice():
    data = pipeline(array_stream([6, 7, 6, 6, 6], train_aug=False))
    batches = list(data.train(0, "teacher", 0))
    assert [images.shape for images, _ in batches] == [(4, 3, 16, 16)] * data.steps_per_epoch(0)
    images, labels = joined(batches)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64 and set(labels.tolist()) == {0, 1}
    assert len(torch.unique(images, dim=0)) == 12 and 0 <= images.min() < images.max() <= 1  # 1 of 13 is left out
    assert same(data.train(0, "teacher", 0, first_step=2), batches[2:])  # a resume within the epoch
    assert not same(data.train(0, "teacher", 1), batches) and not same(data.train(0, "student", 0), batches)


def test_an_image_is_what_torchvision_makes_of_it_with_the_seed_of_its_sample(stream):
    plain = v1.Compose([v1.RandomResizedCrop(16), v1.RandomHorizontalFlip(), v1.ToTensor()])
    expected = []
    for index in stream.train_indices(0).tolist():
        torch.manual_seed(derive_seed(7, "augment", 0, "student", 2, index))
        expected.append(plain(stream.train_images.store.open(index)))
    for image in next(pipeline(stream).train(0, "student", 2))[0]:
        assert any(torch.equal(image, other) for other in expected)


def test_the_same_workers_serve_all_passes_and_change_nothing(stream):
    alone, data = pipeline(stream), pipeline(stream, workers=2)
    state = torch.get_rng_state()
    next(data.train(1, "teacher", 0))
    workers = {child.pid for child in multiprocessing.active_children()}
    for task, role, epoch in [(0, "teacher", 0), (2, "student", 1)]:
        left = data.train(1, "teacher", 0)
        next(left)
        assert same(alone.train(task, role, epoch), data.train(task, role, epoch))
        tests = [batch for each in (task, 0, 1) for batch in alone.test(each)]
        assert same(tests, data.test(task, 0, 1)) and len(tests) == sum(map(data.test_steps, (task, 0, 1)))
        with pytest.raises(RuntimeError, match="new pass"):
            next(left)
    assert {child.pid for child in multiprocessing.active_children()} == workers
    assert torch.equal(torch.get_rng_state(), state)
    data.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_begins_while_the_one_before_is_used(stream, workers, monkeypatch):
    begun, real = [], DataPipeline._train_requests
    monkeypatch.setattr(DataPipeline, "_train_requests", lambda *inputs: begun.append(inputs[3]) or real(*inputs))
    data, steps = pipeline(stream, workers=workers), pipeline(stream).steps_per_epoch(0)
    batches = data.train(0, "teacher", 2, until=5, first_step=1)
    got = list(itertools.islice(batches, steps - 1))
    assert (3 in begun) == (workers > 0)
    got += batches
    assert data.waited > 0
    alone = pipeline(stream)
    parts = [alone.train(0, "teacher", 2, first_step=1), alone.train(0, "teacher", 3), alone.train(0, "teacher", 4)]
    assert same(got, [batch for part in parts for batch in part])
    data.close()


def test_default_number_of_workers(monkeypatch):
    """By the cores that this process has for itself when there is a GPU to feed."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for device, group, workers in [("cpu", "1", 4), ("cuda", "1", 7), ("cuda", "4", 1), ("cuda", "16", 1)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", group)
        where = Parallel(torch.device(device))
        data = DataPipeline(array_stream(), config(workers=None), seed=0, parallel=where)
        assert data._loader.num_workers == workers
    assert pipeline(array_stream(), workers=0)._loader.num_workers == 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_what_one_process_would_see(stream, world_size):
    parts = [pipeline(stream, rank=rank, world_size=world_size, batch_size=6) for rank in range(world_size)]
    whole = pipeline(stream, batch_size=6)
    shared = zip(*(part.train(0, "student", 0) for part in parts), strict=True)
    for batch, rows in zip(whole.train(0, "student", 0), shared, strict=True):
        assert {len(labels) for _, labels in rows} == {6 // world_size}
        assert same([batch], rows)
    shares = [joined(part.test(0)) for part in parts]
    sizes = [len(labels) for _, labels in shares]
    assert sum(sizes) == stream.test_size(0) and max(sizes) - min(sizes) <= 1
    assert len(torch.unique(joined(shares)[0], dim=0)) == sum(sizes)


def test_replay_doubles_the_epoch_and_augments_each_draw_differently():
    stream = array_stream([8, 8, 8, 8], memory=1)
    data = pipeline(stream)
    assert (data.steps_per_epoch(0), data.steps_per_epoch(1)) == (4, 8)
    images, labels = joined(data.train(1, "teacher", 0))
    assert len(torch.unique(images[labels < 2], dim=0)) == 16  # one image, drawn 16 times
    with pytest.raises(DataError, match="task 1 has 16 training images, fewer than batch_size 17"):
        pipeline(stream, batch_size=17).train(0, "teacher", 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_named_and_the_next_pass_works(tmp_path, workers):
    class_folders(tmp_path, ["a", "b"], 5)
    stream = build_stream(config(dataset="ImageFolder", dataroot=tmp_path), seed=0, image_size=16)
    bad = tmp_path / stream.train_images.store.name(0)
    bad.unlink()
    with pytest.raises(DataError, match="^1 of the images that the split lists are missing"):
        pipeline(stream)
    bad.touch()
    data = pipeline(stream, workers=workers, batch_size=8)
    with pytest.raises(BadImageError, match=f"cannot read the image {bad}: it is empty or not an image"):
        list(data.train(0, "teacher", 0))
    picture(5).save(bad)
    assert len(joined(data.train(0, "teacher", 0))[1]) == 8
    data.close()


def test_the_images_load_in_workers_that_are_spawned(stream):
    dataset = StreamDataset(stream)
    request = BatchRequest(True, np.arange(4), [1, 2, 3, 4])
    loader = DataLoader(dataset, None, sampler=[request], num_workers=1, multiprocessing_context="spawn")
    assert same([dataset[request]], loader)


SCRIPT = """import multiprocessing, os, sys, time
from tests.dataloaders.conftest import array_stream, pipeline
data = pipeline(array_stream(), workers=2)
batches = data.train(0, "teacher", 0)
next(batches), next(batches)
print("started", flush=True)
if sys.argv[1] == "error":
    raise ValueError("of the run")
if sys.argv[1] == "lost worker":
    os.kill(multiprocessing.active_children()[0].pid, 9)
    while True:
        list(data.train(0, "teacher", 0))
time.sleep(600 if sys.argv[1] == "kill" else 0)
"""


@pytest.mark.parametrize(("end", "code"), [("none", 0), ("error", 1), ("lost worker", 1), ("kill", -signal.SIGKILL)])
def test_no_worker_outlives_the_main_process_however_it_ends(end, code):
    command = [sys.executable, "-c", SCRIPT, end]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as main:
        assert main.stdout.readline() == "started\n"
        if end == "kill":
            main.kill()
        main.communicate(timeout=60)  # the output ends when the last worker, which inherits it, has ended
    assert main.returncode == code
