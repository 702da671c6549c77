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
    monkeypatch.setattr(pretrain_mini_vit, "BATCH", 16)

    def die(old, new):
        old.rename(new)
        raise KeyboardInterrupt

    weights = []
    for out in ("whole", "killed"):
        flags = f"--icons {tmp_path / 'base.npz'} --model mini_vit_small --epochs 2 --device cpu --out {tmp_path / out}"
        monkeypatch.setattr(sys, "argv", ["pretrain", *flags.split()])
        if out == "killed":  # after the first checkpoint
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(pretrain_mini_vit.os, "replace", die)
                pretrain_mini_vit.main()
        pretrain_mini_vit.main()
        weights.append(load_file(tmp_path / out / "mini_vit_small.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    mini_vit_small().load_state_dict(weights[0])
