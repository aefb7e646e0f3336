"""Content Subtract's mathematics: identities of the algebra, and slow formulas as oracles."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from styleloom.weights.clip_space import subtract as module
from styleloom.weights.clip_space.subtract import METHODS, Options, cosines, describe, subtract
from styleloom.weights.clip_space.towers import BIG_G, VIT_H, VIT_L, VIT_L_336, check_pair, image_tower
from styleloom.weights.errors import StyleLoomError

seeds = st.integers(0, 2**31)


def vectors(seed, *counts, n=24):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(count, n, generator=g) for count in counts]


def plain(method, **options):
    return Options(method, **({"gap_correction": False, "one_sided": False} | options))


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0, 3))
def test_instantstyle_is_the_published_difference(seed, strength):
    z, t = vectors(seed, 3, 1)
    due = z.double() - strength * t.double()
    for options in (Options("instantstyle", strength), plain("instantstyle", strength=strength)):
        assert torch.equal(subtract(z, t, options, neutral=t), due.float())


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_rejection_leaves_nothing_of_the_direction(seed):
    z, t = vectors(seed, 3, 1)
    z, t = z.double(), t.double()
    made = subtract(z, t, plain("rejection"))
    assert float(cosines(made, t).abs().max()) < 1e-12
    # The part that was taken is along t, and Pythagoras holds.
    taken = z - made
    assert torch.allclose(taken.norm(dim=1) ** 2 + made.norm(dim=1) ** 2, z.norm(dim=1) ** 2)
    assert torch.allclose(cosines(taken, t).abs(), torch.ones(3, 1, dtype=torch.float64))
    half = subtract(z, t, plain("rejection", strength=0.5))
    assert torch.allclose(half, (z + made) / 2)
    assert torch.allclose(subtract(z, 7 * t, plain("rejection")), made), "the length of a text's vector does not count"


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5))
def test_subspace_removes_every_concept_and_nothing_else(seed, count):
    z, t, other = vectors(seed, 2, count, 1)
    z, t = z.double(), t.double()
    t = torch.cat([t, t[:1] * 2])  # a concept said twice counts once
    made = subtract(z, t, plain("subspace"))
    assert float(cosines(made, t).abs().max()) < 1e-9
    q = torch.linalg.qr(t[:count].T).Q
    assert torch.allclose(made, z - (z @ q) @ q.T)
    apart = other.double() - (other.double() @ q) @ q.T
    assert torch.allclose(made @ apart.T, z @ apart.T)


def test_one_concept_is_the_same_for_all_projections():
    z, t = vectors(1, 2, 1)
    made = [subtract(z, t, plain(method)) for method in ("rejection", "subspace", "concept bank")]
    assert all(torch.allclose(m, made[0], atol=1e-6) for m in made)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_a_bank_keeps_what_its_phrases_share(seed):
    """Phrases are one concept plus a little of their own: nearly all of the concept goes, little of the rest."""
    z, concept, own = vectors(seed, 2, 1, 40, n=64)
    phrases = concept + 0.05 * own
    made = subtract(z, phrases, plain("concept bank"))
    assert float(cosines(made, concept).abs().max()) < 0.05
    u, s, v = torch.linalg.svd((phrases / phrases.norm(dim=1, keepdim=True)).double(), full_matrices=False)
    rank = next(r for r in range(1, 41) if (s[:r] ** 2).sum() >= 0.9 * (s**2).sum())
    assert torch.allclose(made.double(), z.double() - z.double() @ v[:rank].T @ v[:rank], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(["rejection", "subspace", "concept bank"]))
def test_one_sided_never_adds_the_opposite(seed, method):
    z, t = vectors(seed, 4, 1 if method == "rejection" else 3)
    two, one = (subtract(z, t, plain(method, one_sided=side)).double() for side in (False, True))
    if method == "rejection":
        away = (z @ t.T).flatten() <= 0
        assert torch.equal(one[away], z[away].double())
        assert torch.allclose(one[~away], two[~away])
    # Taken apart, what was removed has no negative share of any direction.
    if method == "subspace":
        shares = (z.double() - one) @ torch.linalg.pinv(t.double())
        assert float(shares.min()) > -1e-6


def test_gap_correction_moves_the_direction_and_not_the_picture():
    z, t, gap, neutral = vectors(3, 2, 2, 1, 4)
    shifted = subtract(z, t + gap, Options("subspace", 1.0, True, False), neutral=neutral + gap)
    assert torch.allclose(shifted, subtract(z, t, Options("subspace", 1.0, True, False), neutral=neutral), atol=1e-5)
    due = subtract(z, t - neutral.mean(0), plain("subspace"))
    assert torch.allclose(subtract(z, t, Options("subspace", 1.0, True, False), neutral=neutral), due, atol=1e-6)
    with pytest.raises(StyleLoomError, match="no direction"):
        subtract(z, neutral.mean(0, keepdim=True), Options("rejection"), neutral=neutral)


@pytest.mark.parametrize("method", METHODS)
def test_protected_words_stay(method):
    z, t, style = vectors(4, 2, 2, 3)
    made = subtract(z, t, plain(method), protect=style)
    if not method.startswith("mask"):
        assert torch.allclose(made @ style.T, z @ style.T, atol=1e-4), "the picture's products with the style words"
        assert not torch.allclose(made, z, atol=0.1)
    with pytest.raises(StyleLoomError, match="protect names too"):
        subtract(z, style[:1] * 3, plain(method), protect=style)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_mask_takes_the_largest_products(seed):
    z, t = vectors(seed, 2, 1, n=20)
    made = subtract(z, t, plain("mask (top fifth)"))
    for row, new in zip(z, made):
        top = (row * t[0]).argsort(descending=True)[:4]
        due = row.clone()
        due[top] = 0
        assert torch.equal(new, due)
    made = subtract(z, t, plain("mask (2-means)"))
    for row, new in zip(z, made):
        p = (row / row.norm()).double() * (t[0] / t[0].norm()).double()
        # Every way to cut the sorted numbers in two, by its definition.
        order = p.sort()[0]
        cuts = [order[i] for i in range(1, 20)]
        spread = [sum(float(((part - part.mean()) ** 2).sum()) for part in (p[p < cut], p[p >= cut])) for cut in cuts]
        best = cuts[min(range(len(cuts)), key=spread.__getitem__)]
        assert torch.equal(new == 0, p >= best)


def test_two_means_is_the_best_of_all_partitions():
    p = torch.randn(9, generator=torch.Generator().manual_seed(1)).double()
    chosen = module._upper_cluster(p)

    def spread(members):
        return sum(float(((p[m] - p[m].mean()) ** 2).sum()) for m in (members, ~members))

    every = [torch.tensor(bits) for bits in itertools.product([True, False], repeat=9) if 0 < sum(bits) < 9]
    assert spread(chosen) == pytest.approx(min(map(spread, every)))
    assert p[chosen].min() > p[~chosen].max()


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(METHODS), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_strength_zero_and_renormalise(seed, method, dtype):
    z, t, neutral = vectors(seed, 3, 2, 4)
    z = z.to(dtype)
    assert torch.equal(subtract(z, t, Options(method, 0.0), neutral=neutral), z)
    made = subtract(z, t, Options(method, 0.8, renormalise=True), neutral=neutral)
    assert made.dtype == dtype
    assert torch.allclose(made.float().norm(dim=1), z.float().norm(dim=1), rtol=1e-2)


def test_what_cannot_be_is_refused():
    z, t = vectors(0, 2, 1)
    with pytest.raises(StyleLoomError, match="vectors of one length"):
        subtract(z, t[:, :-1], plain("rejection"))
    with pytest.raises(StyleLoomError, match="method is"):
        subtract(z, t, plain("magic"))
    with pytest.raises(StyleLoomError, match="not finite"):
        subtract(z * float("nan"), t, plain("instantstyle"))


def test_the_report_has_the_numbers():
    z, t = vectors(0, 2, 2)
    options = Options("mask (top fifth)", 0.5)
    changed = subtract(z, t, options)
    text = describe(z, changed, t, ["a cat", "a hat"], options, "ViT-bigG and OpenCLIP bigG text")
    before = float(torch.nn.functional.cosine_similarity(z[1], t[0], dim=0))
    assert f"cosine to “a cat”: {before:+.3f} →" in text and "method: mask (top fifth) at strength 0.5" in text
    assert f"norm {float(z[0].norm()):.3f} → {float(changed[0].norm()):.3f}" in text
    assert "gap_correction and one_sided do not count" in text and "ViT-bigG" in text


# --- towers


def sizes(tower):
    return tower.hidden, tower.projection, tower.tokens


G_TEXT, H_TEXT, L_TEXT = (1280, 32), (1024, 24), (768, 12)


@pytest.mark.parametrize(("image", "text", "projected"), [
    (BIG_G, G_TEXT, 1280), (VIT_H, H_TEXT, 1024), (VIT_H, (1024, 23), 1024), (VIT_L, L_TEXT, 768)])  # fmt: skip
def test_towers_that_were_trained_together(image, text, projected):
    assert image.name in check_pair(sizes(image), text, projected)


@pytest.mark.parametrize(("image", "text", "projected", "words"), [
    (VIT_H, G_TEXT, 1280, "ViT-H text"),
    (BIG_G, H_TEXT, 1024, "SDXL checkpoint"),
    (VIT_L_336, L_TEXT, 768, "ViT-L-336"),  # one length, and not one training
    (VIT_L, (768, 24), 768, "width 768 with 24 layers"),
    (None, G_TEXT, 1280, "width 1000"),
    (None, (640, 10), 640, "1280 numbers long and the text vectors of clip are 640"),
])  # fmt: skip
def test_towers_that_were_not(image, text, projected, words):
    with pytest.raises(StyleLoomError, match=words):
        check_pair(sizes(image) if image else (1000, 1280, 257), text, projected)


def test_an_unknown_pair_is_said_to_be_unknown():
    assert "only their sizes agree" in check_pair((64, 48, 257), (48, 32), 48)
    assert image_tower(*sizes(VIT_L)) is VIT_L and image_tower(1664, 1280, 256) is None


def test_the_known_text_towers_by_their_sizes():
    """Widths and layers as in the publishers' configurations: OpenAI CLIP-L, OpenCLIP ViT-H and ViT-bigG."""
    from styleloom.weights.clip_space.towers import text_tower

    for sizes in ((768, 12), (1024, 24), (1024, 23), (1280, 32)):
        assert text_tower(*sizes) is not None, sizes
    assert text_tower(768, 13) is None and text_tower(768, 24) is None
