"""Nothing in a step makes the host wait for the device: a GPU shows it, and on the CPU the operations that would."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode  # the documented way, without a public name

from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from tests.learners import small
from tests.learners.small import batch_of, classes_of

# Their results, or the sizes of their results, depend on values of tensors.
WAIT = ["_local_scalar_dense", "_unique", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero"]
WAIT += ["unique_consecutive", "unique_dim", "unique_dim_consecutive", "repeat_interleave", "_linalg_check_errors"]
INDEXING = ["index", "index_put", "index_put_", "_index_put_impl_"]  # by a mask
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class WaitError(Exception):
    pass


class NoWaits(TorchDispatchMode):
    """Refuses operations for which the host would wait on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = (
            [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)] if name in INDEXING else []
        )
        if name in WAIT or masks:
            raise WaitError(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waits(device):
    if device == "cpu":
        with NoWaits():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduced", [None, torch.bfloat16])
@pytest.mark.parametrize("kd_method", DISTILLERS)
@pytest.mark.parametrize("learner_name", PROMPTS)
def test_no_step_waits_for_the_device(learner_name, kd_method, reduced, device):
    learner = small.learner(learner_name, kd_method, device=device, reduced=reduced)
    images, targets = (part.to(device) for part in batch_of(0))
    for role in learner.roles:
        training = learner.begin_training(role, classes_of(0))
        training.begin_epoch(0)
        training.train_step(images, targets)  # the first step makes the optimizer's state
        with no_waits(device):
            training.train_step(images, targets)
    evaluate = learner.evaluator()
    with torch.inference_mode():
        evaluate(images, targets, 2)
        with no_waits(device):
            evaluate(images, targets, 2)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 0)[[0, 1]].unique(),
        lambda x: torch.nn.functional.one_hot(x, 4),
        lambda x: x.__setitem__(x > 1, 0),
    ],
)
def test_what_waits_is_found(waits):
    with pytest.raises(WaitError), NoWaits():
        waits(torch.arange(4))
