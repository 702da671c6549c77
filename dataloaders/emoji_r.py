"""Emoji-R: the data set that the project ships; see ``dataloaders/data/emoji_r``."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from dataloaders.base import ArrayStore, DataSource, read_image
from utils.config import DataConfig

DATA_DIR = Path(__file__).parent / "data" / "emoji_r"
INDEX, ARCHIVE = DATA_DIR / "index.json", DATA_DIR / "images.zip"


class EmojiR(DataSource):
    """200 emoji, each drawn by several artists: 3 test renditions a class, the rest for training.

    Labels follow the order of ``index.json``. All images are decoded at once (22 MB) and stay in memory.
    """

    test_crop = "stretch"
    num_classes = 200

    def find(self) -> None:
        index = json.loads(INDEX.read_text(encoding="utf-8"))
        self.class_names = [entry["name"] for entry in index["classes"]]
        self.split = "official"
        self._images = index["images"]

    def load(self, train: bool) -> tuple[ArrayStore, np.ndarray]:
        part = "train" if train else "test"
        entries = [entry for entry in self._images if entry["split"] == part]
        with zipfile.ZipFile(ARCHIVE) as files:
            raw = {entry["file"]: io.BytesIO(files.read(entry["file"])) for entry in entries}
        images = np.stack([np.asarray(read_image(file, f"{ARCHIVE}:{name}")) for name, file in raw.items()])
        labels = np.asarray([entry["label"] for entry in entries], dtype=np.int64)
        return ArrayStore(images, f"emoji_r/{part}"), labels

    @classmethod
    def missing(cls, config: DataConfig) -> list[str]:
        missing = [path.name for path in (INDEX, ARCHIVE) if not path.is_file()]
        if not missing:
            return []
        return [f"dataset Emoji_R: {' and '.join(missing)} missing in {DATA_DIR}; restore it from the repository"]
