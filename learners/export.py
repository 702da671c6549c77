"""The trained student as a file that others can use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learners.build import build_learner
from learners.distillers.base import Distiller, DistillSettings
from learners.optim import OptimSettings
from learners.steps import make_query
from models.prompted_model import PromptedModel
from models.vit import PromptedViT
from utils.checkpoint import write_atomic
from utils.config import Config, ConfigError
from utils.parallel import SingleDevice

FORMATS = (".safetensors", ".pt2")


class StudentClassifier(nn.Module):
    """Images in, logits over all classes seen out: the student with its prompts, as evaluated.

    Args:
        student: trained model.
        distiller: gives the student its tokens and mixes its heads.
        seen: number of classes learned so far.
    """

    def __init__(self, student: PromptedModel, distiller: Distiller, seen: int) -> None:
        super().__init__()
        self.student = student
        self.distiller = distiller
        self.seen = seen
        self.eval()
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, seen] of images [B, 3, H, W] in [0, 1]."""
        query, tokens = make_query(self.student.vit, images)
        output = self.student(tokens, query, self.distiller.student_inputs())
        return self.distiller.predict(output)[:, : self.seen].float()


def export(classifier: StudentClassifier, description: dict[str, Any], path: Path) -> None:
    """Write the student: tensors (``.safetensors``) or a ``torch.export`` program (``.pt2``), with a ``.json`` beside.

    The JSON is needed for either: it names the classes, in the order of the logits, and the input.

    Args:
        classifier: what to write.
        description: what :func:`describe` returned.
        path: file to write; its ending chooses the format.

    Raises:
        ConfigError: see :func:`refuse_foreign`.
    """
    refuse_foreign(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    classifier = classifier.to("cpu")
    if path.suffix == ".pt2":
        data = _exported_program(classifier, description["image_size"])
    else:
        from safetensors.torch import save

        data = save(_tensors(classifier), metadata={"description": json.dumps(description, sort_keys=True)})
    write_atomic(path, data)
    text = json.dumps(description, ensure_ascii=False, indent=1) + "\n"
    write_atomic(path.with_suffix(".json"), text.encode())


def refuse_foreign(path: Path) -> None:
    """Refuse a file to write that has another ending, or whose ``.json`` is there and belongs to something else.

    Raises:
        ConfigError: naming the file.
    """
    if path.suffix not in FORMATS:
        raise ConfigError([f"--export {path}: the ending must be {' or '.join(FORMATS)}"])
    beside = path.with_suffix(".json")
    if not beside.exists():
        return
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict) or not {"backbone", "classes_seen", "test_crop"} <= before.keys():
        raise ConfigError([
            f"--export {path}: {beside} would be replaced, which is not the description of an exported student; "
            "choose another name"
        ])  # fmt: skip


def describe(config: Config, facts: dict[str, Any], task: int) -> dict[str, Any]:
    """What is needed besides the tensors to rebuild the student as it is after ``task`` (from 0).

    Args:
        config: settings it was trained with.
        facts: content of the run's ``classes.json``.
        task: last task learned.
    """
    seen = facts["ranges"][task][1]
    return {
        "format": 1,
        "backbone": config.student_model,
        "learner_name": config.learner_name,
        "prompt_param": list(config.prompt_param),
        "KD_method": config.kd_method,
        "kd_prompt_param": list(config.kd_prompt_param),
        "kd_alpha": config.kd_alpha,
        "num_classes": facts["num_classes"],
        "num_tasks": facts["num_tasks"],
        "task": task,
        "classes_seen": seen,
        "class_names": facts["class_names"][:seen],
        "image_size": facts["image_size"],
        "input": "RGB images [B, 3, H, W] in [0, 1], without mean and standard deviation",
        "test_crop": facts["test_crop"],
    }


def build_student(description: dict[str, Any], vit: PromptedViT) -> StudentClassifier:
    """A student of the right sizes, not yet with its trained parts.

    Args:
        description: what :func:`describe` returned.
        vit: the student's backbone.
    """
    d = description
    learner = build_learner(
        learner_name=d["learner_name"],
        prompt_param=d["prompt_param"],
        kd_method=d["KD_method"],
        distill=DistillSettings(d["kd_alpha"], 1.0, *d["kd_prompt_param"]),
        teacher_vit=vit,  # not used in evaluation; any teacher would do
        student_vit=vit,
        num_classes=d["num_classes"],
        num_tasks=d["num_tasks"],
        optim=OptimSettings(),
        aux_loss_scale=1.0,
        seed=0,
        parallel=SingleDevice(torch.device("cpu")),
    )
    learner.resume_task(d["task"])
    return StudentClassifier(learner.student, learner.distiller, d["classes_seen"])


def load_trained_parts(classifier: StudentClassifier, state: dict[str, Tensor]) -> None:
    """Load a student's ``S_class.pth`` without what only training needs.

    Raises:
        RuntimeError: a name or shape does not fit.
    """
    own = classifier.student.trained_state().keys()
    classifier.student.load_trained_state({key: state[key] for key in own if key in state})
    if not classifier.distiller.needs_blocks:
        classifier.distiller.load_state_dict({key: value for key, value in state.items() if key not in own})


def load_exported(path: Path) -> StudentClassifier:
    """Rebuild the student from an exported ``.safetensors`` file alone.

    Raises:
        ConfigError: the file is no export of this project, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    from models.backbones import load_backbone

    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()["description"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        vit = load_backbone(description["backbone"], pretrained=False).vit
        classifier = build_student(description, vit)
        expected = _tensors(classifier).keys()
        if expected != tensors.keys():
            raise ValueError(f"it lacks {sorted(expected - tensors.keys())[:3]}")
        classifier.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError([f"{path} is not an exported student ({error})"]) from error
    return classifier


def _tensors(classifier: StudentClassifier) -> dict[str, Tensor]:
    """What evaluation needs, each tensor once; not what compares features with a teacher's."""
    named = dict(classifier.named_parameters()) | dict(classifier.named_buffers())
    saved = classifier.state_dict().keys() & named.keys()
    if classifier.distiller.needs_blocks:
        saved = {key for key in saved if not key.startswith("distiller.")}
    return {key: named[key].detach().contiguous() for key in sorted(saved)}


def _exported_program(classifier: StudentClassifier, image_size: int) -> bytes:
    import io

    images = torch.rand(2, 3, image_size, image_size)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(classifier, (images,), dynamic_shapes={"images": {0: batch}})
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()
