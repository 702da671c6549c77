"""Icon-R: the data set that the project ships; see ``dataloaders/data/icon_r``."""

import csv
import io
import itertools
import zipfile
from pathlib import Path

import numpy as np

from dataloaders.base import ArrayStore, DataSource, read_image

DATA_DIR = Path(__file__).parent / "data" / "icon_r"
INDEX, ARCHIVE = DATA_DIR / "index.tsv", DATA_DIR / "images.zip"
SIZE = 64


class IconR(DataSource):
    """200 things, each drawn by many designers; no designer's pictures of a class are in both parts.

    Labels and the order of the pictures follow ``index.tsv``. All are decoded at once (150 MB) and stay in memory.
    """

    test_crop = "stretch"
    num_classes = 200

    def find(self) -> None:
        with INDEX.open(encoding="utf-8", newline="") as file:
            self._rows = list(csv.DictReader(file, delimiter="\t"))
        self.class_names = list(dict.fromkeys(row["class"] for row in self._rows))
        self.split = "official"

    def load(self, train: bool) -> tuple[ArrayStore, np.ndarray]:
        part, images, labels = "train" if train else "test", [], []
        with zipfile.ZipFile(ARCHIVE) as files:
            for name, rows in itertools.groupby(self._rows, key=lambda row: row["sheet"]):
                kept = [(i, int(row["label"])) for i, row in enumerate(rows) if row["split"] == part]
                sheet = np.asarray(read_image(io.BytesIO(files.read(name)), f"{ARCHIVE}:{name}"))
                images.append(sheet.reshape(-1, SIZE, SIZE, 3)[[i for i, _ in kept]])
                labels += [label for _, label in kept]
        return ArrayStore(np.concatenate(images), f"icon_r/{part}"), np.asarray(labels, dtype=np.int64)
