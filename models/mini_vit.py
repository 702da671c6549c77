"""Two small vision transformers for 64-pixel images, and their convolutional stem.

Both are timm's :class:`VisionTransformer` with :class:`ConvStem` as ``embed_layer``: with few images, convolutions
learn local features that a plain patch projection does not (Xiao et al., "Early Convolutions Help Transformers See
Better", 2021). They take RGB images in [0, 1] without any normalisation. The weights in ``models/weights`` were
pre-trained with BatchNorm in the stem, which is folded into its convolutions.
"""

import math
from collections import OrderedDict
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

WEIGHTS_DIR = Path(__file__).resolve().parent / "weights"


class ConvStem(nn.Module):
    """Stride-2 3x3 convolutions and a 1x1 projection instead of timm's ``PatchEmbed``, whose arguments it takes.

    There is one convolution for each halving (four for ``patch_size`` 16), followed by ReLU; the widths double up
    to ``embed_dim``.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **timm_options):
        super().__init__()
        # Attributes that timm's VisionTransformer reads from its embedding layer.
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

        halvings = int(math.log2(patch_size))
        widths = [in_chans] + [max(16, embed_dim >> (halvings - 1 - i)) for i in range(halvings)]
        self.body = nn.Sequential()
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
            self.body.append(nn.Sequential(OrderedDict(conv=conv, act=nn.ReLU(inplace=True))))
        self.proj = nn.Conv2d(widths[-1], embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images [B, 3, 64, 64] into tokens [B, 16, D]."""
        return self.proj(self.body(images)).flatten(2).transpose(1, 2)


def _mini_vit(embed_dim: int, depth: int) -> VisionTransformer:
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": embed_dim, "depth": depth, "num_heads": 3}
    return VisionTransformer(num_classes=0, embed_layer=ConvStem, **sizes)


def mini_vit_base() -> VisionTransformer:
    """The teacher: width 192, 6 blocks, 3 heads, 2.9 M parameters, random."""
    return _mini_vit(192, 6)


def mini_vit_small() -> VisionTransformer:
    """The student, and the query network: width 96, 4 blocks, 3 heads, 0.5 M parameters, random."""
    return _mini_vit(96, 4)
