"""The table of data sets, and what is known before anything is loaded."""

import re

import pytest

from dataloaders import DATASETS
from dataloaders.base import DataError, DataSource
from tests.dataloaders.conftest import config


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_is_a_source_that_says_what_is_missing(name, tmp_path):
    source = DATASETS[name].load()
    assert issubclass(source, DataSource) and source.__doc__
    assert source.count_classes(tmp_path) == source.num_classes
    settings = config(dataset=name, dataroot=tmp_path)
    problems = source.missing(settings)
    assert len(problems) == int(name not in ("CIFAR100", "CIFAR10", "Icon_R"))
    for problem in problems:
        assert problem.startswith(f"dataset {name}: ") and str(tmp_path) in problem and "\n" not in problem
        with pytest.raises(DataError, match=f"^{re.escape(problem)}$"):
            source(settings, seed=0)
