"""pSp's transforms against the original's pictures."""

import numpy as np
import pytest
from PIL import Image

from jaxstyle import inputs
from jaxstyle.errors import UserError
from tests.filled import golden
from train import transforms


@pytest.fixture(scope="module")
def picture():
    return golden("encoder_inputs")["x_u8"][1]


@pytest.mark.parametrize("factor", transforms.FACTORS)
def test_shrinking_equals_the_original(picture, factor):
    expected = golden("psp_transforms")
    kernel = expected[f"kernel_{factor}"]
    np.testing.assert_allclose(inputs.bicubic_kernel(factor), kernel, atol=1e-7)
    small = inputs.shrink(picture, factor)
    assert small.shape == (256 // factor, 256 // factor, 3)
    if factor == 1:
        return
    # Cut off, not rounded: a last bit in the sum may move a value by one.
    difference = np.abs(small.astype(int) - expected[f"down_{factor}_u8"])
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_enlarging_equals_the_original(picture):
    small = Image.fromarray(golden("psp_transforms")["down_16_u8"])
    example = transforms.low_resolution(
        Image.fromarray(picture), np.random.default_rng(0), size=256, factors=(16,)
    )
    np.testing.assert_allclose(example["image"], picture / 127.5 - 1, atol=1e-6)
    large = np.asarray(small.resize((256, 256), Image.Resampling.BILINEAR))
    wanted = golden("psp_transforms")["down_16_up256_u8"]
    np.testing.assert_array_equal(large[::4, ::4], wanted)
    got = np.rint((example["input"][::4, ::4] + 1) * 127.5)
    assert np.abs(got - wanted).max() <= 1


def test_one_hot_equals_the_original():
    expected = golden("psp_transforms")
    got = inputs.one_hot(expected["onehot_in"], 19)
    np.testing.assert_array_equal(got, expected["onehot_out"])
    with pytest.raises(UserError, match="class 19; there are 19 classes"):
        inputs.one_hot(np.array([[19]], np.uint8), 19)


def test_examples(picture):
    image, rng = Image.fromarray(picture), np.random.default_rng(0)
    plain = picture / np.float32(127.5) - 1
    flips = [transforms.same(image, rng, size=256)["image"] for _ in range(20)]
    kinds = {bool(np.allclose(f, plain, atol=1e-6)) for f in flips}
    assert kinds == {True, False}
    seen = set()
    for _ in range(30):
        example = transforms.apart((image, image), rng, size=256)
        first, second = (
            bool(np.allclose(example[k], plain, atol=1e-6)) for k in ("input", "image")
        )
        seen.add((first, second))
    assert len(seen) == 4
    example = transforms.sketch((image, image), rng, size=64)
    assert example["input"].shape == (64, 64, 1) and example["input"].min() >= 0
    classes = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    options = {"size": 8, "classes": 16, "nearest": True}
    example = transforms.labels((classes, image), rng, **options)
    np.testing.assert_array_equal(
        example["input"].argmax(-1),
        np.arange(16).reshape(4, 4).repeat(2, 0).repeat(2, 1),
    )


def test_wide_pictures_lie_in_rows():
    wide = Image.new("RGB", (40, 30), (255, 0, 0))
    example = transforms.same(
        wide, np.random.default_rng(0), size=16, mirror=False, rows=(2, 14)
    )
    image = example["image"]
    np.testing.assert_array_equal(image[2:14, 3], np.tile([1, -1, -1], (12, 1)))
    assert (image[:2] == -1).all() and (image[14:] == -1).all()
