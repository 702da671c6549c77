"""ImageNet-R (Hendrycks et al. 2021), split as in CODA-Prompt (Smith et al. 2023)."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml

from dataloaders.base import DataError
from dataloaders.download import Checksum, fetch, mirrored
from dataloaders.folders import FileList, checked_path
from dataloaders.imagenet_a import WordNetFolders

_log = logging.getLogger(__name__)

SPLITS_DIR = Path(__file__).parent / "splits"
SPLITS_URL = "https://raw.githubusercontent.com/GT-RIPL/CODA-Prompt/main/dataloaders/splits/"
TRAIN_FILE, TEST_FILE = "imagenet-r_train.yaml", "imagenet-r_test.yaml"
CHECKSUMS = {
    TRAIN_FILE: Checksum("sha256", "6bcaa14ca9359915ac3a44c48ae71388146385686eb15da79a37844421a0b845"),
    TEST_FILE: Checksum("sha256", "57275ac242d68983a4f39ccb81ec34f48b1bd920b9cd79e6e8040d7c042db02a"),
}
# Much faster than PyYAML's parser in Python, if PyYAML was built with it.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class ImageNetR(WordNetFolders):
    """30,000 renditions (art, cartoons, toys ...) of 200 ImageNet classes.

    The authors' two split files also fix the class numbers, a shuffle of the wnids, and so which classes form which
    task. They are taken from ``dataloaders/splits``, else from ``dataroot``, else downloaded into it. If none of that
    works, a split is drawn with the seed, and kept in log_dir for resumes.
    """

    name = "ImageNet_R"
    url = "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"
    folder = "imagenet-r"
    example = "n01443537"
    upright = False  # as in the original

    def find(self) -> None:
        kept = [] if self.resumed_dir is None else [self.resumed_dir / name for name in CHECKSUMS]
        if any(file.exists() for file in kept):
            self._draw()
            for file in kept:
                if not file.is_file() or file.read_bytes() != self.drawn_split[file.name]:
                    raise DataError(
                        f"{file} is not the split that the seed draws from {self.root / self.folder}: restore the "
                        "file or the images as they were when the run started, or start in a new log_dir"
                    )
            _log.warning("the split of ImageNet-R is not the paper's but that drawn before, in %s", self.resumed_dir)
            return
        try:
            files = [self._split_file(name) for name in CHECKSUMS]
        except DataError as error:
            self._draw()
            _log.warning(
                f"the split of ImageNet-R is not the paper's, because its files are not available: {error}. Images are "
                "split 80/20 with the seed instead, and accuracies cannot be compared with the paper's. To use the "
                f"paper's split, put {TRAIN_FILE} and {TEST_FILE} from {SPLITS_URL} into {SPLITS_DIR} and start in a "
                "new log_dir"
            )
            return
        self.split = "authors"
        self.train, self.test = map(_read_split, files)
        self.class_names = self.names_from_paths(f"{TRAIN_FILE} and {TEST_FILE}")

    def _split_file(self, name: str) -> Path:
        """Path of the authors' split file, which is downloaded if needed; DataError if that is not possible."""
        local = SPLITS_DIR / name
        if local.is_file():
            if not CHECKSUMS[name].matches(local):
                _log.warning("%s is not the authors' file (its SHA-256 differs); it is used as it is", local)
            return local
        fetch(mirrored(SPLITS_URL + name, self.data_url), self.root / name, CHECKSUMS[name], progress=self.progress)
        return self.root / name

    def _draw(self) -> None:
        """Split by the seed, and list the split as the authors' files do."""
        super().find()
        for name, files in ((TRAIN_FILE, self.train), (TEST_FILE, self.test)):
            content = {"data": [f"data/{path}" for path, _ in files], "targets": [label for _, label in files]}
            self.drawn_split[name] = yaml.dump(content, Dumper=_Dumper).encode()


def _read_split(file: Path) -> FileList:
    """Read ``data``, a list of ``data/imagenet-r/<wnid>/<file>``, and ``targets``; DataError for a damaged file."""
    try:
        content = yaml.load(file.read_bytes(), Loader=_Loader)
        paths = [checked_path(path.removeprefix("data/")) for path in content["data"]]  # "data" is dataroot
        if strange := [label for label in content["targets"] if type(label) is not int]:
            raise ValueError(f"the label {strange[0]} is no whole number")
        return list(zip(paths, content["targets"], strict=True))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot use the split file {file}: {reason}; get it from {SPLITS_URL}") from error
