"""The trained student as a file that others can use."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from learners.build import build_learner
from learners.distillers.base import Distiller
from learners.results import check_same_data, load_model, tasks_done
from learners.steps import EvalStep
from models.backbones import load_backbone
from models.prompted_model import PromptedModel
from models.vit import PromptedViT
from utils.checkpoint import CLASSES, RunFolder, check_settings, write_atomic
from utils.config import Config, ConfigError, DistillConfig
from utils.parallel import Parallel


class StudentClassifier(EvalStep):
    """Images in, logits over the ``seen`` classes learned so far out: the student with its prompts, as evaluated."""

    def __init__(self, student: PromptedModel, distiller: Distiller, seen: int) -> None:
        super().__init__(student, distiller, teacher=None)
        self.seen = seen
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, seen] of images [B, 3, H, W] in [0, 1]."""
        return self.answer(images, self.seen)[1]["student"]


def trained_student(config: Config) -> tuple[StudentClassifier, dict[str, Any]]:
    """The student of the run in ``config.log_dir`` after its last learned task, and its metadata.

    Raises ConfigError for other settings or weights than it was trained with, RunFolderError for a damaged folder.
    """
    check_settings(config, resume=False)
    folder = RunFolder(config.log_dir)
    info, task = folder.read_json(CLASSES), tasks_done(folder) - 1
    seen = info["ranges"][task][1]
    metadata = {
        "format": 1,
        "backbone": config.student_model,
        "learner_name": config.learner_name,
        "prompt_param": list(config.prompt_param),
        "KD_method": config.distill.method,
        "kd_prompt_param": list(config.distill.prompt_param),
        "kd_alpha": config.distill.alpha,
        "kd_param": dict(config.distill.param),
        **{key: info[key] for key in ("num_classes", "num_tasks", "image_size", "test_crop")},
        "task": task,
        "classes_seen": seen,
        "class_names": info["class_names"][:seen],
        "input": "RGB images [B, 3, H, W] in [0, 1], not normalised by mean and standard deviation",
    }
    normalize = config.normalize == "model"
    backbone = load_backbone(config.student_model, weights=config.student_weights, normalize=normalize)
    used = backbone.vit.mean_std
    metadata["mean_std"] = None if used is None else used.flatten(1).tolist()  # the student does it itself
    check_same_data({"backbone_sha256": {"student": backbone.sha256}}, folder)
    classifier = build_student(metadata, backbone.vit)
    student, distiller = classifier.student, classifier.distiller

    def load(state: dict[str, Tensor]) -> None:
        own = student.trained_state().keys()
        student.load_trained_state({key: state[key] for key in own if key in state})
        if distiller.affects_answers:  # else it has only parts for training
            distiller.load_state_dict({key: value for key, value in state.items() if key not in own})

    load_model(folder, "student", task, load)
    return classifier, metadata


def build_student(metadata: dict[str, Any], vit: PromptedViT) -> StudentClassifier:
    """A student of the right sizes on its backbone, not yet with its trained parts."""
    prompt_param, kd_prompt_param = (tuple(metadata[key]) for key in ("prompt_param", "kd_prompt_param"))
    distill = DistillConfig(metadata["KD_method"], kd_prompt_param, metadata["kd_alpha"], param=metadata["kd_param"])
    config = Config(learner_name=metadata["learner_name"], prompt_param=prompt_param, distill=distill)
    # Evaluation does not use the teacher, so any backbone will do for it.
    vits, device = {"teacher": vit, "student": vit}, Parallel(torch.device("cpu"))
    learner = build_learner(config, vits, metadata["num_classes"], metadata["num_tasks"], device)
    learner.resume_task(metadata["task"])
    return StudentClassifier(learner.student, learner.distiller, metadata["classes_seen"])


def export(classifier: StudentClassifier, metadata: dict[str, Any], path: Path) -> None:
    """Write the student: tensors (``.safetensors``) or a ``torch.export`` program (``.pt2``), with a ``.json`` beside.

    The JSON is needed for either: it names the classes, in the order of the logits, and the input. Raises
    ConfigError if it would replace a file that is something else, RunFolderError if a file cannot be written.
    """
    beside = path.with_suffix(".json")
    if beside.exists() and not {"backbone", "classes_seen"} <= RunFolder(path.parent).read_json(beside.name).keys():
        reason = "which is not the description of an exported student; choose another name"
        raise ConfigError([f"--export {path}: {beside} would be replaced, {reason}"])
    if path.suffix == ".pt2":
        images = torch.rand(2, 3, metadata["image_size"], metadata["image_size"])
        shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(classifier, (images,), dynamic_shapes=shapes), buffer)
        data = buffer.getvalue()
    else:
        # The name of the entry is the format's, which other versions read.
        data = save(_tensors(classifier), metadata={"description": json.dumps(metadata, sort_keys=True)})
    write_atomic(path, data)
    write_atomic(beside, (json.dumps(metadata, ensure_ascii=False, indent=1) + "\n").encode(errors="backslashreplace"))


def load_exported(path: Path) -> StudentClassifier:
    """Rebuild the student from an exported ``.safetensors`` file alone; ConfigError if it lacks tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["description"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    vit = load_backbone(metadata["backbone"], pretrained=False).vit
    if metadata["mean_std"] is not None:
        vit.normalize(*metadata["mean_std"])
    classifier = build_student(metadata, vit)
    if missing := sorted(_tensors(classifier).keys() - tensors.keys()):
        raise ConfigError([f"{path} is not an exported student: it lacks {', '.join(missing[:3])}"])
    classifier.load_state_dict(tensors, strict=False)
    return classifier


def _tensors(classifier: StudentClassifier) -> dict[str, Tensor]:
    """The tensors that evaluation needs, each once; not those of a KD method for training alone."""
    named = dict(classifier.named_parameters()) | dict(classifier.named_buffers())
    saved = classifier.state_dict().keys() & named.keys()
    if not classifier.distiller.affects_answers:
        saved = {key for key in saved if not key.startswith("distiller.")}
    return {key: named[key].detach().contiguous() for key in sorted(saved)}
