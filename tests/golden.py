"""Compare the project with numbers recorded from the authors' implementation.

    python -m tests.golden CASE_DIR... [--outputs DIR] [--device cuda]

drives the project's own learner, steps, optimizers and schedules over a recorded case. Without ``--outputs`` it
compares with the case's ``expected.npz``, prints the worst error of each kind and exits 1 beyond the limits;
with it, it needs ``case.json`` and ``inputs.npz`` only and writes ``DIR/<case>.npz`` with the keys of
``expected.npz``. The error of a value is ``|value - expected| / (0.1 + |expected|)``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

# Adam turns the sign of a vanishing gradient into a full step, so where a gradient is rounding noise (the
# orthogonality penalty of orthonormal components, ReviewKD's biases) parameters depend on the order of sums in
# a matrix product, which MKL chooses by CPU model. This fixes one order on all CPUs (it must be set before
# torch is loaded), as the plain attention kernel in GoldenCase.run does for attention.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel

from dataloaders.tasks import ClassRange
from learners.build import build_learner
from learners.learner import TeacherStudentLearner
from models.vit import PromptedViT
from utils.config import Config, DistillConfig, OptimConfig
from utils.parallel import Parallel

LIMITS = {"loss": 1e-4, "logits": 1e-4, "lr": 1e-4, "eval": 1e-4, "parameters": 1e-3}
# Gradients of biases ahead of a LayerNorm are rounding noise that Adam amplifies: these parameters are judged
# by the losses and the evaluation logits alone.
UNJUDGED = "ReviewKD_layers."


class GoldenCase:
    """Inputs of one recorded case and the learner built for it.

    Args:
        folder: holds ``case.json`` and ``inputs.npz``.
        device: where its steps run.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        folder, self.device = folder.resolve(), device
        self.name = folder.name
        self.settings = json.loads((folder / "case.json").read_text())
        shared = folder.parent / "common.npz"  # tests/golden_cases keeps what its cases share only once
        self.inputs = {}
        for path in [*[shared] * shared.exists(), folder / "inputs.npz"]:
            with np.load(path) as archive:
                self.inputs |= {key: torch.from_numpy(archive[key]) for key in archive.files}
        self.learner = self._build()

    def _backbone(self, role: str) -> PromptedViT:
        vit = VisionTransformer(num_classes=0, **self.settings[role])
        vit.load_state_dict(self._under(f"backbone/{role}/"))
        return PromptedViT(vit)

    def _build(self) -> TeacherStudentLearner:
        s = self.settings
        config = Config(
            learner_name=s["learner_name"],
            prompt_param=tuple(s["prompt_param"]),
            distill=DistillConfig(s["KD_method"], tuple(map(int, s["kd_prompt_param"])), s["kd_alpha"], s["Soft_T"]),
            optim=OptimConfig(
                tuple(s["schedule"]), s["schedule_type"], s["optimizer"], s["lr"], s["momentum"], s["weight_decay"]
            ),
            aux_loss_scale=s.get("aux_loss_scale", 1.0),
            ema_coeff=s.get("ema_coeff", 0.5),
        )
        vits = {role: self._backbone(role).to(self.device) for role in ("teacher", "student")}
        num_classes = s["num_tasks"] * s["classes_per_task"]
        return build_learner(config, vits, num_classes, s["num_tasks"], Parallel(self.device))

    def _under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key[len(prefix) :]: value for key, value in self.inputs.items() if key.startswith(prefix)}

    def run(self) -> dict[str, np.ndarray]:
        """Learn all tasks and return every recorded quantity under its key in ``expected.npz``."""
        outputs: dict[str, np.ndarray] = {}
        with sdpa_kernel(SDPBackend.MATH):
            for task in range(self.settings["num_tasks"]):
                outputs |= self._run_task(task)
        return outputs

    def _run_task(self, task: int) -> dict[str, np.ndarray]:
        per_task = self.settings["classes_per_task"]
        classes = ClassRange(task * per_task, (task + 1) * per_task)
        self.learner.begin_task(task)
        outputs = {}
        for role in self.learner.roles:
            start = self._under(f"task{task}/start/{role}/")
            self.learner.load_state(role, self.learner.state(role) | start)
        for role in self.learner.roles:
            for key, value in self._train(task, role, classes):
                outputs[f"task{task}/{role}/{key}"] = _numpy(value)
        self.learner.end_task(task)
        with torch.no_grad():
            logits = self.learner.eval_step().answer(self.inputs["eval/images"].to(self.device), classes.stop)[1]
        for role in self.learner.roles:
            outputs[f"task{task}/eval/{role}_logits"] = _numpy(logits[role])
            for name, value in self.learner.state(role).items():
                outputs[f"task{task}/end/{role}/{name}"] = _numpy(value).copy()
        return outputs

    def _train(self, task: int, role: str, classes: ClassRange) -> Iterator[tuple[str, object]]:
        """Train one model on the recorded batches and yield the recorded quantities of each step."""
        training = self.learner.begin_training(role, classes)
        images, labels = (self.inputs[f"task{task}/{name}"].to(self.device) for name in ("images", "labels"))
        seen: dict[str, torch.Tensor] = {}
        hook = self.learner.teacher.register_forward_hook(
            lambda _module, _args, output: seen.update(logits=output.logits.detach())
        )
        for index in range(len(images)):
            if index % self.settings["steps_per_epoch"] == 0:
                training.begin_epoch(index // self.settings["steps_per_epoch"])
            result = training.train_step(images[index], labels[index])
            logits = seen["logits"][:, classes.start : classes.stop]
            yield f"step{index}/loss", result.loss
            if role == "teacher":
                yield f"step{index}/logits", logits
                yield f"step{index}/lr", np.float64(training.lr)
            else:
                yield f"step{index}/teacher_logits", logits
                yield f"step{index}/distill_loss", result.terms.get("distill", torch.zeros(()))
                yield f"step{index}/feature_loss", result.terms.get("feature", torch.zeros(()))
        hook.remove()


def _numpy(value: object) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    """Largest ``|value - expected| / (0.1 + |expected|)`` of two arrays; infinite where shapes differ."""
    if value.shape != expected.shape:
        return float("inf")
    error = np.abs(value - expected) / (0.1 + np.abs(expected))
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0.0))


def kind(key: str) -> str:
    """Which limit a key of ``expected.npz`` falls under."""
    if "/end/" in key:
        return "parameters"
    if "/eval/" in key:
        return "eval"
    last = key.rsplit("/", 1)[1]
    return last if last == "lr" else "logits" if last.endswith("logits") else "loss"


def compare(outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Worst error of each kind; a missing key counts as an infinite error."""
    worst: dict[str, float] = defaultdict(float)
    for key, value in expected.items():
        if UNJUDGED not in key:
            error = relative_error(outputs[key], value) if key in outputs else float("inf")
            worst[kind(key)] = max(worst[kind(key)], error)
    return dict(worst)


def check_case(folder: Path, device: str = "cpu") -> dict[str, float]:
    """Run a case and compare it with its ``expected.npz``."""
    with np.load(folder / "expected.npz") as archive:
        expected = {key: archive[key] for key in archive.files}
    return compare(GoldenCase(folder, torch.device(device)).run(), expected)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE_DIR")
    parser.add_argument("--outputs", type=Path, help="write DIR/<case>.npz instead of comparing")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    for folder in args.cases:
        if not (folder / "case.json").is_file():
            parser.error(f"{folder} holds no case.json; name folders of recorded cases")
    failed = False
    for folder in args.cases:
        if args.outputs:
            args.outputs.mkdir(parents=True, exist_ok=True)
            np.savez(
                args.outputs / f"{folder.resolve().name}.npz", **GoldenCase(folder, torch.device(args.device)).run()
            )
            continue
        worst = check_case(folder, args.device)
        bad = [name for name, error in worst.items() if error > LIMITS[name]]
        failed |= bool(bad)
        errors = "  ".join(f"{name} {error:.1e}" for name, error in sorted(worst.items()))
        print(f"{folder.name}: {errors}  {'BEYOND THE LIMIT: ' + ', '.join(bad) if bad else 'ok'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
