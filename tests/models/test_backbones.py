"""Backbones by name and their weights from files, good and bad."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import zipfile

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from models import backbones
from models.backbones import BackboneError, check_pair, load_backbone, size_of
from models.sizes import OWN_MODELS, known_size

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
    return message.replace(str(path), "FILE")


def test_random_weights_are_seeded_by_the_caller():
    first, second = (torch.manual_seed(5) and load_backbone(NAME, pretrained=False) for _ in range(2))
    assert first.source == "random" and first.sha256 == ""
    assert first.tag == f"{NAME}.augreg_in21k_ft_in1k"
    assert torch.equal(first.vit.vit.pos_embed, second.vit.vit.pos_embed)


@pytest.mark.parametrize("name", OWN_MODELS)
def test_the_projects_own_models(name):
    backbone = load_backbone(name)
    assert backbone.tag == name
    with open(backbone.source, "rb") as file:
        assert backbone.sha256 == hashlib.sha256(file.read()).hexdigest()
    assert size_of(backbone.vit) == known_size(name)
    assert all(value.dtype == torch.float32 for value in backbone.vit.state_dict().values())
    assert not any(value.is_meta for value in backbone.vit.state_dict().values())


WRAPPED = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model, with the arguments of the script": lambda state: {"model": state, "args": argparse.Namespace(lr=1)},
    "twice": lambda state: {"model": {"state_dict": state}},
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "part of a model": lambda state: {f"feat.{key}": value for key, value in state.items()}
    | {"last.weight": torch.zeros(2)},
    "float16": lambda state: {key: value.half() for key, value in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_pth(tmp_path, wrap):
    path = tmp_path / "weights.pth"
    state = state_of()
    torch.save(wrap(state), path)
    if wrap is WRAPPED["float16"]:
        state = wrap(state)
    backbone = assert_loaded(path, state)
    assert backbone.tag == NAME  # no tag: these are not timm's weights
    assert backbone.source == str(path)
    assert backbone.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_pth_of_old_torch(tmp_path):
    state = state_of()
    torch.save(state, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    assert_loaded(tmp_path / "w.bin", state)


def test_safetensors_whatever_its_name(tmp_path):
    state = state_of()
    save_file(state, tmp_path / "weights")
    assert_loaded(tmp_path / "weights", state)


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    save_file(state_of(), tmp_path / "w")
    vit = load_backbone(NAME, weights=tmp_path / "w").vit
    before = vit.vit.pos_embed.clone()
    with open(tmp_path / "w", "r+b") as file:
        file.seek(2000)
        file.write(b"\0" * 50_000)
    assert torch.equal(vit.vit.pos_embed, before)


def google_archive(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A state dict in Google's naming and layout."""
    heads = {"num": 2, "dim": 8}
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
            plain[f"{attention}{name}/kernel"] = weight.T.reshape(16, heads["num"], heads["dim"])
            plain[f"{attention}{name}/bias"] = bias.reshape(heads["num"], heads["dim"])
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


def test_dinov2s_own_names(tmp_path):
    name = "vit_small_patch14_reg4_dinov2"
    state = state_of(name)
    official = {key: value for key, value in state.items() if key not in ("reg_token", "pos_embed")}
    official |= {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 16)}
    position = torch.zeros(1, 1, 16)
    official["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    torch.save(official, tmp_path / "w.pth")
    assert_loaded(tmp_path / "w.pth", state, name)


def test_clips_own_names(tmp_path):
    name = "vit_base_patch16_clip_224"
    state = state_of(name)
    swaps = [("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("blocks.", "transformer.resblocks."),
             ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
             ("mlp.fc2", "mlp.c_proj"), ("norm1", "ln_1"), ("norm2", "ln_2")]  # fmt: skip
    official = {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.zeros(3)}
    for key, value in state.items():
        if key.startswith("norm."):
            key = f"ln_post.{key.removeprefix('norm.')}"
        for ours, theirs in swaps:
            key = key.replace(ours, theirs)
        official[f"visual.{key}"] = value
    official["visual.class_embedding"] = official.pop("visual.cls_token")[0, 0]
    official["visual.positional_embedding"] = official.pop("visual.pos_embed")[0]
    official = {key: value for key, value in official.items() if "head" not in key}
    torch.save(official, tmp_path / "w.pt")
    assert_loaded(tmp_path / "w.pt", state, name)


class Code:
    """Unpickling it runs a command."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def test_code_is_never_run(tmp_path):
    trace = tmp_path / "trace"
    for number, zipped in enumerate((True, False)):
        path = tmp_path / f"{number}.pth"
        torch.save({"model": state_of(), "x": Code(trace)}, path, _use_new_zipfile_serialization=zipped)
        assert "could run code" in message_of(path)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"x": Code(trace)}))
    assert "could run code" in message_of(tmp_path / "raw.pth")
    objects = np.array([Code(trace)], dtype=object)
    np.savez(tmp_path / "w.npz", **{"embedding/kernel": objects})
    assert "Python objects" in message_of(tmp_path / "w.npz")
    assert not trace.exists()


def test_files_that_are_no_weights(tmp_path):
    path = tmp_path / "w.pth"
    for content, words in (
        (b"", "is empty"),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"hello", "no file with weights"),
        (b"\x80\x02hello", "damaged"),
        (b"PK\x03\x04 but nothing else", "cut short"),
        ((10**6).to_bytes(8, "little") + b"{", "damaged"),
    ):
        path.write_bytes(content)
        assert words in message_of(path)


def test_cut_and_damaged_files(tmp_path):
    path = tmp_path / "w"
    savers = [
        lambda: torch.save(state_of(), path),
        lambda: torch.save(state_of(), path, _use_new_zipfile_serialization=False),
        lambda: save_file(state_of(), path),
        lambda: np.savez(open(path, "wb"), **google_archive(state_of())),
    ]
    for save in savers:
        save()
        cut(path)
        assert "cut short" in message_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "damaged" in message_of(path)


def test_contents_that_are_no_state_dict(tmp_path):
    path = tmp_path / "w.pth"
    for content, words in (
        ([1, 2], "holds a list instead of a state dict"),
        ({"epoch": 3}, "holds no tensors"),
        ({"fc.weight": torch.zeros(2)}, "holds no weights of"),
        ({f"{part}.{key}": value for part in ("student", "teacher") for key, value in state_of().items()},
         "several encoders (student., teacher.)"),
    ):  # fmt: skip
        torch.save(content, path)
        assert words in message_of(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm.bias": None}, "it lacks norm.bias"),
        ({"norm.bias": None, "norm.weight": None}, "it lacks 2 tensors, such as norm.weight"),
        ({"blocks.1.attn.qkv.weight": torch.zeros(3, 3)}, "blocks.1.attn.qkv.weight is 3x3, not 48x16"),
        ({"blocks.2.norm1.weight": torch.zeros(16)}, "the model has no blocks.2.norm1.weight"),
        ({"patch_embed.proj.weight": torch.zeros(16, 3, 8, 8)}, "patches are of 8 px, the model's of 16 px"),
        ({"pos_embed": torch.zeros(1, 26, 16)}, "has 26 positions and the model 10"),
        ({"pos_embed": torch.zeros(1, 10, 8)}, "pos_embed is 1x10x8, not 1x10x16"),
        ({"cls_token": torch.zeros(())}, "cls_token is a number"),
        ({"patch_embed.proj.weight": torch.zeros(5)}, "does not fit"),
    ],
)
def test_state_dicts_that_do_not_fit(tmp_path, change, words):
    state = state_of() | change
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "w.pth")
    assert words in message_of(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cls": None}, "cls"),
        ({"Transformer/encoder_norm/bias": np.zeros(3, np.float32)}, "does not fit"),
        ({"Transformer/encoderblock_2/LayerNorm_0/scale": np.zeros(16, np.float32)}, "3 blocks, the model 2"),
        ({"embedding/kernel": np.zeros((8, 8, 3, 16), np.float32)}, "8 px a patch, the model 16"),
        ({"Transformer/posembed_input/pos_embedding": np.zeros((1, 5, 16), np.float32)}, "5 positions"),
        ({"embedding/kernel": None}, "does not fit"),
    ],
)
def test_google_archives_that_do_not_fit(tmp_path, change, words):
    archive = google_archive(state_of()) | change
    np.savez(tmp_path / "w.npz", **{key: value for key, value in archive.items() if value is not None})
    assert words in message_of(tmp_path / "w.npz")


def test_google_archives_lack_what_newer_models_have(tmp_path):
    name = "vit_base_patch14_dinov2"
    archive = google_archive(state_of()) | {"embedding/kernel": np.zeros((14, 14, 3, 16), np.float32)}
    np.savez(tmp_path / "w.npz", **archive)
    assert "it lacks 4 tensors, such as blocks.0.ls1.gamma" in message_of(tmp_path / "w.npz", name)


def test_download_goes_through_the_hubs_client(tmp_path, monkeypatch):
    state = state_of()
    save_file(state, tmp_path / "model.safetensors")
    asked = []

    def deliver(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(backbones, "missing_weights", lambda name, weights: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", deliver)
    backbone = load_backbone("vit_base_patch16_224.dino")
    assert asked == [("timm/vit_base_patch16_224.dino", "model.safetensors")]
    assert backbone.tag == "vit_base_patch16_224.dino"
    assert torch.equal(backbone.vit.vit.pos_embed, state["pos_embed"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EntryNotFoundError("404"), "holds none of model.safetensors, pytorch_model.bin"),
        (LocalEntryNotFoundError("no connection\nat all"), "could not be fetched (no connection)"),
        (OSError("disk full"), "could not be fetched (disk full)"),
    ],
)
def test_a_download_that_fails(monkeypatch, error, words):
    def fail(repository, file):
        raise error

    monkeypatch.setattr(backbones, "missing_weights", lambda name, weights: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(BackboneError) as raised:
        load_backbone(NAME)
    assert words in str(raised.value) and "resolve/main/model.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_bas_patch16_224", "did you mean vit_base_patch16_224"),
        ("vit_base_patch16_siglip_224", "cannot be used: it has no class token"),
        ("hf-hub:timm/vit_base_patch16_224.dino", "is an address"),
        (NAME, "not on this machine and the hub cannot be reached"),
    ],
)
def test_names_that_lead_nowhere(name, words, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match=words):
        load_backbone(name)


def test_a_pair_sees_images_of_one_size():
    teacher, other = (load_backbone(name, pretrained=False).vit for name in (NAME, "vit_small_patch32_224"))
    check_pair(teacher, teacher)
    with pytest.raises(BackboneError, match="images of 48 px and the student of 96 px"):
        check_pair(teacher, other)
