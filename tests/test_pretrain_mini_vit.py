"""The pre-training script of mini_vit_*: a killed run resumes to the same bytes, and the weights load."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments import pretrain_mini_vit
from models.mini_vit import mini_vit_small


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "base.npz", images=images, labels=np.arange(60) // 6, held=np.arange(10) < 2)
    weights, extract = [], pretrain_mini_vit.extract
    flags = f"--icons {tmp_path / 'base.npz'} --model mini_vit_small --batch 16 --epochs 2 --save_every 1 --device cpu"
    for out in ("whole", "killed"):
        monkeypatch.setattr(sys, "argv", f"pretrain {flags} --out {tmp_path / out}".split())
        if out == "killed":  # after the first checkpoint
            monkeypatch.setattr(pretrain_mini_vit, "extract", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pretrain_mini_vit.main()
            monkeypatch.setattr(pretrain_mini_vit, "extract", extract)
        pretrain_mini_vit.main()
        weights.append(load_file(tmp_path / out / "mini_vit_small.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    mini_vit_small().load_state_dict(weights[0])
