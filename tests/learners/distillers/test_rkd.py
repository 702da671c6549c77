"""RKD by hand; test_contract.py has what all methods share."""

import torch

from learners.distillers.rkd import rkd_loss

TRIANGLE = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])


def test_turned_and_enlarged_features_have_the_same_relations():
    turned = 7 * TRIANGLE @ torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    assert rkd_loss(turned + 2, TRIANGLE, distance=25.0, angle=50.0) < 1e-6


def test_by_hand():
    """Sides 3, 4 and 5 against 1, 1 and 2 on a line: of relative length 3/4, 1, 5/4 against 3/4, 3/4, 3/2."""
    line = torch.tensor(
        [[1.0], [0.0], [2.0]]
    )  # at the first image opposite directions, where the triangle has 90 degrees
    by_distance = 2 * (0.25**2 / 2 + 0.25**2 / 2) / 9
    torch.testing.assert_close(rkd_loss(line, TRIANGLE, distance=1.0, angle=0.0), torch.tensor(by_distance))
    by_angle = 2 * (1**2 / 2 + 0.4**2 / 2 + 0.2**2 / 2) / 27
    torch.testing.assert_close(rkd_loss(line, TRIANGLE, distance=0.0, angle=1.0), torch.tensor(by_angle))


def test_one_image_and_equal_images_have_finite_gradients():
    for number in (1, 3):
        student = torch.ones(number, 2, requires_grad=True)
        rkd_loss(student, torch.ones(number, 3), distance=25.0, angle=50.0).backward()
        assert student.grad.isfinite().all()
