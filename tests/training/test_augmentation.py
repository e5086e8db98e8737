"""Random transforms: drawn anew for each example and epoch, in training alone."""

import pytest
import torch
from torch import Tensor, nn

from clext.core.modes import module_mode
from clext.training.augmentation import augmentation, transformed

IMAGE = torch.arange(1.0, 3 * 8 * 8 + 1).view(3, 8, 8)


class TestCropFlip:
    def test_each_example_is_a_crop_of_the_padded_image_mirrored_or_not(self):
        pytest.importorskip("torchvision")
        padded = torch.nn.functional.pad(IMAGE, (4, 4, 4, 4))
        possible = {
            tuple(image.flatten().tolist()): (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for crop in [padded[:, top : top + 8, left : left + 8]]
            for mirrored, image in enumerate((crop, crop.flip(2)))
        }
        torch.manual_seed(0)
        batch = augmentation("crop-flip", None)(IMAGE.expand(200, 3, 8, 8))
        drawn = [possible[tuple(image.flatten().tolist())] for image in batch]
        tops, lefts, mirrored = (set(column) for column in zip(*drawn, strict=True))
        assert tops == lefts == set(range(9))
        assert mirrored == {0, 1}

    def test_it_is_for_images(self):
        with pytest.raises(ValueError, match=r"crop-flip.*\[C, H, W\], got \[64\]"):
            augmentation("crop-flip", None)(torch.zeros(2, 64))


def test_v2_transforms_draw_for_each_example():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    flip = v2.RandomHorizontalFlip()
    torch.manual_seed(0)
    batch = IMAGE.expand(64, 3, 8, 8)
    assert len({image[0, 0, 0].item() for image in augmentation(flip, None)(batch)}) == 2
    # Why the batch is not given at once: all are mirrored, or none.
    assert {len(flip(batch)[:, 0, 0, 0].unique()) for _ in range(8)} == {1}


def test_kornia_transforms_draw_for_each_example_of_a_batch():
    kornia = pytest.importorskip("kornia.augmentation")
    crop = nn.Sequential(kornia.RandomCrop((8, 8), padding=4), kornia.RandomHorizontalFlip())
    torch.manual_seed(0)
    batch = augmentation(None, crop)(IMAGE.expand(64, 3, 8, 8))
    assert batch.shape == (64, 3, 8, 8)
    assert len({tuple(image.flatten().tolist()) for image in batch}) > 32


def test_each_example_is_first_and_the_batch_second():
    def first(example: Tensor) -> Tensor:
        assert example.shape == (2,)
        return example + 1

    made = augmentation(first, lambda batch: batch * 10)
    assert made(torch.zeros(3, 2)).tolist() == [[10.0, 10.0]] * 3
    assert augmentation(None, None) is None


def test_half_precision_of_the_model_is_not_that_of_the_transform():
    made = augmentation(None, lambda batch: batch @ torch.eye(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(torch.ones(3, 2)).dtype == torch.float32


class TestTransformed:
    def test_only_in_train_mode_and_only_inside(self):
        model, plain = nn.Linear(2, 2), torch.ones(1, 2)
        with transformed(model, torch.neg):
            inside = model(plain)
            with module_mode(model, training=False):
                tested = model(plain)
        torch.testing.assert_close(inside, model(-plain))
        torch.testing.assert_close(tested, model(plain))

    def test_the_model_is_as_it_was_after_an_error(self):
        model = nn.Linear(2, 2)
        with pytest.raises(ZeroDivisionError), transformed(model, torch.neg):
            raise ZeroDivisionError
        assert not model._forward_pre_hooks
