"""Encodings as files, pictures of noise, weights over frames."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.ip_adapter.encodings import Encoding, load_encoding, save_encoding
from styleloom.weights.ip_adapter.noise_pictures import KINDS, SIDE, gaussian_blur, noise_picture
from styleloom.weights.ip_adapter.weight_curves import TIMINGS, as_text, complement, cross_fade, weight_curve
from styleloom.weights.tensor_file import read_header, write_tensor_file


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- files


@settings(deadline=None, max_examples=10)
@given(count=st.integers(1, 3), parts=st.sampled_from(["both", "embeds", "hidden", "empty"]), note=st.text(max_size=20),
       dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))  # fmt: skip
def test_what_is_saved_is_loaded(tmp_path_factory, count, parts, note, dtype):
    embeds = draw(1, count, 4).to(dtype) if parts != "hidden" else None
    hidden = draw(2, count, 3, 5).to(dtype) if parts != "embeds" else None
    empty = draw(3, 1, 3, 5) if parts == "empty" else None
    path = tmp_path_factory.mktemp("encodings") / "one.safetensors"
    save_encoding(path, Encoding(embeds, hidden, empty, note))
    made = load_encoding(path)
    for a, b in ((made.embeds, embeds), (made.hidden, hidden), (made.empty, empty)):
        assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype)
    assert made.subtracted == note and len(made) == count


def test_the_header_names_the_encoder(tmp_path):
    path = tmp_path / "h.safetensors"
    save_encoding(path, Encoding(torch.zeros(1, 1024), torch.zeros(1, 257, 1280)))
    metadata = read_header(path).metadata
    assert metadata["styleloom.style_encoding.encoder"] == "ViT-H" and metadata["styleloom.style_encoding"] == "1"
    assert Encoding(draw(1, 1, 4), draw(2, 1, 3, 5)).encoder == "an encoder of width 5, 4 projected, 3 tokens"


@pytest.mark.parametrize(("shape", "field"), [((2, 8), "embeds"), ((2, 3, 8), "hidden")])
def test_files_of_the_other_pack(tmp_path, shape, field):
    path = tmp_path / "x.ipadpt"
    torch.save(draw(1, *shape), path)
    made = load_encoding(path)
    assert torch.equal(getattr(made, field), draw(1, *shape)) and made.empty is None


class Harmful:
    def __reduce__(self):
        return print, ("this code came out of a file",)


@pytest.mark.parametrize("content", [{"a": 1}, torch.zeros(3), Harmful(), b"no pickle"], ids=str)
def test_other_files_are_refused(tmp_path, content, capsys):
    path = tmp_path / "x.ipadpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(StyleLoomError, match="x.ipadpt: it "):
        load_encoding(path)
    assert "came out" not in capsys.readouterr().out


FORMAT = {"styleloom.style_encoding": "1"}


@pytest.mark.parametrize(("tensors", "metadata", "words"), [
    ({"image_embeds": torch.zeros(1, 4)}, {}, "does not say that it is one"),
    ({"image_embeds": torch.zeros(1, 4), "x": torch.zeros(1)}, FORMAT, "it holds x"),
    ({"image_embeds": torch.zeros(1, 4)}, {"styleloom.style_encoding": "2"}, "format version 2"),
    ({"image_embeds": torch.zeros(4)}, FORMAT, r"'image_embeds' is \[4\]"),
    ({"image_embeds": torch.full((1, 4), math.nan)}, FORMAT, "NaN"),
    ({"image_embeds": torch.zeros(1, 4), "penultimate_hidden_states": torch.zeros(2, 3, 4)}, FORMAT, "1 pictures"),
    ({"empty": torch.zeros(1, 3, 4)}, FORMAT, "neither"),
    ({"penultimate_hidden_states": torch.zeros(1, 3, 4), "empty": torch.zeros(1, 2, 4)}, FORMAT, "does not go with"),
])  # fmt: skip
def test_damaged_files_are_named(tmp_path, tensors, metadata, words):
    path = tmp_path / "bad.safetensors"
    write_tensor_file(path, tensors, metadata)
    with pytest.raises(StyleLoomError, match=words):
        load_encoding(path)


# --- noise

PICTURE = torch.rand(2, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_of_its_seed(kind):
    random = torch.random.get_rng_state()
    made = noise_picture(PICTURE, kind, 0.6, 0, 7)
    assert made.shape == PICTURE.shape and 0 <= float(made.min()) and float(made.max()) <= 1
    assert torch.equal(made, noise_picture(PICTURE, kind, 0.6, 0, 7))
    assert not torch.equal(made, noise_picture(PICTURE, kind, 0.6, 0, 8))
    assert torch.equal(random, torch.random.get_rng_state()), "nobody else's random numbers are touched"
    assert noise_picture(torch.rand(1, 300, 500, 4), kind, 1.0, 5, 0).shape == (1, SIDE, SIDE, 3)
    assert noise_picture(None, kind, 1.0, 0, 0).shape == (1, SIDE, SIDE, 3)


def test_kinds_of_noise():
    x = PICTURE.movedim(-1, 1)

    def uniform(seed):
        g = torch.Generator().manual_seed(seed)
        return torch.rand(x.shape, generator=g).movedim(1, -1), torch.rand(x.shape, generator=g).movedim(1, -1)

    first, second = uniform(7)
    normal = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).movedim(1, -1)
    assert torch.allclose(noise_picture(PICTURE, "fade", 0.3, 0, 7), 0.7 * PICTURE + 0.3 * first, atol=1e-6)
    assert torch.equal(noise_picture(PICTURE, "dissolve", 0.3, 0, 7), torch.where(first < 0.3, second, PICTURE))
    assert torch.allclose(noise_picture(PICTURE, "gaussian", 0.3, 0, 7), (PICTURE + 0.3 * normal).clamp(0, 1), atol=1e-6)
    smooth = torch.linspace(0, 1, SIDE).expand(1, SIDE, SIDE)[..., None].expand(-1, -1, -1, 3)
    moved = noise_picture(smooth, "shuffle", 0.0, 0, 7)[:, 40:-40, 40:-40]
    # At strength 0 there is no noise and pixels go 37 at most, smoothed to a few: the picture turned left to right.
    assert float((moved - smooth.flip(2)[:, 40:-40, 40:-40]).abs().max()) < 38 / SIDE
    with pytest.raises(StyleLoomError, match="kind is 'x'"):
        noise_picture(None, "x", 1, 0, 0)


def test_blur_is_the_sum_over_neighbours():
    x = draw(5, 1, 2, 12, 11)
    made, side, sigma = gaussian_blur(x, 5, 1.3), 5, 1.3
    kernel = [math.exp(-((i - 2) ** 2) / (2 * sigma**2)) for i in range(side)]
    kernel = [k / sum(kernel) for k in kernel]

    def mirrored(i, n):
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    for c, i, j in ((0, 0, 0), (1, 6, 5), (0, 11, 3)):
        due = sum(kernel[a] * kernel[b] * float(x[0, c, mirrored(i + a - 2, 12), mirrored(j + b - 2, 11)])
                  for a in range(side) for b in range(side))  # fmt: skip
        assert abs(float(made[0, c, i, j]) - due) < 1e-5


# --- weights over frames


def published(start, end, timing, frames, first=0, last=9999):
    """The other pack's loop for two numbers, as a formula."""
    last = min(last, frames)
    n = last - first - 1
    f = {"linear": lambda u: u, "ease in-out": lambda u: (1 - math.cos(u * math.pi)) / 2,
         "ease in": lambda u: math.sin(u * math.pi / 2), "ease out": lambda u: 1 - math.cos(u * math.pi / 2)}[timing]
    made = [start] * first + [start + (end - start) * f(i / n) for i in range(n + 1)]
    return made + [end] * (frames - last)


@pytest.mark.parametrize("timing", [t for t in TIMINGS if t not in ("custom", "random")])
def test_curves_between_two_numbers(timing):
    for frames, first, last in ((6, 0, 9999), (10, 2, 8), (2, 0, 2)):
        made = weight_curve([1.0, 0.2], timing, frames, first, last)
        assert made == pytest.approx(published(1.0, 0.2, timing, frames, first, last), abs=1e-12)


def test_further_frames_and_key_frames():
    assert weight_curve([0, 1, 0], "linear", 5) == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert weight_curve([0.5, 2], "custom", 99, before=2, after=1) == [0.5, 0.5, 0.5, 2, 2]
    assert weight_curve([3], "ease in", 2) == [3, 3] and weight_curve([1, 0], "linear", 3, 1, 2) == [1, 0, 0]
    drawn = weight_curve([2, 3], "random", 50, seed=4)
    assert all(2 <= v <= 3 for v in drawn) and drawn == weight_curve([2, 3], "random", 50, seed=4)
    assert drawn != weight_curve([2, 3], "random", 50, seed=5) and len(set(drawn)) == 50
    assert as_text([1.0, 0.333333333, -2.5]) == "1, 0.333333, -2.5"
    for numbers, options in (([], {}), ([1, 0], {"start": 5, "end": 5}), ([1, 0], {"start": 9})):
        with pytest.raises(StyleLoomError, match="weights is empty|start_frame is"):
            weight_curve(numbers, "linear", 8, **options)


def published_fade(weights, n, method):
    """The other pack's repeating and slicing of lists, on the numbers of the pictures."""
    def each(items, times):
        return [item for item in items for _ in range(times)]

    images = list(range(n))
    if method == "shift batches":
        first, second, made = images[:-1], images[1:], weights * (n - 1)
    else:
        first, second = each(images[::2], 2)[1:], each(images[1::2], 2)
        made = (weights + [max(weights) - (w - min(weights)) for w in weights]) * (len(first) // 2)
        if n % 2:
            first = first[:-1]
        else:
            second, made = second[:-1], made + weights
    return made, each(first, len(weights)), each(second, len(weights))


@pytest.mark.parametrize("method", ["shift batches", "alternate batches"])
@pytest.mark.parametrize("pictures", [2, 3, 4, 5, 6])
def test_fading_from_picture_to_picture(method, pictures):
    weights = weight_curve([1.0, 0.2], "ease in", 4)
    made, first, second = cross_fade(weights, pictures, method)
    assert (made, first, second) == published_fade(weights, pictures, method)
    other = complement(made)
    assert all(a + b == pytest.approx(1.2) for a, b in zip(made, other))
    # Where a passage ends and the next begins, the picture that is seen stays the one that is seen.
    loud = [a if w > 0.6 else b for w, a, b in zip(made, first, second)]
    assert loud == sorted(loud) and set(loud) == set(range(pictures))


def test_pictures_without_fading():
    assert cross_fade([1, 0], 2, "full batch", 1, 2) == ([1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1])
    assert cross_fade([1, 0], 3, "shift batches", 1, 1) == ([1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 2], [0, 1, 1, 2, 2, 2])
    with pytest.raises(StyleLoomError, match="image has 1 pictures"):
        cross_fade([1, 0], 1, "shift batches")
