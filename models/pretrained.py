"""Which weights a backbone's name means, and where they lie, without importing torch or timm.

Weights come from one of three places: the project itself (``models/weights``), a file of the user, or
timm's repositories on the Hugging Face hub, through the hub's own cache.
"""

from __future__ import annotations

import ast
import functools
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from models.sizes import OWN_MODELS, timm_model_files

PAPER_TAG = "augreg_in21k_ft_in1k"
PAPER_NAMES = tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def full_name(name: str) -> str:
    """The name with its tag, ``architecture.tag``, as timm knows the weights.

    The paper's bare names mean their ``augreg_in21k_ft_in1k`` weights, whatever timm's present default is;
    other bare names mean timm's default, and names that timm renamed are the new ones. Names of the
    project's own models, and names that cannot be told from timm's source, come back as they are.
    """
    if name in OWN_MODELS:
        return name
    if name in PAPER_NAMES:
        return f"{name}.{PAPER_TAG}"
    table = _timm_table()
    name = table.renamed.get(name, name)
    tag = "" if "." in name else table.defaults.get(name, "")
    return f"{name}.{tag}" if tag else name


def shipped_file(name: str) -> Path | None:
    """Where the project keeps the weights of its own model ``name``; None for any other name."""
    if name not in OWN_MODELS:
        return None
    return Path(__file__).resolve().parent / "weights" / f"{name}.safetensors"


def hub_repository(name: str) -> str | None:
    """The repository with the weights of ``name``, ``timm/vit_base_patch16_224.dino``; None without one."""
    full = full_name(name)
    table = _timm_table()
    if full in table.repositories:
        return table.repositories[full]
    return None if full.partition(".")[0] in table.defaults else f"timm/{full}"


def cached_file(name: str) -> Path | None:
    """The weights of ``name`` in the local cache of the Hugging Face hub, or None."""
    from huggingface_hub import try_to_load_from_cache

    repository = hub_repository(name)
    for file in HUB_FILES if repository else ():
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found)
    return None


def missing_weights(name: str, weights: Path | None = None) -> str | None:
    """What to fetch and where to put it, in one sentence, when the weights of a backbone cannot be had.

    Costs no more than a look at the cache where the weights are there, and two seconds where they are not.

    Args:
        name: as on the command line, a right one (:func:`models.sizes.name_problem`).
        weights: the file that the user gave instead.

    Returns:
        None when the weights are shipped, given, in the hub's local cache, or can be downloaded.
    """
    problem = address_problem(name)
    if problem:
        return problem
    if weights is not None:
        return None if weights.is_file() else f"there is no file {weights}; check the path"
    shipped = shipped_file(name)
    if shipped is not None:
        if shipped.is_file():
            return None
        return f"{shipped}, a part of the project, is missing; restore it, for example by a fresh clone"
    if hub_repository(name) is None:
        return f"timm has no weights for {name} on the hub; give a file (--t_weights/--s_weights FILE)"
    if cached_file(name) is not None or hub_reachable():
        return None
    return (
        f"the weights of {full_name(name)} are not on this machine and the hub cannot be reached;"
        f" {how_to_get(name)}"
    )


def address_problem(name: str) -> str | None:
    """Why ``hub:repository`` cannot stand for a backbone: the parts it is made of would be known too late."""
    if ":" not in name:
        return None
    return f"{name} is an address; give timm's name of the architecture, and the weights as a file"


def how_to_get(name: str) -> str:
    """Where the weights of ``name`` are and how to hand them over, for an error message."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = hub_repository(name)
    return (
        f"on a machine with network get https://huggingface.co/{repository}/resolve/main/{HUB_FILES[0]} and"
        f" pass the file by --t_weights/--s_weights FILE, or copy the folder"
        f" models--{repository.replace('/', '--')} of that machine's hub cache to {HF_HUB_CACHE}"
    )


def hub_reachable(timeout_s: float = 2.0) -> bool:
    """Whether the Hugging Face hub answers at all; False at once when ``HF_HUB_OFFLINE`` is set."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT, timeout_s)


@functools.cache
def _answers(url: str, timeout_s: float) -> bool:
    """Whether anything answers at ``url`` in time, be it an error page."""
    answered = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s).close()
        except urllib.error.HTTPError:
            pass
        except urllib.error.URLError as error:
            # A certificate that only urllib distrusts proves a connection; the download itself will judge it.
            if not isinstance(error.reason, ssl.SSLError):
                return
        except (OSError, ValueError):
            return
        answered.append(True)

    # Looking up the host's address knows no timeout, so it happens in a thread that nobody waits for.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answered)


class _TimmTable(NamedTuple):
    """What timm's source says of its models.

    Attributes:
        defaults: architecture -> tag of its default weights, "" where none has weights.
        repositories: ``architecture.tag`` -> repository on the hub.
        renamed: old name -> ``architecture`` or ``architecture.tag``.
    """

    defaults: dict[str, str]
    repositories: dict[str, str]
    renamed: dict[str, str]


@functools.cache
def _timm_table() -> _TimmTable:
    """Read the table from the installed timm; it is empty where timm is not there as source."""
    table = _TimmTable({}, {}, {})
    marked: set[str] = set()
    for path in timm_model_files():
        for key, value in _dict_items(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and "vit" in value.value:
                table.renamed[key] = value.value
            elif isinstance(value, ast.Call) and getattr(value.func, "id", "") == "_cfg":
                _enter(table, marked, key, value)
    return table


def _dict_items(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """All ``'key': value`` of the dictionaries in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, value


def _enter(table: _TimmTable, marked: set[str], key: str, call: ast.Call) -> None:
    """Enter ``'architecture.tag': _cfg(...)``, by timm's rules.

    The first tag with weights is the default, unless one is marked by ``*``. Weights that were trained with
    QuickGELU are also those of an architecture with that activation.
    """
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    architecture, _, tag = key.partition(".")
    name = f"{architecture}.{tag.rstrip('*')}" if tag else architecture
    repository = given.get("hf_hub_id")
    if repository == "timm/":
        repository = f"timm/{name}"
    architectures = [architecture]
    if any("quickgelu" in str(getattr(node, "value", "")) for node in ast.walk(call)):
        architectures.append(architecture.replace("_clip_", "_clip_quickgelu_"))
    for one in architectures:
        table.defaults.setdefault(one, "")
        if not repository:
            continue
        table.repositories[name.replace(architecture, one)] = repository
        if one not in marked and (tag.endswith("*") or not table.defaults[one]):
            table.defaults[one] = tag.rstrip("*")
        if tag.endswith("*"):
            marked.add(one)
