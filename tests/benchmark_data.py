"""How fast images are loaded, against the plain pipeline: ``python -m tests.benchmark data``.

The plain pipeline is torchvision's ImageFolder with its v1 transforms and torch's default collate. Both load the same
synthetic JPEG files of ImageNet-R's median size (500 x 400 pixels, 65 kB) in turns, in a process of one thread. One
JSON object is printed: images per second, and processor time per image of all processes together (steadier on a busy
machine), start of the workers included.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder

from dataloaders.loader import EVAL_BATCH_SIZE, DataPipeline
from dataloaders.tasks import build_stream
from utils.config import DataConfig
from utils.logging import environment
from utils.parallel import Parallel

SIZE, BATCH, NUMBER = 224, 64, 256
PLAIN = {
    "train": v1.Compose([v1.RandomResizedCrop(SIZE), v1.RandomHorizontalFlip(), v1.ToTensor()]),
    "val": v1.Compose([v1.Resize(256), v1.CenterCrop(SIZE), v1.ToTensor()]),
}


def write_photographs(root: Path, number: int) -> None:
    """JPEG files in two classes, the same for training and testing."""
    for label in ("a", "b"):
        (root / "train" / label).mkdir(parents=True)
    (root / "val").symlink_to(root / "train")
    for index in range(number):
        noise = Image.merge("RGB", [Image.effect_noise((500, 400), 26) for _ in range(3)])
        noise.save(root / "train" / "ab"[index % 2] / f"{index}.jpg")


def our_epochs(root: Path, part: str, workers: int) -> Iterator[Iterable]:
    config = DataConfig("ImageFolder", root, first_split_size=2, other_split_size=2, batch_size=BATCH, workers=workers)
    stream = build_stream(config, seed=0, image_size=SIZE)
    with contextlib.closing(DataPipeline(stream, config, seed=0, parallel=Parallel(torch.device("cpu")))) as data:
        batches = data.train(0, "teacher", 0, until=10**9)
        while True:
            yield itertools.islice(batches, data.steps_per_epoch(0)) if part == "train" else data.test(0)


def plain_epochs(root: Path, part: str, workers: int) -> Iterator[Iterable]:
    images, train = ImageFolder(str(root / part), PLAIN[part]), part == "train"
    options = {"shuffle": train, "drop_last": train, "num_workers": workers, "persistent_workers": workers > 0}
    yield from itertools.repeat(DataLoader(images, BATCH if train else EVAL_BATCH_SIZE, **options))


def measure(epochs: Iterator[Iterable], seconds: float) -> tuple[float, float]:
    """Images per second and processor milliseconds per image of epochs that take about ``seconds``."""
    used = sum(os.times()[:4])  # with the processes that have ended
    first = sum(len(pixels) for pixels, _ in next(epochs))  # workers start, files enter the cache
    images, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        images += sum(len(pixels) for pixels, _ in next(epochs))
    epochs.close()
    return images / elapsed, 1000 * (sum(os.times()[:4]) - used) / (first + images)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m tests.benchmark data", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each pipeline")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), NUMBER)
        for part, workers, _ in itertools.product(PLAIN, options.workers, range(options.turns)):
            cases.append({"part": part, "workers": workers})
            for name, epochs in (("", our_epochs), ("plain_", plain_epochs)):
                rate, cost = measure(epochs(Path(folder), part, workers), options.seconds)
                cases[-1] |= {f"{name}images_per_second": round(rate, 1), f"{name}cpu_ms_per_image": round(cost, 3)}
    print(json.dumps({"cases": cases, **environment()}, indent=1))
