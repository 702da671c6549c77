"""Backbones by name and their weights from files, good and bad."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from models import backbones
from models.backbones import BackboneError, load_backbone, size_of
from models.sizes import OWN_MODELS, PAPER_NAMES, known_size, name_problem
from tests import runs

TINY = {"embed_dim": 16, "num_heads": 2, "depth": 2}
NAME = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """timm's models with two narrow blocks and 3 x 3 patches."""
    create = timm.create_model

    def create_small(name, **options):
        patch = create(name, num_classes=0, depth=1, embed_dim=4, num_heads=1).patch_embed.patch_size[0]
        return create(name, **options, **TINY, img_size=3 * patch)

    monkeypatch.setattr(timm, "create_model", create_small)
    torch.manual_seed(0)


def state_of(name: str = NAME) -> dict[str, torch.Tensor]:
    """Random weights of a (small) model, with a classifier."""
    state = timm.create_model(name, num_classes=0).state_dict()
    state = {key: torch.randn_like(value) for key, value in state.items()}
    return state | {"head.weight": torch.randn(7, 16), "head.bias": torch.randn(7)}


def assert_loaded(path, state, name: str = NAME) -> backbones.Backbone:
    """The backbone in ``path`` has the values in ``state``."""
    backbone = load_backbone(name, weights=path)
    loaded = backbone.vit.vit.state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith("head.")}
    for key, value in loaded.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].float()), key
    return backbone


def message_of(path, name: str = NAME) -> str:
    with pytest.raises(BackboneError) as error:
        load_backbone(name, weights=path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def test_random_weights_are_seeded_by_the_caller():
    first, second = (torch.manual_seed(5) and load_backbone(NAME, pretrained=False) for _ in range(2))
    assert (first.source, first.sha256, first.tag) == ("random", "", f"{NAME}.augreg_in21k_ft_in1k")
    assert torch.equal(first.vit.vit.pos_embed, second.vit.vit.pos_embed)


@pytest.mark.parametrize("name", OWN_MODELS)
def test_the_projects_own_models(name):
    backbone = load_backbone(name)
    assert backbone.tag == name
    with open(backbone.source, "rb") as file:
        assert backbone.sha256 == hashlib.sha256(file.read()).hexdigest()
    assert size_of(backbone.vit) == known_size(name)
    assert all(value.dtype == torch.float32 for value in backbone.vit.state_dict().values())


WRAPPED = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model, with the arguments of the script": lambda state: {"model": state, "args": argparse.Namespace(lr=1)},
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "float16": lambda state: {key: value.half() for key, value in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_pth(tmp_path, wrap):
    path = tmp_path / "weights.pth"
    state = state_of()
    torch.save(wrap(state), path)
    backbone = assert_loaded(path, wrap(state) if wrap is WRAPPED["float16"] else state)
    assert backbone.tag == NAME  # no tag: these are not timm's weights
    assert backbone.source == str(path)
    assert backbone.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_and_pth_of_old_torch(tmp_path):
    state = state_of()
    save_file(state, tmp_path / "w.safetensors")
    assert_loaded(tmp_path / "w.safetensors", state)
    torch.save(state, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    assert_loaded(tmp_path / "w.bin", state)


def google_archive(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A state dict in Google's naming and layout."""
    plain = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for block in range(2):
        ours, theirs = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        for index, name in enumerate(("query", "key", "value")):
            rows = slice(16 * index, 16 * index + 16)
            weight, bias = state[ours + "attn.qkv.weight"][rows], state[ours + "attn.qkv.bias"][rows]
            plain[f"{attention}{name}/kernel"] = weight.T.reshape(16, 2, 8)
            plain[f"{attention}{name}/bias"] = bias.reshape(2, 8)
        plain[attention + "out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(2, 8, 16)
        plain[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        for norm, number in (("norm1", 0), ("norm2", 2)):
            plain[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
            plain[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
        for layer in (1, 2):
            plain[f"{theirs}MlpBlock_3/Dense_{layer - 1}/kernel"] = state[f"{ours}mlp.fc{layer}.weight"].T
            plain[f"{theirs}MlpBlock_3/Dense_{layer - 1}/bias"] = state[f"{ours}mlp.fc{layer}.bias"]
    return {key: value.numpy() for key, value in plain.items()}


def test_npz_of_google(tmp_path):
    state = state_of()
    np.savez(tmp_path / "w.npz", **google_archive(state))
    assert_loaded(tmp_path / "w.npz", state)


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_code_is_never_run(tmp_path):
    trace = tmp_path / "trace"
    for number, zipped in enumerate((True, False)):
        path = tmp_path / f"{number}.pth"
        torch.save({"model": state_of(), "x": Code(trace)}, path, _use_new_zipfile_serialization=zipped)
        assert "could run code" in message_of(path)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"x": Code(trace)}))
    assert "could run code" in message_of(tmp_path / "raw.pth")
    np.savez(tmp_path / "w.npz", **{"embedding/kernel": np.array([Code(trace)], dtype=object)})
    message_of(tmp_path / "w.npz")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.npz"])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"PK\x03\x04 but nothing else", None])
def test_damaged_files(content, name, tmp_path):
    """The last one is cut short."""
    path, state = tmp_path / name, state_of()
    if content is None:
        writers = {"w.pth": lambda: torch.save(state, path), "w.safetensors": lambda: save_file(state, path)}
        writers.get(name, lambda: np.savez(path, **google_archive(state)))()
        content = path.read_bytes()[: path.stat().st_size * 2 // 3]
    path.write_bytes(content)
    assert "damaged" in message_of(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm.bias": None}, "norm.bias"),
        ({"blocks.1.attn.qkv.weight": torch.zeros(3, 3)}, "blocks.1.attn.qkv.weight"),
        ({"blocks.2.norm1.weight": torch.zeros(16)}, "blocks.2.norm1.weight"),
        ({"patch_embed.proj.weight": torch.zeros(16, 3, 8, 8)}, "patches are of 8 px, the model's of 16 px"),
        ({"pos_embed": torch.zeros(1, 26, 16)}, "has 26 positions and the model 10"),
        ({"cls_token": torch.zeros(())}, "cls_token"),
    ],
)
def test_state_dicts_that_do_not_fit(tmp_path, change, words):
    state = state_of() | change
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "w.pth")
    assert words in message_of(tmp_path / "w.pth")


def test_files_without_a_state_dict(tmp_path):
    for number, content in enumerate(([1, 2], {"epoch": 3}, {"fc.weight": torch.zeros(2)})):
        torch.save(content, tmp_path / f"{number}.pth")
        message_of(tmp_path / f"{number}.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cls": None}, "cls"),
        ({"Transformer/encoder_norm/bias": np.zeros(3, np.float32)}, "does not fit"),
        ({"Transformer/encoderblock_2/LayerNorm_0/scale": np.zeros(16, np.float32)}, "3 blocks, the model 2"),
        ({"embedding/kernel": np.zeros((8, 8, 3, 16), np.float32)}, "8 px a patch, the model 16"),
        ({"Transformer/posembed_input/pos_embedding": np.zeros((1, 5, 16), np.float32)}, "5 positions"),
    ],
)
def test_google_archives_that_do_not_fit(tmp_path, change, words):
    archive = google_archive(state_of()) | change
    np.savez(tmp_path / "w.npz", **{key: value for key, value in archive.items() if value is not None})
    assert words in message_of(tmp_path / "w.npz")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_the_hubs_cache_are_found(file, cache):
    folder = cache / f"models--timm--{NAME}.augreg_in21k_ft_in1k"
    for name in ("refs", "snapshots/abc"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    state, path = state_of(), folder / "snapshots/abc" / file
    save_file(state, path) if file.endswith("safetensors") else torch.save(state, path)
    backbone = load_backbone(NAME)
    assert (backbone.source, backbone.tag) == (str(path), f"{NAME}.augreg_in21k_ft_in1k")
    assert torch.equal(backbone.vit.vit.pos_embed, state["pos_embed"])


def test_a_download_goes_through_timm(cache, monkeypatch, tmp_path):
    """As timm's client for the hub does it, the file is in the cache afterwards."""
    name = "vit_base_patch16_224.dino"
    state = {key: value for key, value in state_of(name).items() if "head" not in key}
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **__: str(tmp_path / "model.safetensors"))
    found = iter([None, None, str(tmp_path / "model.safetensors")])
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *_: next(found))
    backbone = load_backbone(name)
    assert (backbone.tag, backbone.source) == (name, str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_bas_patch16_224", "did you mean vit_base_patch16_224"),
        ("mini_vit_smal", "did you mean mini_vit_small"),
        ("resnet50", "no vision transformer of timm"),
        ("vit_base_patch16_224.augreg_in22k", "did you mean vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_siglip_224", "cannot be used: it has no class token"),
        ("hf-hub:timm/vit_base_patch16_224.dino", "no vision transformer of timm"),
        ("vit_small_patch16_18x2_224", "cannot be used: it is built of ParallelThingsBlock"),
        ("vit_large_patch14_224", "no weights for vit_large_patch14_224"),
        (NAME, "https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k/resolve/main/model.safetensors"),
    ],
)
def test_names_that_cannot_be_loaded(name, words, cache):
    """HF_HUB_OFFLINE is set in all tests."""
    with pytest.raises(BackboneError) as error:
        load_backbone(name)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_sizes_by_name_are_those_of_timm(monkeypatch):
    monkeypatch.undo()
    for name in ("vit_tiny_patch16_224", "vit_small_patch32_224", "vit_base_patch8_224", "vit_large_patch16_384"):
        with torch.device("meta"):
            vit = timm.create_model(name, num_classes=0)
        assert known_size(name) == size_of(backbones.PromptedViT(vit))
    assert known_size("vit_base_patch14_dinov2") is known_size("deit_base_patch16_224") is None


def test_the_papers_names_are_accepted_without_loading_timm():
    names = (*PAPER_NAMES, *OWN_MODELS)
    code = f"import sys; from models.sizes import name_problem as p; assert not any(map(p, {names}))"
    assert runs.python(f"{code}; sys.exit('timm' in sys.modules)").returncode == 0
    assert name_problem("deit_base_patch16_224.fb_in1k") is None
