"""Preparation of pictures: bit for bit the published one, for every size of picture."""

from __future__ import annotations

import hashlib

import numpy as np
import PIL
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.i2l import preprocess

PILLOW = int(PIL.__version__.split(".")[0])


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height, width, seed=0):
    """Something between a photograph and noise: slopes, edges and grain."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x * y) % 256], -1)
    return ((base + noise(height, width, seed)) // 2).astype(np.uint8)


def published_crop(pixels, side):
    """The formula as it is published: resize the whole picture, then crop its middle.

    In the Pillow of its time: later ones may resize the columns first (python-pillow/Pillow#9549).
    """
    pil = Image.fromarray(pixels)
    width, height = pil.size
    scale = max(side / width, side / height)
    size = round(width * scale), round(height * scale)
    if PILLOW >= 13:
        pil = pil.resize((size[0], height), Image.BILINEAR)
    pil = pil.resize(size, Image.BILINEAR)
    top, left = int(round((pil.height - side) / 2.0)), int(round((pil.width - side) / 2.0))
    return np.asarray(pil.crop((left, top, left + side, top + side)))


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), side=st.sampled_from([64, 224]))
@example(height=1, width=1, side=224)
@example(height=3, width=299, side=224)
@example(height=299, width=3, side=224)
@example(height=333, width=224, side=224)
@example(height=224, width=225, side=224)
def test_crop_is_the_published_formula(height, width, side):
    pixels = picture(height, width)
    found = preprocess.crop_and_resize(pixels, side)
    assert found.shape == (side, side, 3)
    assert np.array_equal(found, published_crop(pixels, side))


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (700, 1101), (1024, 1024), (1500, 1031), (40, 1024)])
def test_crop_of_1024(size):
    pixels = picture(*size)
    assert np.array_equal(preprocess.crop_1024(pixels), published_crop(pixels, 1024))


def test_strips_do_not_show(monkeypatch):
    """A tall picture is enlarged in strips; the width of the strips makes no difference."""
    pixels = picture(700, 30)
    want = published_crop(pixels, 224)
    for strip in (1, 5 * 5227, 223 * 5227):
        monkeypatch.setattr(preprocess, "_STRIP", strip)
        assert np.array_equal(preprocess.crop_and_resize(pixels, 224), want)


def test_long_pictures_are_taken():
    assert preprocess.crop_1024(noise(100, 1)).shape == (1024, 1024, 3)
    assert preprocess.crop_1024(noise(1, 100)).shape == (1024, 1024, 3)


def test_siglip_formula_for_every_level():
    levels = np.arange(256, dtype=np.uint8).repeat(1024 * 1024 // 256).reshape(1024, 1024, 1).repeat(3, -1)
    found = preprocess.siglip_pixels(levels)
    small = np.asarray(Image.fromarray(levels).resize((384, 384), Image.BILINEAR))
    assert len(np.unique(small)) == 256
    assert found.shape == (3, 384, 384)
    assert found.dtype == torch.float32
    want = torch.from_numpy(small / 255 * 2 - 1).permute(2, 0, 1)
    assert (found.double() - want).abs().max() < 1e-7


def test_siglip_pixels_are_those_of_transformers():
    """The processor that the predictors were trained with: the slow one, named …Pil since transformers 5."""
    name = "SiglipImageProcessorPil" if hasattr(transformers, "SiglipImageProcessorPil") else "SiglipImageProcessor"
    processor = getattr(transformers, name)(
        size={"height": 384, "width": 384}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    crop = preprocess.crop_1024(picture(600, 900))
    want = processor(images=Image.fromarray(crop), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(preprocess.siglip_pixels(crop), torch.as_tensor(want))


def test_dino_pixels_are_those_of_transformers():
    names = ("DINOv3ViTImageProcessor", "DINOv3ViTImageProcessorFast")
    processor = next(getattr(transformers, name) for name in names if hasattr(transformers, name))()
    crop = preprocess.crop_1024(picture(600, 900))
    want = processor(images=Image.fromarray(crop), return_tensors="pt")["pixel_values"][0]
    found = preprocess.dino_pixels(crop)
    assert found.shape == (3, 224, 224)
    # Both add in fp32 (2^-24), the weights of at most 12 rows and then of 12 columns, and scale and shift; the result
    # is divided by a deviation of 0.22. Pictures that were rounded to 8 bits in between lie 200 times further away.
    assert (found - want).abs().max() <= (12 + 12 + 6) * 2**-24 / 0.22


def test_dino_resizes_in_floats():
    """Rounding to 8 bits in between, as the other encoder does, would show."""
    crop = noise(1024, 1024)
    small = np.asarray(Image.fromarray(crop).resize((224, 224), Image.BILINEAR)) / 255
    rounded = (small - preprocess.DINO_MEAN) / preprocess.DINO_STD
    difference = np.abs(preprocess.dino_pixels(crop).permute(1, 2, 0).numpy() - rounded).max()
    assert 1e-3 < difference < 2e-2


@pytest.mark.parametrize("prepare", [preprocess.siglip_pixels, preprocess.dino_pixels])
def test_encoders_take_the_crop_alone(prepare):
    with pytest.raises(StyleLoomError, match=r"\(384, 384, 3\)"):
        prepare(noise(384, 384))
    with pytest.raises(StyleLoomError, match="float32"):
        prepare(np.zeros((1024, 1024, 3), dtype=np.float32))


def test_residual_images():
    pixels = picture(300, 500)
    assert np.array_equal(preprocess.residual_image(pixels, "coarse"), published_crop(pixels, 224))
    fine = Image.fromarray(published_crop(pixels, 1024)).resize((1036, 1036), Image.BICUBIC)
    assert np.array_equal(preprocess.residual_image(pixels, "fine"), np.asarray(fine))
    with pytest.raises(StyleLoomError, match="'both'"):
        preprocess.residual_image(pixels, "both")


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), rows=st.integers(1, 200))
def test_levels_survive_the_host(height, width, rows):
    pixels = noise(height, width)
    before, preprocess._ROWS = preprocess._ROWS, rows
    try:
        assert np.array_equal(preprocess.to_uint8(torch.from_numpy(pixels).float() / 255), pixels)
    finally:
        preprocess._ROWS = before


def test_values_are_rounded_and_clamped():
    values = torch.tensor([-5.0, -0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.1, 300.0])
    found = preprocess.to_uint8(values.reshape(2, 4, 1))
    assert found[..., 0].flatten().tolist() == [0, 0, 0, 0, 1, 255, 255, 255]


def test_half_precision_and_views_are_taken():
    image = torch.rand(9, 8, 3)
    assert np.array_equal(preprocess.to_uint8(image.double()), preprocess.to_uint8(image))
    assert preprocess.to_uint8(image.half()).shape == (9, 8, 3)
    turned = image.permute(1, 0, 2)
    assert np.array_equal(preprocess.to_uint8(turned), preprocess.to_uint8(image).transpose(1, 0, 2))


def test_grey_is_repeated_and_alpha_dropped():
    image = torch.rand(5, 6, 4)
    assert np.array_equal(preprocess.to_uint8(image), preprocess.to_uint8(image[..., :3]))
    grey = preprocess.to_uint8(image[..., :1])
    assert np.array_equal(grey, preprocess.to_uint8(image[..., :1].repeat(1, 1, 3)))


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4, 3), (4, 4, 2), (4, 4, 5), (0, 4, 3), (4, 0, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(StyleLoomError, match="Image 3 has the shape") as caught:
        preprocess.to_uint8(torch.zeros(shape), "Image 3")
    assert str(tuple(shape)) in caught.value.found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused(value):
    image = torch.zeros(4, 4, 3)
    image[3, 2, 1] = value
    with pytest.raises(StyleLoomError, match="not finite"):
        preprocess.to_uint8(image)


def test_extreme_ratios_are_refused():
    assert preprocess.to_uint8(torch.zeros(100, 1, 3)).shape == (100, 1, 3)
    for shape in ((101, 1, 3), (1, 8192, 3)):
        with pytest.raises(StyleLoomError, match="pixels") as caught:
            preprocess.to_uint8(torch.zeros(shape), "Image 1")
        assert f"{shape[1]} by {shape[0]}" in caught.value.found


def test_hash_is_of_pixels_and_size():
    pixels = noise(6, 10)
    assert preprocess.image_hash(pixels) == hashlib.sha256(b"10x6\n" + pixels.tobytes()).hexdigest()
    assert preprocess.image_hash(pixels) != preprocess.image_hash(pixels.reshape(10, 6, 3))
    assert preprocess.image_hash(pixels[:, ::2]) == preprocess.image_hash(pixels[:, ::2].copy())
