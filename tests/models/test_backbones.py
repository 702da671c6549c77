"""Backbones by name and their weights from files, good and bad."""

import argparse
import hashlib
import os
import pickle

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from models import backbones
from models.backbones import full_name, load_backbone
from utils.checkpoint import sha256_of
from utils.config import ConfigError

TINY = {"embed_dim": 16, "num_heads": 2, "depth": 2}
NAME = "vit_tiny_patch16_224"
FULL = f"{NAME}.augreg_in21k_ft_in1k"


@pytest.fixture(autouse=True)
def small_models(monkeypatch, tmp_path):
    """Models of timm with two narrow blocks and 3 x 3 patches, and an empty cache of the hub."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **TINY, img_size=48, **options))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.manual_seed(0)


def state_of(name: str = NAME) -> dict[str, torch.Tensor]:
    """Random weights of a (small) model, with a classifier."""
    state = timm.create_model(name, num_classes=7).state_dict()
    return {key: torch.randn_like(value) for key, value in state.items()}


def google_archive(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A state dict in Google's naming and layout."""
    plain = {"embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0), "cls": state["cls_token"]}
    plain["embedding/bias"], plain["head/bias"] = state["patch_embed.proj.bias"], state["head.bias"]
    plain["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]

    def norm(theirs: str, ours: str) -> None:
        plain[f"{theirs}/scale"], plain[f"{theirs}/bias"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    norm("Transformer/encoder_norm", "norm")
    for block in range(2):
        ours, theirs = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        for index, name in enumerate(("query", "key", "value")):
            rows = slice(16 * index, 16 * index + 16)
            plain[f"{attention}{name}/kernel"] = state[ours + "attn.qkv.weight"][rows].T.reshape(16, 2, 8)
            plain[f"{attention}{name}/bias"] = state[ours + "attn.qkv.bias"][rows].reshape(2, 8)
        plain[attention + "out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(2, 8, 16)
        plain[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        norm(theirs + "LayerNorm_0", ours + "norm1")
        norm(theirs + "LayerNorm_2", ours + "norm2")
        for layer in (1, 2):
            plain[f"{theirs}MlpBlock_3/Dense_{layer - 1}/kernel"] = state[f"{ours}mlp.fc{layer}.weight"].T
            plain[f"{theirs}MlpBlock_3/Dense_{layer - 1}/bias"] = state[f"{ours}mlp.fc{layer}.bias"]
    return {key: value.numpy() for key, value in plain.items()}


def prefixed(prefix: str, items: dict) -> dict:
    return {prefix + key: value for key, value in items.items()}


FORMATS = {
    "pth": ("w.pth", torch.save),
    "pth before torch 1.6": ("w.bin", lambda s, path: torch.save(s, path, _use_new_zipfile_serialization=False)),
    "pth, state_dict": ("w.pth", lambda s, path: torch.save({"state_dict": s, "epoch": 3}, path)),
    "pth, model": ("w.pth", lambda s, path: torch.save({"model": s, "args": argparse.Namespace(lr=1)}, path)),
    "pth, module.": ("w.pth", lambda s, path: torch.save({"model": prefixed("module.", s)}, path)),
    "safetensors": ("w.safetensors", save_file),
    "npz": ("w.npz", lambda s, path: np.savez(path, **google_archive(s))),
    "npz, opt/target/": ("w.npz", lambda s, path: np.savez(path, **prefixed("opt/target/", google_archive(s)))),
}


@pytest.mark.parametrize(("file", "save"), FORMATS.values(), ids=FORMATS)
def test_weights_from_a_file(tmp_path, file, save):
    state, path = {key: value.half() for key, value in state_of().items()}, tmp_path / file
    save(state, path)
    backbone = load_backbone(NAME, weights=path)
    loaded = backbone.vit.vit.state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith("head.")}
    assert all(value.dtype == torch.float32 and torch.equal(value, state[key]) for key, value in loaded.items())
    # No tag, since the weights may be others than timm's.
    assert backbone[1:] == (NAME, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_base_patch16_clip_224"])
def test_rotary_positions_are_not_lost_with_weights_from_a_file(tmp_path, name):
    state = {key: value for key, value in state_of(name).items() if not key.startswith("head.")}
    torch.save(state, tmp_path / "w.pth")
    expected = timm.create_model(name, num_classes=0).eval()
    expected.load_state_dict(state)
    images = torch.rand(2, 3, 48, 48)
    assert torch.equal(load_backbone(name, weights=tmp_path / "w.pth").vit.vit(images), expected(images))


def test_images_are_normalised_as_for_the_weights(tmp_path):
    name, path = "vit_base_patch16_clip_224", tmp_path / "w.pth"
    torch.save(state_of(name), path)
    plain, own = (load_backbone(name, weights=path, normalize=each).vit for each in (False, True))
    mean, std = torch.tensor([[0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]])[..., None, None]
    images = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(own.embed(images), plain.embed((images - mean) / std), atol=1e-2, rtol=0)
    assert own.state_dict().keys() == plain.state_dict().keys()
    assert load_backbone("mini_vit_small", normalize=True).vit.mean_std is None


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def message_of(path) -> str:
    with pytest.raises(ConfigError) as error:
        load_backbone(NAME, weights=path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_code_is_never_run(tmp_path):
    trace = tmp_path / "trace"
    for zipped in (True, False):
        content = {"model": state_of(), "x": Code(trace)}
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        assert "could run code" in message_of(tmp_path / "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Code(trace), protocol=2))
    assert "could run code" in message_of(tmp_path / "raw.pth")
    np.savez(tmp_path / "w.npz", **{"embedding/kernel": np.array([Code(trace)], dtype=object)})
    assert "could run code" in message_of(tmp_path / "w.npz")
    assert not trace.exists()


@pytest.mark.parametrize(("file", "save"), FORMATS.values(), ids=FORMATS)
def test_damaged_files(tmp_path, file, save):
    path = tmp_path / file
    save(state_of(), path)
    content = path.read_bytes()
    for damaged in (b"", b"<html>404</html>", content[:300], content[: len(content) * 2 // 3]):
        path.write_bytes(damaged)
        assert "damaged" in message_of(path)
    path.unlink()
    assert "cannot be read" in message_of(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm.bias": None}, "it lacks norm.bias;"),
        ({"blocks.1.attn.qkv.weight": torch.zeros(3, 3)}, "blocks.1.attn.qkv.weight has shape (3, 3), not (48, 16)"),
        ({"norm.bias": torch.zeros(16, dtype=torch.bool)}, "norm.bias holds torch.bool, not real numbers"),
        ({"blocks.2.norm1.weight": torch.zeros(16)}, "the model has no blocks.2.norm1.weight"),
        ({"pos_embed": torch.zeros(1, 26, 16)}, "(1, 26, 16), not (1, 10, 16)"),
    ],
)
def test_state_dicts_of_other_models(tmp_path, change, words):
    state = state_of() | change
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "w.pth")
    assert words in message_of(tmp_path / "w.pth")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    assert "holds no tensors" in message_of(tmp_path / "w.pth")


@pytest.mark.parametrize("shape", [None, (1, 26, 16)])
def test_google_archives_of_other_models(tmp_path, shape):
    archive = google_archive(state_of())
    archive["Transformer/posembed_input/pos_embedding"] = np.zeros(shape or 0, np.float32)
    np.savez(tmp_path / "w.npz", **archive)
    assert "does not fit" in message_of(tmp_path / "w.npz")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_the_cache_of_the_hub(tmp_path, file):
    state, folder = state_of(), tmp_path / "hub" / f"models--timm--{FULL}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    path = folder / "snapshots" / "abc" / file
    path.parent.mkdir(parents=True)
    (save_file if file.endswith(".safetensors") else torch.save)(state, path)
    backbone = load_backbone(NAME)
    assert backbone[1:] == (FULL, hashlib.sha256(path.read_bytes()).hexdigest())
    assert torch.equal(backbone.vit.vit.pos_embed, state["pos_embed"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="damaged"):
        load_backbone(NAME)


def test_weights_are_downloaded_by_the_client_of_the_hub(tmp_path, monkeypatch):
    state = {key: value for key, value in state_of().items() if not key.startswith("head.")}
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr(backbones, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(backbones, "hf_hub_download", lambda repository, file: str(tmp_path / file))
    backbone = load_backbone("vit_base_patch16_224.dino")
    assert (backbone.tag, backbone.sha256) == ("vit_base_patch16_224.dino", sha256_of(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("offline", [True, False])
def test_no_weights_and_no_network(monkeypatch, offline):
    """Sockets to other machines fail in all tests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ConfigError) as error:
        load_backbone(NAME)
    message = str(error.value)
    assert f"get https://huggingface.co/timm/{FULL}/resolve/main/model.safetensors" in message
    assert "--t_weights/--s_weights FILE" in message and "\n" not in message


def test_names():
    assert full_name("vit_base_patch16_224") == "vit_base_patch16_224.augreg_in21k_ft_in1k"  # not timm's default
    for name in ("mini_vit_base", "vit_base_patch16_224.mae", "deit3_small_patch16_224.fb_in1k"):
        assert full_name(name) == name
    with pytest.raises(ConfigError, match="did you mean vit_base_patch16_224?"):
        load_backbone("vit_bas_patch16_224")
    with pytest.raises(ConfigError, match="cannot be used: it has no class token"):
        load_backbone("vit_base_patch16_siglip_224")
