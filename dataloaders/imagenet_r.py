"""ImageNet-R (Hendrycks et al. 2021), split as in CODA-Prompt (Smith et al. 2023)."""

import logging
from collections.abc import Iterable
from pathlib import Path

import yaml

from dataloaders.base import DataError
from dataloaders.download import Checksum, fetch, mirrored
from dataloaders.folders import FileList, FileSource, list_classes, split_by_class, subfolders
from utils.config import DataConfig

_log = logging.getLogger(__name__)

FOLDER = "imagenet-r"  # in dataroot
URL = "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"
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


class ImageNetR(FileSource):
    """30,000 renditions (art, cartoons, toys ...) of 200 ImageNet classes in ``dataroot/imagenet-r/<wnid>``.

    The authors' two split files also fix the class numbers, a shuffle of the wnids, and so which classes form which
    task. They are taken from ``dataloaders/splits``, else from ``dataroot``, else downloaded into it. If none of that
    works, a split is drawn with the seed, and kept in log_dir for resumes.
    """

    num_classes = 200
    upright = False  # as in the original

    def find(self) -> None:
        if self.resumed_dir is not None and (self.resumed_dir / TRAIN_FILE).exists():
            self._draw()  # the same again, unless images have changed, which is judged for all data sets alike
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
        names = {label: path.split("/")[-2] for path, label in self.train + self.test}
        self._require_all_classes(names, f"{TRAIN_FILE} and {TEST_FILE}")
        self.class_names = [names[label] for label in range(self.num_classes)]

    @classmethod
    def missing(cls, config: DataConfig) -> list[str]:
        folder = config.dataroot / FOLDER
        if folder.is_dir():
            return []
        return [
            f"dataset ImageNet_R: no folder {folder}; get {URL} and unpack it into dataroot, so that "
            f"{folder / 'n01443537'} and 199 others like it exist"
        ]

    def _split_file(self, name: str) -> Path:
        """Path of the authors' split file, which is downloaded if needed; DataError if that is not possible."""
        local = SPLITS_DIR / name
        if local.is_file():
            if not CHECKSUMS[name].matches(local):
                _log.warning("%s is not the authors' file (its SHA-256 differs); it is used anyway", local)
            return local
        fetch(mirrored(SPLITS_URL + name, self.data_url), self.root / name, CHECKSUMS[name], progress=self.progress)
        return self.root / name

    def _draw(self) -> None:
        """Number classes by name, draw a fifth of each for testing, and list the split as the authors' files do."""
        self.split = "seeded"
        self.class_names = subfolders(self.root / FOLDER)
        self._require_all_classes(range(len(self.class_names)), self.root / FOLDER)
        self.train, self.test = split_by_class(list_classes(self.root, FOLDER, self.class_names), self.seed)
        for name, files in ((TRAIN_FILE, self.train), (TEST_FILE, self.test)):
            content = {"data": [f"data/{path}" for path, _ in files], "targets": [label for _, label in files]}
            self.drawn_split[name] = yaml.dump(content, Dumper=_Dumper).encode()

    def _require_all_classes(self, labels: Iterable[int], where: object) -> None:
        """Raise DataError unless the labels found in ``where`` are those of the data set."""
        found = sorted(labels)
        if found != list(range(self.num_classes)):
            raise DataError(
                f"dataset ImageNet_R: {len(found)} classes instead of {self.num_classes} in {where}; get {URL} again, "
                "or use --dataset ImageFolder for images of your own"
            )


def _read_split(file: Path) -> FileList:
    """Read ``data``, a list of ``data/imagenet-r/<wnid>/<file>``, and ``targets``; DataError for a damaged file."""
    try:
        content = yaml.load(file.read_bytes(), Loader=_Loader)
        paths = [path.removeprefix("data/") for path in content["data"]]  # "data" is dataroot
        for path in paths:
            if len(parts := path.split("/")) != 3 or {"", ".", ".."} & set(parts):
                raise ValueError(f"unexpected path {path}")  # it might lead elsewhere
        if strange := [label for label in content["targets"] if type(label) is not int]:
            raise ValueError(f"the label {strange[0]} is not a whole number")
        return list(zip(paths, content["targets"], strict=True))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot use the split file {file}: {reason}; get it from {SPLITS_URL}") from error
