"""Pre-train mini_vit_base or mini_vit_small on icons and photographs, on one GPU (or, patiently, on a CPU).

    python -m experiments.pretrain_mini_vit --icons base.npz --photos tiny-imagenet.zip \
        --model mini_vit_base --out runs/base --device cuda
    python -m experiments.pretrain_mini_vit --icons base.npz --photos tiny-imagenet.zip
    python -m experiments.pretrain_mini_vit --photos tiny-imagenet.zip --novel

The last two only probe. ``base.npz`` is made by ``build_icon_r.py --pretraining``; photographs are 64 x 64 JPEGs named
``{base,novel}/{train,val}/<class>/*.JPEG`` in a zip file. Writes ``OUT/checkpoint.pt``, from which the same
command resumes, and ``OUT/<model>.safetensors``: fp16, BatchNorm folded, for images in [0, 1]. Recipes are chosen on
held-out base classes, which are never trained on; ``--novel`` probes the classes of the benchmarks, once, at the end.

Recipe: cosine classifier over all classes plus a supervised contrastive loss (Khosla et al., 2020) on pairs of
pictures of one class, BatchNorm on the CLS feature in training, a quarter of the tokens dropped, cosine schedule;
Muon for the blocks' matrices, AdamW for the rest. Needs torch 2.9 or later.

Shapes: B batch, D width.
"""

import argparse
import math
import os
from collections import OrderedDict
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from dataloaders import DATASETS
from models.mini_vit import WEIGHTS_DIR, mini_vit_base, mini_vit_small
from utils.config import DataConfig

MODELS = {"mini_vit_base": mini_vit_base, "mini_vit_small": mini_vit_small}
EPOCHS = {"mini_vit_base": 37, "mini_vit_small": 17}
DROP_PATH = {"mini_vit_base": 0.05, "mini_vit_small": 0.0}
BATCH, PHOTO_SHARE = 512, 0.3  # half as many pairs, three tenths of them photographs if there are any
LR, WEIGHT_DECAY, WARMUP_STEPS, TOKEN_DROP = 2e-3, 0.05, 200, 0.25
LOGIT_SCALE, TEMPERATURE, LABEL_SMOOTHING = 20.0, 0.1, 0.05


class Images(NamedTuple):
    """uint8 images [n, 3, 64, 64] with labels [n] that count from 0 without gaps, sorted."""

    images: Tensor
    labels: Tensor

    def to(self, device: str) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))

    def select(self, mask: Tensor) -> "Images":
        return Images(self.images[mask], self.labels[mask].unique(return_inverse=True)[1])

    def split(self, held: Tensor) -> "list[Images]":
        """The classes to train on; then three quarters and a quarter of the pictures of each ``held`` [n] class."""
        counts = self.labels.bincount()
        is_test = (torch.arange(len(held)) - (counts.cumsum(0) - counts)[self.labels]) % 4 == 3
        return [self.select(mask) for mask in (~held, held & ~is_test, held & is_test)]


def load_icons(path: Path) -> list[Images]:
    """Pictures for training, and those of the held-out names in two parts."""
    file = np.load(path)
    images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    order = labels.argsort(stable=True)
    data = Images(images[order].permute(0, 3, 1, 2).contiguous(), labels[order])
    return data.split(torch.from_numpy(file["held"])[data.labels])


def load_photos(path: Path, folder: str) -> Images:
    """All JPEGs ``folder/*/<class>/*.JPEG``, e.g. of ``"base"`` or ``"novel/train"``, in a zip file."""
    with ZipFile(path) as archive:
        names = [name for name in archive.namelist() if fnmatch(name, f"{folder}/*.JPEG")]
        names.sort(key=lambda name: (name.split("/")[-2], name))
        images = [np.asarray(Image.open(BytesIO(archive.read(name))).convert("RGB")) for name in names]
    labels = np.unique([name.split("/")[-2] for name in names], return_inverse=True)[1]
    return Images(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def load_icon_r(train: bool) -> Images:
    store, labels = DATASETS["Icon_R"].load()(DataConfig(), seed=0).load(train)
    images = torch.from_numpy(np.stack([np.asarray(store.open(index)) for index in range(len(store))]))
    return Images(images.permute(0, 3, 1, 2), torch.from_numpy(labels))


def uniform(images: Tensor, low: float, high: float, *shape: int) -> Tensor:
    """Random numbers on the device of ``images``, [B, 1, 1, 1] or [B, *shape]."""
    return images.new_empty(len(images), *(shape or (1, 1, 1))).uniform_(low, high)


def warp(images: Tensor, zoom: tuple[float, float], turn: float, padding: str) -> Tensor:
    """Random zoom (above 1: smaller), turn, shear, aspect, shift and mirroring."""
    scale, flip = uniform(images, *zoom, 1)[:, 0], torch.where(uniform(images, 0, 1, 1)[:, 0] < 0.5, -1.0, 1.0)
    angle, shear, aspect = uniform(images, -1, 1, 3).unbind(1)
    angle, shear, aspect = turn * angle, 0.12 * shear, (0.15 * aspect).exp()
    maps = images.new_empty(len(images), 2, 3)
    maps[:, 0, 0] = flip * scale * aspect * angle.cos()
    maps[:, 0, 1] = scale * (shear - angle.sin())
    maps[:, 1, 0] = flip * scale * angle.sin()
    maps[:, 1, 1] = scale / aspect * angle.cos()
    maps[:, :, 2] = uniform(images, -0.12, 0.12, 2)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def mix_channels(images: Tensor) -> Tensor:
    """Random linear mixture of the colours, a fifth of the images grey."""
    matrix = torch.eye(3, device=images.device) + 0.15 * torch.randn(len(images), 3, 3, device=images.device)
    matrix = matrix / matrix.sum(2, keepdim=True).clamp(min=0.3)
    matrix = torch.where(uniform(images, 0, 1, 1, 1) < 0.2, torch.full_like(matrix, 1 / 3), matrix)
    return torch.bmm(matrix, images.flatten(2)).view_as(images)


def soften(images: Tensor) -> Tensor:
    """Blur a fifth of the images."""
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return torch.where(uniform(images, 0, 1) < 0.2, blurred, images)


def erase(images: Tensor, colour: Tensor) -> Tensor:
    """Fill a random rectangle, 8 to 24 pixels a side, of a quarter of the images with ``colour`` [B, 3, 1, 1]."""
    sides = uniform(images, 8, 24, 2, 1) * (uniform(images, 0, 1, 1, 1) < 0.25)
    start = uniform(images, 0, 1, 2, 1) * (images.shape[-1] - sides)
    pixel = torch.arange(images.shape[-1], device=images.device)
    inside = (pixel >= start) & (pixel < start + sides)  # [B, 2, 64]
    return torch.where(inside[:, 0, None, :, None] & inside[:, 1, None, None, :], colour, images)


def augment_icons(images: Tensor) -> Tensor:
    """Images in [0, 1]: other strokes (bolder, thinner, outlines) and, for a half, other colours."""
    ink = warp(1 - images, (0.75, 1.25), turn=0.25, padding="zeros")
    grown, shrunk = F.max_pool2d(ink, 3, 1, 1), -F.max_pool2d(-ink, 3, 1, 1)
    kind = uniform(images, 0, 1)
    ink = torch.where(kind < 0.12, grown, torch.where(kind < 0.24, (ink + shrunk) / 2, ink))
    ink = mix_channels(soften(torch.where(kind > 0.9, grown - shrunk, ink))).clamp(0, 1)
    is_plain = uniform(images, 0, 1) < 0.5
    paper = torch.where(is_plain, 1.0, uniform(images, 0.6, 1, 3, 1, 1))
    pen = torch.where(is_plain, 0.0, uniform(images, 0, 0.4, 3, 1, 1))
    swapped = uniform(images, 0, 1) < 0.15
    paper, pen = torch.where(swapped, pen, paper), torch.where(swapped, paper, pen)
    return erase(paper + (pen - paper) * ink, paper)


def augment_photos(images: Tensor) -> Tensor:
    """Images in [0, 1]: crops, contrast, brightness, colours."""
    images = soften(mix_channels(warp(images, (0.6, 1.05), turn=0.2, padding="reflection")))
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * uniform(images, 0.6, 1.4) + mean * uniform(images, 0.6, 1.4)
    return erase(images.clamp(0, 1), uniform(images, 0, 1, 3, 1, 1))


class PairSampler:
    """Draws random pairs of pictures of one class; a class is as likely as the root of its number of pictures."""

    def __init__(self, data: Images):
        self.data, self.counts = data, data.labels.bincount()
        self.first = self.counts.cumsum(0) - self.counts

    def draw(self, pairs: int) -> Images:
        """Images in [0, 1], [2 * pairs, 3, 64, 64], the second of each pair behind all the first."""
        labels = torch.multinomial(self.counts.float().sqrt(), pairs, replacement=True)
        counts, random = self.counts[labels], torch.rand(2, pairs, device=labels.device)
        one = (random[0] * counts).long()
        two = (one + 1 + (random[1] * (counts - 1)).long()) % counts
        rows = self.first[labels] + torch.stack([one, two])
        return Images(self.data.images[rows.flatten()].float() / 255, labels.repeat(2))


class Pretrainer(nn.Module):
    """The backbone with BatchNorm in the stem and on the feature, and a cosine classifier: for pre-training only."""

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        self.backbone = MODELS[name]()
        for index, block in enumerate(self.backbone.patch_embed.body):
            parts = {"conv": block.conv, "norm": nn.BatchNorm2d(block.conv.out_channels), "act": block.act}
            self.backbone.patch_embed.body[index] = nn.Sequential(OrderedDict(parts))
        self.backbone.patch_drop = PatchDropout(TOKEN_DROP, num_prefix_tokens=1)
        for block in self.backbone.blocks:
            block.drop_path1, block.drop_path2 = DropPath(DROP_PATH[name]), DropPath(DROP_PATH[name])
        self.feature_norm = nn.BatchNorm1d(self.backbone.embed_dim, affine=False)
        self.classifier = nn.Linear(self.backbone.embed_dim, num_classes, bias=False)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [] and accuracy [] of a batch in which every class occurs at least twice."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            features = self.backbone(images)
        features = F.normalize(self.feature_norm(features.float()), dim=1)
        logits = LOGIT_SCALE * features @ F.normalize(self.classifier.weight, dim=1).T
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        same = (labels[:, None] == labels) & ~itself
        similarity = (features @ features.T / TEMPERATURE).masked_fill(itself, -1e4).log_softmax(1)
        contrastive = -((similarity * same).sum(1) / same.sum(1)).mean()
        loss = 0.5 * F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING) + contrastive
        return loss, (logits.argmax(1) == labels).float().mean()


def make_optimizers(model: Pretrainer) -> list[torch.optim.Optimizer]:
    """No weight decay on biases, norms, the CLS token and the position embedding."""
    groups = {"muon": [], "decayed": [], "others": []}
    for name, parameter in model.named_parameters():
        is_decayed = parameter.ndim > 1 and not name.endswith(("_token", "pos_embed"))
        groups["others" if not is_decayed else "muon" if "blocks" in name else "decayed"].append(parameter)
    decay = {"weight_decay": WEIGHT_DECAY}
    adamw = [{"params": groups["decayed"], **decay}, {"params": groups["others"], "weight_decay": 0.0}]
    # Steps as large as AdamW's, so that the learning rate means the same.
    muon = torch.optim.Muon(groups["muon"], lr=LR, adjust_lr_fn="match_rms_adamw", **decay)
    return [torch.optim.AdamW(adamw, lr=LR, fused=True), muon]


@torch.no_grad()
def extract(model: nn.Module, images: Tensor) -> Tensor:
    """Final-norm CLS features [n, D] of uint8 images."""
    model.eval()
    return torch.cat([model(part.float() / 255) for part in images.split(512)])


def nearest_mean(train: Images, test: Images) -> float:
    """Accuracy (%) of the nearest class mean by cosine, features [n, D] centred on the training mean."""
    centre = train.images.mean(0)
    features, queries = (F.normalize(part.images - centre, dim=1) for part in (train, test))
    sums = features.new_zeros(int(train.labels.max()) + 1, features.shape[1]).index_add(0, train.labels, features)
    return 100 * ((queries @ F.normalize(sums, dim=1).T).argmax(1) == test.labels).float().mean().item()


def linear_probe(train: Images, test: Images) -> float:
    """Accuracy (%) of a linear classifier on standardised features [n, D]."""
    centre, spread = train.images.mean(0), train.images.std(0) + 1e-5
    features, queries = ((part.images - centre) / spread for part in (train, test))
    torch.manual_seed(0)
    probe = nn.Linear(features.shape[1], int(train.labels.max()) + 1, device=features.device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=5e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(probe(features), train.labels, label_smoothing=0.1).backward()
        optimizer.step()
        decay.step()
    return 100 * (probe(queries).argmax(1) == test.labels).float().mean().item()


@torch.no_grad()
def export(model: Pretrainer, images: Tensor, path: Path) -> None:
    """Save the backbone as fp16, BatchNorm folded, features standardised over ``images``.

    Pre-training sees features through a BatchNorm, so they may share an offset that gives all images nearly the same
    direction, which leaves nothing to a pool that selects by the cosine of the query. The final norm takes it out.
    """
    backbone = model.backbone.eval()
    features = extract(backbone, images)
    backbone.norm.weight.div_(features.std(0))
    backbone.norm.bias.sub_(features.mean(0)).div_(features.std(0))
    for block in backbone.patch_embed.body:
        block.conv = nn.utils.fuse_conv_bn_eval(block.conv, block.norm)
    state = {key: value.half().contiguous() for key, value in backbone.state_dict().items() if ".norm." not in key}
    save_file(state, path)


def train(args: argparse.Namespace, icons: Images, photos: Images) -> None:
    """Pre-train one model, resuming from its checkpoint if there is one, and export it."""
    args.out.mkdir(parents=True, exist_ok=True)
    path, weights = args.out / "checkpoint.pt", args.out / f"{args.model}.safetensors"
    icon_sampler, photo_sampler = PairSampler(icons), PairSampler(photos)
    num_icons, num_photos = len(icon_sampler.counts), len(photo_sampler.counts)
    photo_share = PHOTO_SHARE if num_photos else 0.0
    photo_pairs = round(photo_share * BATCH / 2)
    total = args.epochs or EPOCHS[args.model]
    steps = (len(icons.labels) + len(photos.labels)) // BATCH
    torch.manual_seed(args.seed)
    model = Pretrainer(args.model, num_icons + num_photos).to(args.device)
    optimizers, first = make_optimizers(model), 0
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=args.device)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["epoch"]
    for epoch in range(first, total):
        torch.manual_seed(args.seed * 100_003 + epoch)  # a resumed run draws the same numbers as an uninterrupted one
        model.train()
        results = torch.zeros(2, device=args.device)
        for step in range(epoch * steps, (epoch + 1) * steps):
            factor = min(1, (step + 1) / WARMUP_STEPS) * max(0.5 * (1 + math.cos(math.pi * step / total / steps)), 1e-3)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = LR * factor
            images, labels = icon_sampler.draw(BATCH // 2 - photo_pairs)
            images = augment_icons(images)
            if photo_pairs:
                pictures = photo_sampler.draw(photo_pairs)
                images = torch.cat([images, augment_photos(pictures.images)])
                labels = torch.cat([labels, num_icons + pictures.labels])
            loss, accuracy = model(images, labels)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            results += torch.stack([loss.detach(), accuracy])
        loss, accuracy = (results / steps).tolist()
        print(f"epoch {epoch + 1} of {total}: loss {loss:.3f}, accuracy {100 * accuracy:.1f}", flush=True)
        state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        torch.save({"epoch": epoch + 1, **state}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)  # a kill leaves no half file
    torch.manual_seed(args.seed)
    sizes = (round(8192 * (1 - photo_share)), round(8192 * photo_share))
    parts = zip((icons.images, photos.images), sizes, strict=True)
    export(model, torch.cat([images[torch.randperm(len(images))[:size]] for images, size in parts]), weights)


def probe(folder: Path, sets: dict[str, list[Images]], device: str) -> None:
    """Print accuracies (%) on each set's two parts: of the models of a folder, random ones and raw pixels."""
    models = {"raw 16 x 16 pixels": nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten())}
    for name, build in MODELS.items():
        if (path := folder / f"{name}.safetensors").exists():
            torch.manual_seed(0)
            models[f"{name}, random"], models[name] = build(), build()
            models[name].load_state_dict(load_file(path))
    for name, model in models.items():
        for title, parts in sets.items():
            train, test = (Images(extract(model.to(device), part.images), part.labels) for part in parts)
            cosine = F.normalize(train.images, dim=1).mean(0).square().sum()  # of two images, on average
            mean, linear = nearest_mean(train, test), linear_probe(train, test)
            print(f"{name:23} {title:15} nearest mean {mean:.1f}, linear {linear:.1f}, cosine {cosine:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--icons", type=Path, help="base.npz")
    parser.add_argument("--photos", type=Path, help="zip file")
    parser.add_argument("--model", choices=MODELS, help="what to train; without it, the weights in OUT are evaluated")
    parser.add_argument("--out", type=Path, default=WEIGHTS_DIR, help="folder of checkpoint.pt and the weights")
    parser.add_argument("--epochs", type=int, help=f"default: {EPOCHS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--novel", action="store_true", help="evaluate on Icon-R and the novel photographs")
    args = parser.parse_args()
    if args.novel:
        sets = {"Icon-R": [load_icon_r(True), load_icon_r(False)]}
        if args.photos:
            sets["novel photos"] = [load_photos(args.photos, f"novel/{part}") for part in ("train", "val")]
    elif args.icons:
        icons, *held_icons = load_icons(args.icons)
        sets, photos = {"held-out icons": held_icons}, icons.select(torch.zeros_like(icons.labels, dtype=torch.bool))
        if args.photos:
            data = load_photos(args.photos, "base")
            photos, *sets["held-out photos"] = data.split(data.labels % 9 == 0)
        if args.model:
            train(args, icons.to(args.device), photos.to(args.device))
    else:
        parser.error("give --icons (and --model to train), or --novel to evaluate on the benchmarks")
    probe(args.out, {title: [part.to(args.device) for part in parts] for title, parts in sets.items()}, args.device)


if __name__ == "__main__":
    main()
