import pytest
import torch

from augmentation import NUMBERS, POLICIES, augment


def images_of(count=4, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_no_policy_leaves_images_alone():
    images = images_of()
    assert torch.equal(augment(images, (), torch.rand(4, NUMBERS)), images)


def test_color_is_brightness_saturation_and_contrast():
    images, middle = images_of(), torch.full((4, NUMBERS), 0.5)
    torch.testing.assert_close(augment(images, ("color",), middle), images)  # nothing changes
    bright, grey = middle.clone(), middle.clone()
    bright[:, 0], grey[:, 1] = 0.75, 0
    torch.testing.assert_close(augment(images, ("color",), bright), images + 0.25)
    torch.testing.assert_close(*augment(images, ("color",), grey)[:, :2].unbind(1))


def test_translation_moves_each_image_by_its_own_shift_and_lets_zeros_in():
    images, random = images_of(2), torch.full((2, NUMBERS), 0.5)
    random[1, 3], random[1, 4] = 0.99, 0.0  # by two pixels up and two to the right, an eighth of 16
    moved = augment(images, ("translation",), random)
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, :, :14, 2:], images[1, :, 2:, :14])
    assert not moved[1, :, 14:].any() and not moved[1, :, :, :2].any()


def test_cutout_blanks_a_square_of_half_the_side():
    random = torch.full((4, NUMBERS), 0.5)
    cut = augment(images_of(), ("cutout",), random)
    assert not cut[:, :, 4:12, 4:12].any()
    assert cut[:, :, :4].all() and cut[:, :, 12:].all()


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_agree_with_finite_differences(policy):
    images = images_of(2, 8).double().requires_grad_()
    random = torch.rand(2, NUMBERS, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: augment(x, (policy,), random), images)
