"""Learners on tiny random backbones, for the tests of this folder."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dataloaders.tasks import ClassRange
from learners.build import build_learner
from learners.distillers import DISTILLERS
from learners.learner import TeacherStudentLearner
from models.prompts import PROMPTS
from models.vit import PromptedViT
from utils.config import Config, DistillConfig, OptimConfig
from utils.parallel import Parallel

TASKS = 3
PER_TASK = 2
CLASSES = TASKS * PER_TASK
BATCH = 4
# Where the paper's values (the default here) do not fit 3 tasks of a narrow ViT.
PROMPT_PARAM = {"CODAPrompt": (7, 4, 0.0)}
# For what does not depend on the pair: every pool with one KD method, and every KD method with one pool.
EACH = [(pool, "KD_Token") for pool in PROMPTS]
EACH += [("CODAPrompt", method) for method in DISTILLERS if method != "KD_Token"]
# Methods whose losses are means over the images of a batch.
MEANS = [method for method in DISTILLERS if DISTILLERS[method].load().mean_over_images]


def vit(*, dim: int = 16, depth: int = 2, seed: int = 0, **options) -> PromptedViT:
    """16 x 16 pixels, 5 tokens; weights large enough that everything has an effect."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=dim, depth=depth, num_heads=2, num_classes=0, **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return PromptedViT(model)


def learner(
    learner_name: str,
    kd_method: str,
    *,
    prompt_param=None,
    teacher_depth: int = 3,
    student_depth: int = 2,
    alpha: float = 0.5,
    dtype: torch.dtype = torch.float32,
    reduced: torch.dtype | None = None,
    optim: OptimConfig | None = None,
    device: str = "cpu",
    parallel: Parallel | None = None,
    run_block=None,
    **options,
) -> TeacherStudentLearner:
    """Teacher of width 24 and student of width 16; the pool has the size of PROMPT_PARAM unless given.

    ``reduced`` is the precision of the backbones' arithmetic, ``run_block`` computes their blocks; ``options`` are
    further fields of Config.
    """
    vits = {"teacher": vit(dim=24, depth=teacher_depth, seed=1), "student": vit(depth=student_depth, seed=2)}
    if reduced is not None:
        vits = {role: one.reduce_precision(reduced) for role, one in vits.items()}
    for one in vits.values() if run_block is not None else ():
        one.run_block = run_block
    config = Config(
        learner_name=learner_name,
        prompt_param=prompt_param or PROMPT_PARAM.get(learner_name, PROMPTS[learner_name].paper),
        distill=DistillConfig(kd_method, (student_depth, 4), alpha),
        optim=optim or OptimConfig(lr=0.01, schedule=(2,)),
        **options,
    )
    built = build_learner(config, vits, CLASSES, TASKS, parallel or Parallel(torch.device(device)))
    for module in (built.student, built.distiller, built.teacher):
        if module is not None and dtype != torch.float32:
            module.to(dtype)
    return built


def classes_of(task: int) -> ClassRange:
    return ClassRange(task * PER_TASK, (task + 1) * PER_TASK)


def batch_of(task: int, dtype: torch.dtype = torch.float32, *, size: int = BATCH, seed: int = 0):
    """Images [size, 3, 16, 16] and labels of one task."""
    generator = torch.Generator().manual_seed(100 * task + seed)
    images = torch.rand(size, 3, 16, 16, generator=generator).to(dtype)
    classes = classes_of(task)
    return images, torch.randint(classes.start, classes.stop, (size,), generator=generator)


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit for bit what they were."""
    return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
