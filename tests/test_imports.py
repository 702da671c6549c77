"""Imports go one way, and what has a name in a table is called by it nowhere else."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from tests.processes import ROOT

# Each may import those below it.
LAYERS = [{"run"}, {"learners"}, {"models", "dataloaders"}, {"utils"}]
PACKAGES = ("learners", "models", "dataloaders", "utils")
MODULES = sorted(path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported, anywhere in a file, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer(name: str) -> int | None:
    return next((i for i, packages in enumerate(LAYERS) if name.split(".")[0] in packages), None)


@pytest.mark.parametrize("path", [ROOT / "run.py", *MODULES], ids=name_of)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(ast.parse(path.read_text())):
        target = module.split(".")[0]
        assert target != "tests"
        if layer(target) is not None and target != package:
            assert layer(target) > layer(package), f"{name_of(path)} imports {module}"


def test_only_known_packages_are_needed():
    """Nothing is imported that requirements.txt does not list; only TensorBoard and wandb are a matter of choice."""
    requirements = (ROOT / "requirements.txt").read_text()
    distributions = {"PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "timm"}
    for path in [ROOT / "run.py", *MODULES]:
        for module in imports(ast.parse(path.read_text())):
            package = module.split(".")[0]
            if package not in (*PACKAGES, "run", "wandb") and package not in sys.stdlib_module_names:
                wanted = distributions.get(package, package)
                assert wanted.lower() in requirements.lower(), f"{name_of(path)} needs {package}"


# Where names of the tables may stand besides a method's own file: the tables, the default of a flag and its help,
# and the paper's numbers.
TABLES = {"models/prompts/__init__.py", "learners/distillers/__init__.py", "utils/config.py"}
REPORT = "utils/report/"


def words(tree: ast.AST) -> Iterator[str]:
    """Identifiers and texts of a file's code, without its docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table in (PROMPTS, DISTILLERS) for name in table if name != "none"],  # an ordinary word, too
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_of_the_tables_stand_nowhere_else(table, name):
    module, _, class_name = table[name].path.partition(":")
    own = f"{module.replace('.', '/')}.py"
    # "KD" is also a word of the field; as a text of its own it would be a name.
    pattern = re.compile(rf"\b({name}|{class_name})\b" if len(name) > 2 else rf"^({name})$")
    for path in [ROOT / "run.py", *MODULES]:
        place = name_of(path)
        if place == own or place in TABLES or place.startswith(REPORT):
            continue
        found = [word for word in words(ast.parse(path.read_text())) if pattern.search(word)]
        # A method may build on another one, whose class it imports.
        siblings = Path(place).parent == Path(own).parent
        assert [word for word in found if not (siblings and word == class_name)] == [], place
