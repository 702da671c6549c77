"""Which weights a name means, where they lie, and what is said when they are nowhere."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time

import pytest
import timm
from huggingface_hub import constants

from models import pretrained, sizes
from models.pretrained import cached_file, full_name, hub_repository, missing_weights
from models.sizes import OWN_MODELS

BARE = "vit_base_patch16_224"
FULL = "vit_base_patch16_224.augreg_in21k_ft_in1k"
FILES = {path.stem for path in sizes.timm_model_files()}
ARCHITECTURES = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.split(".")[-1] in FILES]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache, name: str, file: str = "model.safetensors"):
    """Lay a file into the cache as the hub's client does."""
    folder = cache / f"models--{hub_repository(name).replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    path = folder / "snapshots" / "abc" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return path


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_the_papers_names(size):
    assert full_name(f"vit_{size}_patch16_224") == f"vit_{size}_patch16_224.augreg_in21k_ft_in1k"


def test_other_names_and_tags_are_timms():
    assert len(ARCHITECTURES) > 150
    for name in ARCHITECTURES:
        config = timm.get_pretrained_cfg(name)
        if name in pretrained.PAPER_NAMES or not config.hf_hub_id:
            continue
        assert full_name(name) == f"{name}.{config.tag}"
        assert hub_repository(name) == config.hf_hub_id
    for name in timm.list_pretrained("*vit*"):
        if name.partition(".")[0] in ARCHITECTURES:
            assert full_name(name) == name
            assert hub_repository(name) == timm.get_pretrained_cfg(name).hf_hub_id


def test_renamed_models():
    assert full_name("vit_base_patch16_224_dino") == "vit_base_patch16_224.dino"
    assert full_name("vit_base_patch16_224_in21k") == "vit_base_patch16_224.augreg_in21k"


def test_quickgelu_weights_are_those_of_the_plain_architecture():
    assert hub_repository("vit_base_patch16_clip_quickgelu_224.openai") == "timm/vit_base_patch16_clip_224.openai"


def test_offline_says_what_to_get_from_where(cache):
    """HF_HUB_OFFLINE is set in all tests."""
    problem = missing_weights(BARE)
    assert f"https://huggingface.co/timm/{FULL}/resolve/main/model.safetensors" in problem
    assert "--t_weights/--s_weights FILE" in problem and str(cache) in problem
    assert "\n" not in problem


def test_nothing_is_missing_when_it_is_in_the_cache(cache):
    path = put(cache, BARE)
    assert missing_weights(BARE) is None
    assert cached_file(BARE) == path
    assert missing_weights("vit_small_patch16_224") is not None


def test_older_repositories_hold_another_file(cache):
    path = put(cache, BARE, "pytorch_model.bin")
    assert cached_file(BARE) == path


def test_nothing_is_missing_when_a_file_is_given(cache, tmp_path):
    assert "there is no file" in missing_weights(BARE, tmp_path / "none.pth")
    (tmp_path / "some.pth").write_bytes(b"x")
    assert missing_weights(BARE, tmp_path / "some.pth") is None


@pytest.mark.parametrize("name", OWN_MODELS)
def test_the_projects_own_weights_are_shipped(cache, name, monkeypatch, tmp_path):
    assert missing_weights(name) is None
    assert full_name(name) == name
    monkeypatch.setattr(pretrained, "shipped_file", lambda name: tmp_path / "gone.safetensors")
    assert "restore it" in missing_weights(name)


def test_models_without_weights_and_addresses(cache):
    assert "no weights for vit_small_patch16_18x2_224" in missing_weights("vit_small_patch16_18x2_224")
    assert "is an address" in missing_weights("hf-hub:timm/vit_base_patch16_224.dino")


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers everything with an error page, after ``server.delay`` seconds."""

    def do_HEAD(self):
        time.sleep(self.server.delay)
        self.send_error(403)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.delay = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    pretrained._answers.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    pretrained._answers.cache_clear()


def test_a_hub_that_answers_can_deliver(cache, hub):
    assert missing_weights(BARE) is None


def test_a_hub_that_does_not_answer_costs_little_time(cache, hub, monkeypatch):
    hub.delay = 0.5
    start = time.monotonic()
    assert not pretrained.hub_reachable(timeout_s=0.1)
    assert time.monotonic() - start < 0.4
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in missing_weights(BARE)


def test_offline_mode_asks_nobody(cache, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot be reached" in missing_weights(BARE)


def test_neither_torch_nor_timm_is_imported():
    code = (
        "import sys; from models.pretrained import missing_weights;"
        f"missing_weights('{BARE}'); missing_weights('mini_vit_base');"
        "sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
