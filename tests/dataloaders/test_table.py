"""The table of data sets, and what is known before anything is loaded."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dataloaders import DATASETS
from dataloaders.base import DataError, DataSource
from tests.dataloaders.conftest import config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_is_a_source_that_says_what_is_missing(name, tmp_path):
    entry, source = DATASETS[name], DATASETS.load(name)
    assert issubclass(source, DataSource) and source.__doc__
    assert entry.count_classes(tmp_path) == entry.num_classes == getattr(source, "num_classes", entry.num_classes)
    settings = config(dataset=name, dataroot=tmp_path)
    problems = entry.missing(settings)
    assert len(problems) == int(name not in ("CIFAR100", "CIFAR10", "Emoji_R"))
    for problem in problems:
        assert problem.startswith(f"dataset {name}: ") and str(tmp_path) in problem and "\n" not in problem
        with pytest.raises(DataError, match=f"^{re.escape(problem)}$"):
            source(settings, seed=0)


def test_reading_the_table_imports_no_torch():
    code = """
import sys
from dataloaders import DATASETS
assert "numpy" not in sys.modules
from dataloaders.tasks import split_classes
from utils.config import DataConfig
for entry in map(DATASETS.__getitem__, DATASETS):
    entry.count_classes(DataConfig().dataroot), entry.missing(DataConfig())
assert not {"torch", "torchvision", "timm"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
