"""LogitStd by hand; test_contract.py has what all methods share."""

import pytest
import torch

from learners.distillers.logit_std import standardise


def test_by_hand():
    """(1, 2, 3) has the mean 2 and the standard deviation sqrt(2/3); scale and shift do not matter."""
    expected = torch.tensor([[-1.5, 0.0, 1.5]]).sign() * 1.2247449
    for logits in (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[70.0, 80.0, 90.0]])):
        torch.testing.assert_close(standardise(logits), expected)


@pytest.mark.parametrize("logits", [[3.0], [2.0, 2.0]])
def test_equal_logits_have_finite_gradients(logits):
    logits = torch.tensor([logits], requires_grad=True)
    standardise(logits)[0, 0].backward()
    assert logits.grad.isfinite().all()
