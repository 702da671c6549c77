"""How fast images are loaded, against the plain pipeline: ``python -m tests.benchmark data``.

The plain pipeline is what one writes without further thought: open, convert, torchvision's v1 transforms on one
image at a time, torch's default collate, a float batch. Both load the same synthetic files of the real sizes in
the same run, in turns, so that whatever else the machine does hits both. Each consumer reads its whole batches
once, as a model would, in a process of one thread. One JSON object is printed:

- ``cases``: images a second (the best turn), the processor time an image costs all processes together (the least
  of the turns; robust on a busy machine), the ratios of both to the plain pipeline, and whether the pixels are
  the same;
- ``evaluation_start_seconds``: from asking for a task's test images to the first batch, beyond what the batch
  itself takes: with the workers that are there, and the first time, when they start;
- ``worker_memory_mb``: memory of its own that a worker has for 30,000 files, beyond that for ten.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1

from dataloaders.base import ArrayStore, FileStore, ImageStore
from dataloaders.loader import DataPipeline
from dataloaders.tasks import TaskStream
from dataloaders.transforms import EvalTransform, TrainTransform
from utils.seed import derive_seed

SIZE = 224
BATCH = 64
TRAIN = v1.Compose([v1.RandomResizedCrop(SIZE), v1.RandomHorizontalFlip(), v1.ToTensor()])
TEST = v1.Compose([v1.Resize(256), v1.CenterCrop(SIZE), v1.ToTensor()])


class PlainFiles(Dataset):
    """Files as torchvision's ImageFolder reads them."""

    def __init__(self, paths: list[str], transform: Callable) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with open(self._paths[index], "rb") as file:
            return self._transform(Image.open(file).convert("RGB")), 0


class PlainArrays(Dataset):
    """Images in memory as torchvision's CIFAR100 hands them out."""

    def __init__(self, images: np.ndarray, transform: Callable) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), 0


def photographs(folder: Path, images: int) -> list[str]:
    """JPEG files of about 500x400 pixels and 65 kB, the median of ImageNet-R's."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(images):
        width, height = (500, 400) if number % 3 else (400, 500)
        rough = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8))
        smooth = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
        noisy = smooth + rng.normal(0, 10, smooth.shape)
        path = folder / f"{number}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=88)
        paths.append(str(path))
    return paths


def one_task(store: ImageStore, crop: str) -> TaskStream:
    """A stream whose only task has all images, for training and for testing."""
    part = (store, np.zeros(len(store), dtype=np.int64))
    return TaskStream(
        part,
        part,
        class_names=["only"],
        split="folder",
        first_split_size=1,
        other_split_size=1,
        train_transform=TrainTransform(SIZE),
        test_transform=EvalTransform(SIZE, crop),
    )


def processor_seconds() -> float:
    """Processor time of this process and its workers so far."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(batches: Callable[[int], Iterable], seconds: float, first_pass: int) -> tuple[float, float]:
    """Images a second and processor seconds an image of whole passes that take about ``seconds``."""
    for pixels, _ in batches(first_pass):  # workers start, files enter the cache
        pixels.sum()
    images, number = 0, first_pass
    begin, used = time.perf_counter(), processor_seconds()
    while time.perf_counter() - begin < seconds:
        number += 1
        for pixels, _ in batches(number):
            pixels.sum()
            images += len(pixels)
    return images / (time.perf_counter() - begin), (processor_seconds() - used) / images


def compare(
    stream: TaskStream, plain: Dataset, train: bool, workers: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Speed of both pipelines, in turns."""
    turns: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
    for turn in range(options.turns):
        ours = DataPipeline(stream, batch_size=BATCH, eval_batch_size=BATCH, workers=workers)

        def our_pass(number: int, ours: DataPipeline = ours) -> Iterator:
            return ours.train(0, "teacher", number) if train else ours.test(0)

        turns["ours"].append(measure(our_pass, options.seconds, 1000 * turn))
        ours.close()
        theirs = DataLoader(
            plain, BATCH, shuffle=train, drop_last=train, num_workers=workers, persistent_workers=workers > 0
        )
        turns["plain"].append(measure(lambda number, theirs=theirs: theirs, options.seconds, 0))
        del theirs
    rate = {name: max(speed for speed, _ in values) for name, values in turns.items()}
    cost = {name: min(cpu for _, cpu in values) for name, values in turns.items()}
    return {
        "workers": workers,
        "images_per_second": round(rate["ours"], 1),
        "plain_images_per_second": round(rate["plain"], 1),
        "ratio": round(rate["ours"] / rate["plain"], 2),
        "cpu_ms_per_image": round(1000 * cost["ours"], 3),
        "plain_cpu_ms_per_image": round(1000 * cost["plain"], 3),
        "cpu_ratio": round(cost["plain"] / cost["ours"], 2),
    }


def identical(stream: TaskStream, plain: Dataset, train: bool) -> bool:
    """Whether both pipelines give the same bits for the same images and random states."""
    data = DataPipeline(stream, batch_size=BATCH, eval_batch_size=BATCH)
    if not train:
        theirs = iter(DataLoader(plain, BATCH))
        return all(torch.equal(images, next(theirs)[0]) for images, _ in data.test(0))
    images, _ = next(data.train(0, "teacher", 0))
    order = torch.randperm(len(plain), generator=_generator("order")).tolist()
    for image, index in zip(images, order[:BATCH], strict=True):
        torch.manual_seed(derive_seed(0, "augment", 0, "teacher", 0, index))
        if not torch.equal(image, plain[index][0]):
            return False
    return True


def _generator(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(0, purpose, 0, "teacher", 0))


def evaluation_start(store: ImageStore) -> dict[str, float]:
    """Seconds until the first batch of a task of one image, with two workers."""
    stream = one_task(store, "center_crop")
    data = DataPipeline(stream, batch_size=1, eval_batch_size=1, workers=2)
    alone = DataPipeline(stream, batch_size=1, eval_batch_size=1)

    def seconds(pipeline: DataPipeline) -> float:
        begin = time.perf_counter()
        next(pipeline.test(0))
        return time.perf_counter() - begin

    image = min(seconds(alone) for _ in range(3))
    first = seconds(data)
    later = sorted(seconds(data) for _ in range(9))
    data.close()
    return {"first": round(first - image, 4), "later": round(max(later[4] - image, 0.0), 4)}


def worker_memory(folder: Path, file: str) -> float:
    """MB that a worker has for itself with 30,000 files in 200 folders, less what it has with ten files."""
    names = [f"n{number % 200:08d}/sculpture_{number}.jpg" for number in range(30_000)]
    for wnid in range(200):
        (folder / f"n{wnid:08d}").mkdir()
    for name in names:
        os.link(file, folder / name)
    return round(_private_mb(folder, names) - _private_mb(folder, names[:10]), 2)


def _private_mb(folder: Path, names: list[str]) -> float:
    stream = one_task(FileStore(folder, names), "center_crop")
    data = DataPipeline(stream, batch_size=10, eval_batch_size=10, workers=1)
    batches = data.test(0)
    for _ in range(min(8, len(names) // 10)):
        next(batches)
    (worker,) = multiprocessing.active_children()
    rollup = Path(f"/proc/{worker.pid}/smaps_rollup").read_text()
    private = [int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_")]
    data.close()
    return sum(private) / 1024


def report(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    paths = photographs(folder, options.images)
    pixels = np.random.default_rng(0).integers(0, 256, (4 * options.images, 32, 32, 3), dtype=np.uint8)
    files = FileStore(folder, [os.path.basename(path) for path in paths])
    cases = {
        "CIFAR-100 training": (ArrayStore(pixels, "x"), "stretch", PlainArrays(pixels, TRAIN), True),
        "ImageNet-R training": (files, "center_crop", PlainFiles(paths, TRAIN), True),
        "ImageNet-R testing": (files, "center_crop", PlainFiles(paths, TEST), False),
    }
    results = []
    for name, (store, crop, plain, train) in cases.items():
        stream = one_task(store, crop)
        same = identical(stream, plain, train)
        for workers in options.workers:
            speed = compare(stream, plain, train, workers, options)
            results.append({"case": name, "identical_pixels": same, **speed})
    (folder / "many").mkdir()
    return {
        "machine": {
            "processors": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        },
        "cases": results,
        "evaluation_start_seconds": evaluation_start(files),
        "worker_memory_mb": worker_memory(folder / "many", paths[0]),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print; exit code 1 when the pixels differ."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark data", description="Speed of loading against the plain pipeline."
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each pipeline; the best counts")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=256, help="synthetic photographs")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = report(options, Path(folder))
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0 if all(case["identical_pixels"] for case in result["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
