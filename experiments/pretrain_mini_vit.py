"""Pre-train mini_vit_base and mini_vit_small on the base classes of Emoji-R, on one CPU core each.

    python -m experiments.pretrain_mini_vit --base base.npz --model mini_vit_small --epochs 80 --out runs/small
    python -m experiments.pretrain_mini_vit --base base.npz --model mini_vit_base --epochs 44 --out runs/base
    python -m experiments.pretrain_mini_vit --base base.npz --model mini_vit_base --epochs 30 --out runs/base2 \
        --init runs/base/checkpoint.pt
    python -m experiments.pretrain_mini_vit --probe

``base.npz`` comes from the builder of the embedded pictures, see ``models/weights/README.md``. Run it in the project's
root. It writes ``OUT/checkpoint.pt`` after every epoch, from which a killed run resumes, and
``OUT/<model>.safetensors``: fp16, BatchNorm folded, for images in [0, 1]. Recipes are judged on 60 base classes that
are never trained on; ``--probe`` looks at the novel classes, so run it last.

Recipe: cosine classifier over the base classes plus a supervised contrastive loss on pairs (two renditions of one
class), BatchNorm on the CLS feature while training, AdamW, cosine schedule, a quarter of the tokens dropped.

Shapes: B batch, D width.
"""

import argparse
import logging
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dataloaders.emoji_r import EmojiR
from models.mini_vit import fold_batchnorm, mini_vit_base, mini_vit_small, weights_path
from utils.config import DataConfig

LOG = logging.getLogger("pretrain")
MODELS = {"mini_vit_base": mini_vit_base, "mini_vit_small": mini_vit_small}
LEARNING_RATES = {"mini_vit_base": 5e-4, "mini_vit_small": 1.5e-3}
PAIRS = 64  # classes in a batch, two renditions of each
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 100
LOGIT_SCALE = 20.0
CONTRASTIVE_TEMPERATURE = 0.1
TOKEN_DROP = 0.25
HELD_OUT = 60


class Data(NamedTuple):
    """Images with their labels, which count from 0 without gaps."""

    images: Tensor
    labels: Tensor


def load_base(path: Path) -> tuple[Data, Data, Data]:
    """Read base.npz: training data, and train and test parts of the held-out base classes.

    Images are uint8 [n, 4, 64, 64], colour premultiplied by alpha. The held-out classes have at least 8 renditions;
    those of two artist families are the test images.
    """
    file = np.load(path)
    images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2)
    alpha = images[:, 3:].int()
    images = torch.cat([((images[:, :3].int() * alpha + 127) // 255).byte(), images[:, 3:]], 1)
    labels = torch.from_numpy(file["labels"])
    rich = torch.nonzero(labels.bincount() >= 8).flatten()
    held_out = rich[torch.randperm(len(rich), generator=torch.Generator().manual_seed(0))[:HELD_OUT]]
    test_sets = np.isin(file["sets"], ["twemoji", "emojione", "emojione-monotone"])
    held, test = torch.isin(labels, held_out), torch.from_numpy(test_sets)

    def subset(mask: Tensor) -> Data:
        return Data(images[mask].contiguous(), labels[mask].unique(return_inverse=True)[1])

    return subset(~held), subset(held & ~test), subset(held & test)


def load_novel(split: str) -> Data:
    """The novel classes' images in [0, 1], float [n, 3, 64, 64], of ``"train"`` or ``"test"``."""
    store, labels = EmojiR(DataConfig(), seed=0).load(split == "train")
    images = torch.from_numpy(np.stack([np.asarray(store.open(index)) for index in range(len(store))]))
    return Data(images.permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels))


def on_white(images: Tensor) -> Tensor:
    """Premultiplied uint8 [B, 4, 64, 64] -> [0, 1] RGB [B, 3, 64, 64]."""
    images = images.float() / 255
    return images[:, :3] + 1 - images[:, 3:]


def random_affine(batch: int) -> Tensor:
    """Maps [batch, 2, 3] for ``affine_grid``: scale 0.85 to 1.2, shear and shift a tenth, turn, flip."""
    scale = torch.empty(batch).uniform_(0.85, 1.2)
    aspect = torch.empty(batch).uniform_(-0.1, 0.1).exp()
    angle = torch.empty(batch).uniform_(-0.2, 0.2)
    shear = torch.empty(batch).uniform_(-0.1, 0.1)
    flip = torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    maps = torch.empty(batch, 2, 3)
    maps[:, 0, 0] = flip * scale * aspect * angle.cos()
    maps[:, 0, 1] = scale * (shear - angle.sin())
    maps[:, 1, 0] = flip * scale * angle.sin()
    maps[:, 1, 1] = scale / aspect * angle.cos()
    maps[:, :, 2] = torch.empty(batch, 2).uniform_(-0.1, 0.1)
    return maps


def mix_colours(colour: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Random channel mixing, greys, gain and inversion of premultiplied colour [B, 3, 64, 64].

    The second result is a background [B, 3, 1, 1], white or light (dark where inverted).
    """
    batch = len(colour)
    matrix = torch.eye(3) + 0.15 * torch.randn(batch, 3, 3)
    matrix = matrix / matrix.sum(2, keepdim=True).clamp(min=0.3)
    grey = (torch.rand(batch) < 0.25)[:, None, None]
    matrix = torch.where(grey, torch.full((3, 3), 1 / 3), matrix)
    matrix = matrix * torch.empty(batch, 1, 1).uniform_(0.6, 1.3)
    colour = torch.bmm(matrix, colour.flatten(2)).view_as(colour)
    inverted = (torch.rand(batch) < 0.04)[:, None, None, None]
    light = torch.empty(batch, 3, 1, 1).uniform_(0.6, 1)
    background = torch.where(torch.rand(batch, 1, 1, 1) < 0.6, torch.ones(()), light)
    return torch.where(inverted, alpha - colour, colour), torch.where(inverted, 1 - background, background)


def erase(images: Tensor, background: Tensor) -> Tensor:
    """Fill a random rectangle, 8 to 23 pixels a side, of a quarter of the images with their background."""
    batch, size = len(images), images.shape[-1]
    sides = torch.randint(8, 24, (batch, 2))
    sides[torch.rand(batch) >= 0.25] = 0
    start = (torch.rand(batch, 2) * (size - sides)).long()
    pixel = torch.arange(size)
    inside = (pixel >= start[..., None]) & (pixel < (start + sides)[..., None])  # [B, 2, size]
    return torch.where(inside[:, 0, None, :, None] & inside[:, 1, None, None, :], background, images)


def augment(images: Tensor) -> Tensor:
    """Premultiplied uint8 [B, 4, 64, 64] -> augmented RGB in [0, 1], [B, 3, 64, 64]."""
    grid = F.affine_grid(random_affine(len(images)), list(images.shape), align_corners=False)
    images = F.grid_sample(images.float() / 255, grid, align_corners=False)
    colour, alpha = images[:, :3], images[:, 3:]
    colour, background = mix_colours(colour, alpha)
    return erase((colour.clamp(0, 1) + (1 - alpha) * background).clamp(0, 1), background)


class Pretrainer(nn.Module):
    """The backbone with feature BatchNorm and a cosine classifier, for pre-training only."""

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        self.backbone = MODELS[name](norm=True, patch_drop_rate=TOKEN_DROP)
        self.feature_norm = nn.BatchNorm1d(self.backbone.embed_dim, affine=False)
        self.classifier = nn.Linear(self.backbone.embed_dim, num_classes, bias=False)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [] and accuracy [] of a batch whose images i and i + B/2 show the same class."""
        features = F.normalize(self.feature_norm(self.backbone(images)), dim=1)
        logits = LOGIT_SCALE * features @ F.normalize(self.classifier.weight, dim=1).T
        similarity = features @ features.T / CONTRASTIVE_TEMPERATURE
        similarity = similarity - 1e4 * torch.eye(len(features))  # an image is no partner of itself
        partner = torch.arange(len(features)).roll(len(features) // 2)
        loss = 0.5 * F.cross_entropy(logits, labels, label_smoothing=0.05)
        return loss + F.cross_entropy(similarity, partner), (logits.argmax(1) == labels).float().mean()


class PairSampler:
    """Batches of PAIRS classes, two random renditions each; an epoch shows as many images as the data have."""

    def __init__(self, labels: Tensor):
        self.rows = [rows for rows in labels.argsort(stable=True).split(labels.bincount().tolist()) if len(rows) >= 2]
        self.steps = len(labels) // (2 * PAIRS)

    def __iter__(self):
        for _ in range(self.steps):
            classes = torch.randperm(len(self.rows))[:PAIRS].tolist()
            pairs = [self.rows[label][torch.randperm(len(self.rows[label]))[:2]] for label in classes]
            yield torch.stack(pairs, 1).flatten()


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay on biases, norms, the CLS token and the position embedding."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_decayed = parameter.ndim > 1 and not name.endswith(("_token", "pos_embed"))
        (decayed if is_decayed else others).append(parameter)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY)


def schedule(step: int, total: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to 0.3 %."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.5 * (1 + math.cos(math.pi * step / total)), 0.003)


@torch.no_grad()
def extract(model: nn.Module, images: Tensor) -> Tensor:
    """Final-norm CLS features [n, D] of images in [0, 1]."""
    model.eval()
    return torch.cat([model(part) for part in images.split(256)])


def nearest_mean(train: Data, test: Data) -> float:
    """Accuracy (%) of the nearest class mean by cosine, features [n, D] centred on the training mean."""
    centre = train.images.mean(0)
    features, queries = (F.normalize(part.images - centre, dim=1) for part in (train, test))
    means = torch.stack([features[train.labels == label].mean(0) for label in range(train.labels.max() + 1)])
    guess = (queries @ F.normalize(means, dim=1).T).argmax(1)
    return 100 * (guess == test.labels).float().mean().item()


def linear_probe(train: Data, test: Data) -> float:
    """Accuracy (%) of a linear classifier on standardised features [n, D]."""
    centre, spread = train.images.mean(0), train.images.std(0) + 1e-5
    features, queries = ((part.images - centre) / spread for part in (train, test))
    torch.manual_seed(0)
    probe = nn.Linear(features.shape[1], int(train.labels.max()) + 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=5e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(probe(features), train.labels, label_smoothing=0.1).backward()
        optimizer.step()
        decay.step()
    return 100 * (probe(queries).argmax(1) == test.labels).float().mean().item()


@torch.no_grad()
def standardise_features(model: nn.Module, images: Tensor) -> None:
    """Fold mean and spread of the CLS features over ``images`` [n, 3, 64, 64] into the final norm, in place.

    Pre-training sees features through a BatchNorm, so they may share an offset that gives all images nearly the same
    direction (mean cosine 0.95 to 0.99), which leaves nothing to a pool that selects by the cosine of the query.
    """
    features = extract(model, images)
    mean, spread = features.mean(0), features.std(0)
    model.norm.weight.div_(spread)
    model.norm.bias.sub_(mean).div_(spread)


def export(name: str, state: dict[str, Tensor], path: Path, images: Tensor | None = None) -> None:
    """Save a backbone's state dict, BatchNorm in the stem folded, features standardised over ``images``, as fp16."""
    model = MODELS[name](norm=True)
    model.load_state_dict(state)
    fold_batchnorm(model)
    if images is not None:
        standardise_features(model, images)
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, path)
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def train_epoch(model: Pretrainer, optimizer: torch.optim.Optimizer, data: Data, epoch: int, args) -> tuple:
    """Train one epoch; return mean loss and accuracy (%)."""
    torch.manual_seed(args.seed * 100_003 + epoch)  # a resumed run draws the same numbers as an uninterrupted one
    model.train()
    sampler, results = PairSampler(data.labels), []
    for batch, rows in enumerate(sampler):
        factor = schedule(epoch * sampler.steps + batch, args.epochs * sampler.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        loss, accuracy = model(augment(data.images[rows]), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        results.append([loss.item(), 100 * accuracy.item()])
    return tuple(np.mean(results, axis=0))


def train(args) -> None:
    """Pre-train one model, resuming from its checkpoint if there is one, and export it."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "checkpoint.pt"
    data, held_train, held_test = load_base(args.base)
    torch.manual_seed(args.seed)
    model = Pretrainer(args.model, num_classes := int(data.labels.max()) + 1)
    optimizer = make_optimizer(model, args.lr)
    first, seconds = 0, 0.0
    if path.exists() or args.init:
        saved = torch.load(path if path.exists() else args.init, weights_only=True)
        model.load_state_dict(saved["model"])
        seconds = saved["seconds"]
        if path.exists():
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["epoch"]
    LOG.info("%s: %d classes, from epoch %d of %d", args.model, num_classes, first, args.epochs)
    for epoch in range(first, args.epochs):
        start = time.perf_counter()
        loss, accuracy = train_epoch(model, optimizer, data, epoch, args)
        seconds += time.perf_counter() - start
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({"epoch": epoch + 1, "seconds": seconds, **state}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)  # a kill leaves no half file
        features = (Data(extract(model.backbone, on_white(x)), labels) for x, labels in (held_train, held_test))
        values = (epoch + 1, seconds, loss, accuracy, nearest_mean(*features))
        LOG.info("epoch %d: %.0f s, loss %.3f, accuracy %.1f, held-out classes %.1f", *values)
    export(args.model, model.backbone.state_dict(), args.out / f"{args.model}.safetensors", on_white(data.images))


def probe() -> None:
    """Report both models, random ones of the same shape and raw pixels on the novel classes."""
    splits = [load_novel("train"), load_novel("test")]

    def report(name: str, features) -> None:
        parts = [Data(features(part.images), part.labels) for part in splits]
        LOG.info("%-24s nearest mean %.1f, linear %.1f", name, nearest_mean(*parts), linear_probe(*parts))

    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build()
        report(f"{name}, random", partial(extract, model))
        model.load_state_dict({key: value.float() for key, value in load_file(weights_path(name)).items()})
        report(name, partial(extract, model))
    report("raw 16 x 16 pixels", lambda images: F.adaptive_avg_pool2d(images, 16).flatten(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="images of the base classes")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--lr", type=float, help=f"default: {LEARNING_RATES}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="checkpoint.pt to start another cosine cycle from its weights")
    parser.add_argument("--out", type=Path, help="folder of checkpoint.pt and the weights")
    parser.add_argument("--probe", action="store_true", help="evaluate models/weights on the novel classes")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if args.probe:
        probe()
    elif args.base and args.model and args.out:
        args.lr = args.lr or LEARNING_RATES[args.model]
        train(args)
    else:
        parser.error("--base, --model and --out are needed (or --probe)")


if __name__ == "__main__":
    main()
