"""Emoji-R through the same seams as every other data set."""

import numpy as np
import torch

from dataloaders.build import build_stream
from dataloaders.loader import DataPipeline


def test_the_stream_of_the_paper_size():
    stream = build_stream(
        dataset="Emoji_R",
        dataroot="nowhere",
        image_size=64,
        first_split_size=20,
        other_split_size=20,
        crop_scale=(0.5, 1.0),
    )
    assert (len(stream), stream.num_classes, stream.split) == (10, 200, "official")
    assert [stream.test_size(t) for t in range(10)] == [60] * 10
    assert min(stream.train_size(t) for t in range(10)) >= 100
    labels = stream.train_images.labels
    assert np.bincount(labels, minlength=200).min() >= 4  # besides the three for testing

    (images, _), *_ = DataPipeline(stream, batch_size=16, eval_batch_size=60, seed=0).test(3)
    raw = [np.asarray(stream.test_images.store.open(i)) for i in stream.test_indices(3)]
    assert torch.equal((images * 255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(np.stack(raw)))
