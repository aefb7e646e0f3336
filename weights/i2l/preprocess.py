"""Pictures as the image encoders of Image-to-LoRA were given them.

Both encoders see the same square crop of 1024 pixels, made by PIL on 8-bit values, and shrink it each in its
own way. PIL (which the host brings) is used because the published embeddings are of its rounding: resizing
in floats, or in one step, gives other numbers.

PIL resizes in two passes, each rounded to 8 bits: along the rows and then along the columns, when the
predictors were made. Since Pillow 13 a picture that gets flatter may be done in the other order, which moves
up to a tenth of the values by one. So the two passes are asked for one by one here.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import StyleLoomError

CROP = 1024
SIGLIP_SIDE = 384
DINO_SIDE = 224
# The picture model of the Qwen-Image residual sees patches of 14 pixels in pairs: 1024 becomes 37·28.
COARSE_SIDE = 224
FINE_SIDE = 1036
DINO_MEAN = (0.485, 0.456, 0.406)
DINO_STD = (0.229, 0.224, 0.225)
# Beyond this the crop is under a hundredth of the picture, enlarged to memory sizes.
MAX_RATIO = 100
_STRIP = 1 << 24  # pixels at most of an enlarged picture that are in memory at once
_ROWS = 1 << 22  # values at most of a float picture that are converted at once


def to_uint8(image: torch.Tensor, name: str = "The image") -> np.ndarray:
    """One picture of the host, (height, width, channels) with 0…1 floats → uint8 (height, width, 3).

    Values beyond 0…1 are clamped; k/255 gives exactly k. One channel (grey) is repeated, a fourth (alpha) is
    dropped, as the host's own image loading does.

    Raises:
        StyleLoomError: another rank or number of channels, no pixels, a value that is not finite, or sides
            that differ more than 100-fold.
    """
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise StyleLoomError(
            f"{name} has the shape {tuple(image.shape)}.",
            "(height, width, channels) with 1, 3 or 4 channels and at least one pixel",
            "Give images as Load Image makes them.",
        )
    height, width, channels = image.shape
    if max(height, width) > MAX_RATIO * min(height, width):
        raise StyleLoomError(
            f"{name} is {width} by {height} pixels.",
            f"sides that differ at most {MAX_RATIO}-fold: the encoders see a square crop of the middle",
            "Crop the image to the part whose style is wanted.",
        )
    if channels == 4:
        image = image[..., :3]
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    step = max(1, _ROWS // (3 * width))
    for top in range(0, height, step):  # in parts: a picture of 8192² is 800 MB as floats
        part = image[top : top + step].to(device="cpu", dtype=torch.float32)
        if not torch.isfinite(part).all():
            raise StyleLoomError(
                f"{name} has values that are not finite.",
                "numbers from 0 to 1",
                "Look at the node that made the image: it computed NaN or infinity.",
            )
        pixels[top : top + step] = (part * 255.0).round_().clamp_(0, 255).to(torch.uint8).numpy()
    return pixels


def _along_rows(image: Image.Image, width: int, resample=Image.Resampling.BILINEAR) -> Image.Image:
    return image.resize((width, image.height), resample)


def _along_columns(image: Image.Image, height: int, resample=Image.Resampling.BILINEAR) -> Image.Image:
    return image.resize((image.width, height), resample)


def crop_and_resize(pixels: np.ndarray, side: int) -> np.ndarray:
    """The centre square of uint8 (height, width, 3), its short side made `side`: uint8 (side, side, 3).

    As published: the whole picture is resized by max(side/width, side/height) with PIL's bilinear filter, up
    or down, sizes rounded to even, and then cropped around the middle. Cropping between the two passes, and
    doing the second in strips, gives the same bits without holding a long enlarged picture.
    """
    height, width, _ = pixels.shape
    scale = max(side / width, side / height)
    new_height, new_width = round(height * scale), round(width * scale)
    top, left = round((new_height - side) / 2), round((new_width - side) / 2)
    rows = _along_rows(Image.fromarray(pixels), new_width).crop((left, 0, left + side, height))
    result = Image.new("RGB", (side, side))
    step = max(1, min(side, _STRIP // new_height))
    for x in range(0, side, step):
        strip = _along_columns(rows.crop((x, 0, min(x + step, side), height)), new_height)
        result.paste(strip.crop((0, top, strip.width, top + side)), (x, 0))
    return np.asarray(result)


def crop_1024(pixels: np.ndarray) -> np.ndarray:
    """The crop that both encoders start from: uint8 (height, width, 3) → uint8 (1024, 1024, 3)."""
    return crop_and_resize(pixels, CROP)


def _check_crop(crop: np.ndarray) -> None:
    if crop.shape != (CROP, CROP, 3) or crop.dtype != np.uint8:
        raise StyleLoomError(
            f"Pixels of shape {crop.shape} and type {crop.dtype} were given for an encoder.",
            f"the 8-bit crop of ({CROP}, {CROP}, 3)",
            "Make it with preprocess.crop_1024.",
        )


def siglip_pixels(crop: np.ndarray) -> torch.Tensor:
    """What SigLIP2 sees of the 1024 crop: fp32 (3, 384, 384), PIL bilinear in 8 bits, then -1…1."""
    _check_crop(crop)
    small = _along_columns(_along_rows(Image.fromarray(crop), SIGLIP_SIDE), SIGLIP_SIDE)
    values = (np.asarray(small) * (1 / 255)).astype(np.float32)
    values = (values - np.float32(0.5)) / np.float32(0.5)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def dino_pixels(crop: np.ndarray) -> torch.Tensor:
    """What DINOv3 sees of the 1024 crop: fp32 (3, 224, 224).

    Here the published order is other: to 0…1 first, then an antialiased bilinear resize in floats, then the
    mean and deviation of ImageNet.
    """
    _check_crop(crop)
    values = torch.from_numpy(crop.transpose(2, 0, 1).copy()) * (1 / 255)
    small = F.interpolate(
        values[None], size=(DINO_SIDE, DINO_SIDE), mode="bilinear", antialias=True, align_corners=False
    )[0]
    mean = torch.tensor(DINO_MEAN)[:, None, None]
    deviation = torch.tensor(DINO_STD)[:, None, None]
    return (small - mean) / deviation


def residual_image(pixels: np.ndarray, kind: str) -> np.ndarray:
    """What the text encoder of Qwen-Image sees for the residual of a Coarse or Fine predictor.

    Args:
        pixels: uint8 (height, width, 3).
        kind: "coarse" (224 pixels) or "fine" (1024 pixels, brought to 1036 with PIL's bicubic filter).

    Returns:
        uint8 (224, 224, 3) or (1036, 1036, 3): sizes that the picture model takes without resizing, since
        the host's own resizing there has no antialiasing.
    """
    if kind == "coarse":
        return crop_and_resize(pixels, COARSE_SIDE)
    if kind == "fine":
        cubic = Image.Resampling.BICUBIC
        rows = _along_rows(Image.fromarray(crop_1024(pixels)), FINE_SIDE, cubic)
        return np.asarray(_along_columns(rows, FINE_SIDE, cubic))
    raise StyleLoomError(f"Unknown residual {kind!r}.", '"coarse" or "fine"', "Choose one of the two.")


def image_hash(pixels: np.ndarray) -> str:
    """SHA-256 (hex) of a picture: its width and height and its 8-bit RGB values, row by row."""
    height, width, _ = pixels.shape
    digest = hashlib.sha256(f"{width}x{height}\n".encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()
