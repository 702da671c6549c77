"""Emoji-R: the data set that the project ships; see ``dataloaders/data/emoji_r``."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from dataloaders.base import ArrayStore, ImageSource, read_image

DATA_DIR = Path(__file__).parent / "data" / "emoji_r"


class EmojiR(ImageSource):
    """200 emoji, each drawn by several artists: 3 test renditions a class, the rest for training.

    Labels follow the order of ``index.json``. All images are decoded at once (22 MB) and stay in memory.
    """

    test_crop = "stretch"

    def __init__(
        self,
        root: Path | None = None,
        *,
        data_url: str | None = None,
        seed: int = 0,
        log_dir: Path | None = None,
        progress: bool = True,
    ) -> None:
        index = json.loads((DATA_DIR / "index.json").read_text(encoding="utf-8"))
        self.class_names = [entry["name"] for entry in index["classes"]]
        self.split = "official"
        self._images = index["images"]

    def load(self, train: bool) -> tuple[ArrayStore, np.ndarray]:
        part = "train" if train else "test"
        entries = [entry for entry in self._images if entry["split"] == part]
        archive = DATA_DIR / "images.zip"
        images = []
        with zipfile.ZipFile(archive) as files:
            for entry in entries:
                raw = io.BytesIO(files.read(entry["file"]))
                images.append(np.asarray(read_image(raw, f"{archive}:{entry['file']}")))
        labels = np.asarray([entry["label"] for entry in entries], dtype=np.int64)
        return ArrayStore(np.stack(images), f"emoji_r/{part}"), labels

    @classmethod
    def preflight(cls, root: Path | None, data_url: str | None = None) -> list[str]:
        missing = [name for name in ("index.json", "images.zip") if not (DATA_DIR / name).is_file()]
        if missing:
            return [f"Emoji_R: {' and '.join(missing)} missing in {DATA_DIR}; restore it from the repository"]
        return []


