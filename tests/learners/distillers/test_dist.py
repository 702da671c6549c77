"""DIST by hand; test_contract.py has what all methods share."""

import numpy as np
import torch

from learners.distillers.dist import dist_loss


def test_by_numpys_correlation():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 3).double()
    s, t = (torch.softmax(x / 2, 1).numpy() for x in (student, teacher))
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    loss = dist_loss(student, teacher, beta=0.5, gamma=3.0, temperature=2.0)
    np.testing.assert_allclose(loss.item(), 4 * (0.5 * rows + 3 * columns), rtol=1e-6)


def test_a_single_class_has_finite_gradients():
    student = torch.randn(4, 1, requires_grad=True)
    dist_loss(student, torch.randn(4, 1), beta=2.0, gamma=2.0, temperature=4.0).backward()
    assert student.grad.isfinite().all()
