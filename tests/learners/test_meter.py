"""Means of an epoch's losses, and which numbers end a run."""

import math

import pytest
import torch

from learners.meter import LossMeter, NonFiniteError
from learners.steps import StepResult
from utils.parallel import Parallel


def meter_of(*gradients: float, check_gradient: bool = False, read_each: bool = False) -> LossMeter:
    """A meter that was given steps with a loss of 1 and these gradients, on four images of which two were right."""
    meter = LossMeter(Parallel(torch.device("cpu")), check_gradient=check_gradient)
    for gradient in gradients:
        meter.add(StepResult(torch.ones(()), {}, torch.tensor(2), torch.tensor(gradient)), 4)
        if read_each:
            meter.read()
    meter.read()
    return meter


@pytest.mark.parametrize("read_each", [False, True])
@pytest.mark.parametrize("skipped", [math.inf, math.nan])
def test_the_mean_gradient_is_that_of_the_updates(skipped, read_each):
    """With fp16 a step whose gradient is not finite is left out, and the next one has a smaller loss scale."""
    meter = meter_of(skipped, 2.0, 4.0, read_each=read_each)
    assert meter.means() == {"loss": 1.0, "gradient": 3.0, "accuracy": 50.0}
    again = LossMeter(meter.parallel, check_gradient=False)
    again.load_state(meter.state())
    assert again.means() == meter.means()
    assert math.isnan(meter_of(skipped).means()["gradient"])


def test_elsewhere_a_gradient_that_is_not_finite_ends_the_run():
    with pytest.raises(NonFiniteError, match="step 2: gradient is inf"):
        meter_of(1.0, math.inf, check_gradient=True)
