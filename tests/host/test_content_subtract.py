"""Content Subtract in the real host: the text vectors are the host's own, the towers belong together, nothing else
of the output changes."""

from __future__ import annotations

import pytest
import torch
from style_calls import call

METHODS = ["rejection", "instantstyle", "subspace", "concept bank", "mask (top fifth)", "mask (2-means)"]


@pytest.fixture(scope="module")
def clip(models):
    return models["sdxl"][1]


@pytest.fixture(scope="module")
def remove(run_node, clip):
    def removed(style, content="a cat", method="instantstyle", strength=1.0, with_clip=None, **options):
        return run_node("StyleLoomContentSubtract", style=style, clip=with_clip or clip, content=content,
                        method=method, strength=strength, **options)  # fmt: skip

    return removed


def pooled(clip, text, **options):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=options.get("as_it_is", True))[1]


def refused(words, function, *args, **kwargs):
    with pytest.raises(ValueError, match=words) as error:
        function(*args, **kwargs)
    assert "Expected: " in str(error.value) and "What to do: " in str(error.value)
    return str(error.value)


def test_instantstyle_is_the_published_recipe(clip, encode, remove):
    """z − s · (SDXL's pooled vector of the prompt), by the host's own way to it; the negative side is untouched."""
    style = encode(1, count=2)
    made, report = remove(style, "a cat", "instantstyle", 0.6)
    due = style.image_embeds - 0.6 * pooled(clip, "a cat")
    assert torch.allclose(made.image_embeds, due, atol=1e-6)
    before = float(torch.nn.functional.cosine_similarity(style.image_embeds[:1], pooled(clip, "a cat")))
    after = float(torch.nn.functional.cosine_similarity(due[:1], pooled(clip, "a cat")))
    assert f"cosine to “a cat”: {before:+.3f} → {after:+.3f}" in report
    assert "method: instantstyle at strength 0.6" in report and "width 48" in report


def test_the_rest_is_left_alone(clip, encode, remove):
    style = encode(1)
    z, seen = style.image_embeds.clone(), pooled(clip, "a dog")
    made, _ = remove(style, "a cat\na hat", "subspace", protect="watercolour\nink")
    assert made is not style and torch.equal(style.image_embeds, z) and not torch.equal(made.image_embeds, z)
    for name in ("penultimate_hidden_states", "last_hidden_state", "styleloom_empty"):
        assert getattr(made, name) is getattr(style, name)
    assert not hasattr(style, "styleloom_subtracted")
    assert torch.equal(pooled(clip, "a dog"), seen), "the text encoder's options are as they were"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_its_defaults(method, encode, remove):
    style = encode(1, count=2)
    made, report = remove(style, "a cat\n\n  a hat ", method)
    assert made.image_embeds.shape == style.image_embeds.shape and made.image_embeds.isfinite().all()
    assert report.count("cosine to") == 4 and "picture 2: norm" in report
    same, _ = remove(style, "a cat", method, 0.0)
    assert torch.equal(same.image_embeds, style.image_embeds)


def test_gap_correction_by_the_hosts_vectors(clip, encode, remove):
    style = encode(1)
    made, _ = remove(style, "a cat", "rejection", gap_correction=True, one_sided=False)
    neutral = torch.cat([pooled(clip, text) for text in ("", "a photo", "an image", "a painting")]).double().mean(0)
    d = pooled(clip, "a cat").double()[0] - neutral
    d /= d.norm()
    z = style.image_embeds.double()
    assert torch.allclose(made.image_embeds.double(), z - (z @ d) * d, atol=1e-6)


def test_a_tower_that_hands_out_unprojected_vectors(run_node, kit, models, remove):
    """SD1.5's CLIP-L gives the raw pooled vector: it is projected by its own matrix."""
    clip = models["sd1.5"][1]
    narrow = kit.vision.clip_vision_small(0, projection=32)
    style = run_node("CLIPVisionEncode", clip_vision=narrow, image=torch.rand(1, 50, 50, 3), crop="center")[0]
    made, _ = remove(style, "a cat", with_clip=clip)
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    due = style.image_embeds - pooled(clip, "a cat", as_it_is="unprojected") @ weight.T
    assert torch.allclose(made.image_embeds, due, atol=1e-5)


@pytest.mark.parametrize(("broken", "words"), [
    (lambda w: torch.zeros_like(w), "entries of size 0"),
    (lambda w: torch.full_like(w, 1e24), "entries of size|empty rows"),
    (lambda w: w * 1e20, "entries of size"),
    (lambda w: torch.where(w > 2, w, float("nan")), "NaN or infinity"),
    (lambda w: torch.eye(len(w)), "is the identity"),
    (lambda w: torch.cat([w[:-1], w[:1] * 0]), "empty rows"),
])  # fmt: skip
def test_a_projection_that_no_file_had(broken, words, kit, encode, remove):
    clip = kit.architectures.ARCHITECTURES["sdxl"].clip(0)
    projection = clip.cond_stage_model.clip_g.transformer.text_projection
    with torch.no_grad():
        projection.weight.copy_(broken(projection.weight))
    message = refused(words, remove, encode(1), with_clip=clip)
    assert "clip_g.transformer.text_projection.weight" in message and "Load CLIP" in message


def test_towers_that_do_not_belong_together(run_node, kit, models, encode, remove):
    import comfy.clip_vision

    vit_h = comfy.clip_vision.Output()
    vit_h["image_embeds"], vit_h["penultimate_hidden_states"] = torch.ones(1, 1024), torch.ones(1, 257, 1280)
    words = refused("encoded by ViT-H, and clip has", remove, vit_h)
    assert "OpenCLIP ViT-H text" in words and "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in words
    wide = kit.vision.clip_vision_small(0, projection=40)
    style = run_node("CLIPVisionEncode", clip_vision=wide, image=torch.rand(1, 50, 50, 3), crop="center")[0]
    refused("style is 40 numbers long", remove, style)
    siglip = comfy.clip_vision.Output()
    siglip["image_embeds"], siglip["penultimate_hidden_states"] = torch.ones(1, 729, 1152), torch.ones(1, 729, 1152)
    refused("without a projected image vector", remove, siglip)
    z_image = kit.architectures.ARCHITECTURES["z-image"].clip(0)
    refused("no CLIP text tower", remove, encode(1), with_clip=z_image)


def test_words_that_cannot_be_read(encode, remove):
    refused("content is empty", remove, encode(1), " \n ")
    refused("longer than 75 tokens", remove, encode(1), "a cat " * 60)
    refused("protect names too", remove, encode(1), "a cat", protect="a cat")


def test_consumers(run_node, adapters, models, encode, remove, texts):
    """Ours and the host's take the output; a plus adapter, which would not see the change, says so."""
    style = encode(1)
    made, _ = remove(style, "a cat", "rejection")
    model = models["sdxl"][0]
    inject = lambda kind, **o: run_node(  # noqa: E731
        "StyleLoomStyleBlockInjector", model=model, ipadapter=adapters(kind, "sdxl")[0], preset="style", weight=1.0,
        **o)[0]  # fmt: skip
    patched = [inject("base", style={"style0": output}) for output in (style, made)]
    positive, negative = ([call(m, texts["sdxl"], sides=(side,)) for m in patched] for side in (0, 1))
    assert not torch.equal(*positive) and torch.equal(*negative), "the negative side stays"
    words = refused("had content subtracted, and made/plus", inject, "plus", style={"style0": made})
    assert "negative" in words
    assert inject("plus", style={"style0": style}, negative=encode(2)) is not model
    conditioning = [[torch.zeros(1, 77, 80), {}]]
    (unclip,) = run_node("unCLIPConditioning", conditioning=conditioning, clip_vision_output=made, strength=1.0,
                         noise_augmentation=0.0)  # fmt: skip
    assert unclip[0][1]["unclip_conditioning"][0]["clip_vision_output"] is made


@pytest.mark.parametrize("neutral", ["other pictures", "an empty picture"])
def test_the_content_by_a_few_pictures(neutral, encode, remove, vision, run_node):
    """Without a text encoder: away from the mean direction of pictures of the content, seen from neutral ones."""
    style, content, other = encode(1), encode(5, count=3), encode(6, count=2)
    given = {"neutral_pictures": other} if neutral == "other pictures" else {}
    made, report = run_node("StyleLoomContentSubtract", style=style, content="", method="rejection", strength=0.8,
                            content_pictures=content, one_sided=False, **given)  # fmt: skip
    with torch.inference_mode():
        empty = vision.model(pixel_values=torch.zeros(1, 3, 224, 224), intermediate_output=-2)[2]
    n = (other.image_embeds if given else empty).double().mean(0)
    towards = content.image_embeds.double() - n
    d = (towards / towards.norm(dim=1, keepdim=True)).mean(0)
    d /= d.norm()
    z = style.image_embeds.double()
    assert torch.allclose(made.image_embeds.double(), z - 0.8 * (z @ d) * d, atol=1e-6)
    assert "without a text encoder" in report and report.count("content picture") == 3
    assert torch.equal(encode(1).image_embeds, style.image_embeds)


def test_pictures_of_the_content_that_do_not_do(encode, run_node, vision, kit):
    def remove(**more):
        return run_node("StyleLoomContentSubtract", **({
            "style": encode(1), "content": "", "method": "rejection", "strength": 1.0} | more))  # fmt: skip

    assert "content_pictures" in refused("content is empty", remove)
    assert "content_pictures" in refused("clip is not connected", remove, content="a cat")
    refused("protect has words", remove, content_pictures=encode(5), protect="ink")
    core = [run_node("CLIPVisionEncode", clip_vision=vision, image=torch.rand(1, 50, 50, 3), crop="center")[0]
            for _ in range(2)]  # fmt: skip
    refused("nothing neutral", remove, style=core[0], content_pictures=core[1])
    assert remove(style=core[0], content_pictures=core[1], gap_correction=False, content="a cat")[1].endswith(
        "content does not count: content_pictures say what is taken out")  # fmt: skip
    wide = kit.vision.clip_vision_small(0, projection=40)
    other = run_node("CLIPVisionEncode", clip_vision=wide, image=torch.rand(1, 50, 50, 3), crop="center")[0]
    refused("content_pictures was encoded by another encoder", remove, content_pictures=other)
