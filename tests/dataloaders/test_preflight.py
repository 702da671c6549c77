"""The table of data sets, and what is said before anything is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from dataloaders import DATASETS
from dataloaders.base import ImageSource
from dataloaders.preflight import count_classes, preflight

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_is_a_source_with_its_number_of_classes(name, tmp_path):
    source = DATASETS.load(name)
    assert issubclass(source, ImageSource) and source.__doc__
    assert source.test_crop in ("stretch", "center_crop")
    assert count_classes(name, tmp_path) == DATASETS[name].num_classes
    problems = preflight(name, tmp_path)
    downloads = name.startswith("CIFAR") or not DATASETS[name].needs_dataroot
    assert bool(problems) != downloads
    assert all("\n" not in problem and str(tmp_path) in problem for problem in problems)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_mirror_is_named(tmp_path):
    for url in ("mirror.example/cifar", "ftp://mirror.example", ""):
        (problem,) = preflight("CIFAR100", tmp_path, url)
        assert problem.startswith(f"--data_url {url}:")
    assert preflight("CIFAR100", tmp_path, "http://mirror.example") == []


def test_none_of_this_imports_torch():
    code = (
        "import sys\n"
        "from dataloaders import DATASETS\n"
        "from dataloaders.preflight import count_classes, preflight\n"
        "for name in DATASETS:\n"
        "    count_classes(name, 'nowhere'), preflight(name, 'nowhere')\n"
        "assert not {'torch', 'torchvision', 'timm'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
