"""Redux by Blocks on FLUX.1: against the host's own Apply Style Model, and a forward in float64 with masks."""

from __future__ import annotations

import copy
import logging
import math

import flux_oracle as oracle
import pytest
import torch

SIGMA, TEXT, PATCHES, WIDTH = 0.7, 5, 16, 24
BOUND = 2e-6  # as in test_style_flux.py: 57 blocks in float32


@pytest.fixture(scope="module")
def flux(kit):
    return kit.dit_models.flux1_small(seed=1)


@pytest.fixture(scope="module")
def redux(host):
    """A Redux as the host opens it, at small width; its tokens are as loud as text."""
    made = host.comfy.ldm.flux.redux.ReduxImageEncoder(redux_dim=144, txt_in_features=WIDTH, dtype=torch.float32)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5))
    made.requires_grad_(False)
    return host.comfy.sd.StyleModel(made)


@pytest.fixture(scope="module")
def pictures(kit, run_node):
    vision, made = kit.vision.siglip_small(), {}

    def encoded(seed=1, count=1):
        if (seed, count) not in made:
            image = torch.rand(count, 40, 64, 3, generator=torch.Generator().manual_seed(seed))
            made[seed, count] = run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image)[0]
        return made[seed, count]

    return encoded


@pytest.fixture(scope="module")
def prompts(kit):
    """Positive and negative, of different lengths."""
    g = torch.Generator().manual_seed(7)
    made = [(torch.randn(1, n, WIDTH, generator=g), torch.randn(1, kit.dit_models.FLUX1_POOLED, generator=g))
            for n in (TEXT, TEXT + 2)]  # fmt: skip
    return [[[text, {"pooled_output": pooled, "guidance": 3.5}]] for text, pooled in made]


@pytest.fixture(scope="module")
def apply(run_node, flux, redux, pictures, prompts):
    def applied(preset="style", strength=1.0, model=None, conditioning=None, picture=None, style_model=None, **more):
        return run_node("StyleLoomReduxBlocks", model=model or flux, conditioning=conditioning or prompts[0],
                        style_model=style_model or redux, clip_vision_output=picture or pictures(),
                        strength=strength, preset=preset, **more)  # fmt: skip

    return applied


@pytest.fixture(scope="module")
def by_host(run_node, redux, pictures, prompts):
    def applied(strength=1.0, kind="multiply", conditioning=None, count=1):
        return run_node("StyleModelApply", conditioning=conditioning or prompts[0], style_model=redux,
                        clip_vision_output=pictures(1, count), strength=strength, strength_type=kind)[0]  # fmt: skip

    return applied


def call(model, context, **extra):
    """One call of the model; context: (rows, text, width), on the positive side in the last row."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, *size, generator=g).repeat(len(context), *[1] * len(size)) for size in ((16, 8, 12), (12,)))
    options = {**model.model_options["transformer_options"], "cond_or_uncond": [1, 0][-len(context):]}
    options["wrappers"] = {kind: {key: list(w) for key, w in named.items()} for kind, named in model.wrappers.items()}
    with torch.inference_mode():
        out = model.model.apply_model(x, torch.full((len(x),), SIGMA), c_crossattn=context, y=y,
                                      guidance=torch.full((len(x),), 3.5), transformer_options=options, **extra)  # fmt: skip
    return x, y, out


def due(flux, context, made, seen, places, also=0.0):
    """The float64 forward in which block (kind, i) sees the tokens at `places` of the last row in the strength
    seen(kind, i). places: (first, end). also: a mask that is there already."""
    x, y, _ = made
    n = context.shape[1] + 24

    def bias(kind, i):
        b = torch.zeros(len(x), 1, n, n, dtype=torch.float64)
        strength, (first, end) = seen(kind, i), places
        b[-1, :, :, first:end] = math.log(strength) if strength else -math.inf
        b[-1, :, first:end, first:end] = 0.0
        return b + also

    t = torch.full((len(x),), SIGMA)
    with torch.inference_mode():
        out = oracle.forward(flux.model.diffusion_model, x, t, context, y, torch.full((len(x),), 3.5), bias=bias)
    return x.double() - SIGMA * out


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def both_sides(conditioning):
    """A negative row of the same length, with other text in every place."""
    text = conditioning[0][0]
    return torch.cat([torch.randn(text.shape, generator=torch.Generator().manual_seed(9)), text])


def sample(run_node, model, positive, negative):
    return run_node("KSampler", model=model, seed=1, steps=1, cfg=3.0, sampler_name="euler", scheduler="simple",
                    positive=positive, negative=negative, latent_image={"samples": torch.zeros(1, 16, 8, 8)},
                    denoise=1.0)[0]["samples"]  # fmt: skip


STYLE = (TEXT, TEXT + PATCHES)


def test_all_blocks_are_the_hosts_own_node(flux, apply, by_host, prompts):
    model, made, report = apply("all")
    assert model is flux and torch.equal(made[0][0], by_host()[0][0]) and made[0][1] == prompts[0][0][1]
    assert "16 tokens of 1 picture behind" in report and "seen in 57 of 57 blocks" in report
    assert prompts[0][0][0].shape[1] == TEXT, "the conditioning that was given is as it was"


def test_strength_is_the_hosts_attn_bias(run_node, flux, apply, by_host, prompts):
    """Whose mask is float16: its log of a half is off by up to 2^-12, and so are the scores."""
    patched, made, _ = apply("all", 0.5)
    ours, host, plain = (sample(run_node, model, positive, prompts[1]) for model, positive in (
        (patched, made), (flux, by_host(0.5, "attn_bias")), (flux, made)))  # fmt: skip
    assert distance(ours, host) < 1e-3 < 1e-2 < distance(ours, plain)


@pytest.mark.parametrize(("preset", "more", "seen"), [
    ("style", {}, lambda kind, i: 1.0 if kind == "single" and i >= 10 else 0.0),
    ("layout", {"strength": 2.0}, lambda kind, i: 2.0 if kind == "single" and i < 10 else 0.0),
    ("custom", {"strength": 0.5, "block_weights": "double 3-5: 1, single 20: 2, single 30: 0.5"},
     lambda kind, i: {("double", 3): 0.5, ("double", 4): 0.5, ("double", 5): 0.5, ("single", 20): 1.0,
                      ("single", 30): 0.25}.get((kind, i), 0.0)),
])  # fmt: skip
def test_chosen_blocks_with_both_sides_in_one_batch(preset, more, seen, flux, apply):
    patched, made, _ = apply(preset, **more)
    context = both_sides(made)
    ours, plain = call(patched, context), call(flux, context)
    assert distance(ours[2], due(flux, context, ours, seen, STYLE)) < BOUND
    assert torch.equal(plain[2], call(flux, context)[2]) and distance(ours[2][1], plain[2][1]) > 1e-2
    assert distance(ours[2][0], plain[2][0]) < BOUND, "the negative side has no tokens of the picture"


def test_strength_zero_is_the_prompt_alone(run_node, flux, apply, prompts):
    """In the host's sampler, with prompts of different lengths."""
    patched, made, report = apply("all", 0.0)
    assert "seen in 0 of 57 blocks" in report and "not at all: double 0-18, single 0-37" in report
    assert distance(sample(run_node, patched, made, prompts[1]), sample(run_node, flux, *prompts)) < BOUND
    seen = sample(run_node, apply("style")[0], made, prompts[1])
    assert distance(seen, sample(run_node, flux, *prompts)) > 1e-2


def test_two_pictures_with_blocks_of_their_own(flux, apply, pictures):
    first, made, _ = apply("style")
    both, made, _ = apply("layout", model=first, conditioning=made, picture=pictures(2))
    context = made[0][0]
    ours = call(both, context)
    later = torch.zeros(1, 1, *[TEXT + 2 * PATCHES + 24] * 2, dtype=torch.float64)
    x, y, _ = ours

    def bias(kind, i):
        b = later.clone()
        for (start, end), here in ((STYLE, kind == "single" and i >= 10),
                                   ((TEXT + PATCHES, TEXT + 2 * PATCHES), kind == "single" and i < 10)):  # fmt: skip
            if not here:
                b[..., start:end] = -math.inf
        for start in (TEXT, TEXT + PATCHES):  # own queries; the other picture's are like any other
            own = slice(start, start + PATCHES)
            b[..., own, own] = 0.0
        return b

    with torch.inference_mode():
        out = oracle.forward(flux.model.diffusion_model, x, torch.full((1,), SIGMA), context, y, torch.full((1,), 3.5),
                             bias=bias)  # fmt: skip
    assert distance(ours[2], x.double() - SIGMA * out) < BOUND
    with pytest.raises(ValueError, match="this picture from this style model already"):
        apply("layout", conditioning=made)


def test_a_batch_is_several_pictures(apply, by_host, pictures):
    made, report = apply("style", picture=pictures(1, 2))[1:]
    assert torch.equal(made[0][0], by_host(count=2)[0][0]) and "32 tokens of 2 pictures" in report


@pytest.mark.parametrize("kind", ["bias", "bool"])
def test_a_mask_that_is_there(kind, flux, apply, by_host, prompts):
    """As the host widens it; in the call ours comes on top of it."""
    free = torch.rand(1, TEXT + 1, TEXT + 1, generator=torch.Generator().manual_seed(2)) < 0.7
    free |= torch.eye(TEXT + 1, dtype=torch.bool)
    mask = free if kind == "bool" else torch.where(free, 0.0, -2.0).half()
    given = [[prompts[0][0][0], {**prompts[0][0][1], "attention_mask": mask, "attention_mask_img_shape": (1, 1)}]]
    patched, made, _ = apply("style", conditioning=given)
    host = by_host(conditioning=given)
    assert torch.equal(made[0][1]["attention_mask"], host[0][1]["attention_mask"])
    assert given[0][1]["attention_mask"] is mask
    there = torch.zeros(1, *[TEXT + PATCHES + 24] * 2)
    there[:, 3:, :2] = -3.0
    ours = call(patched, made[0][0], attention_mask=there)
    seen = due(flux, made[0][0], ours, lambda k, i: float(k == "single" and i >= 10), STYLE, there[:, None].double())
    assert distance(ours[2], seen) < BOUND


def test_it_runs_around_another_nodes_block(flux, apply):
    seen, shown = [], flux.clone()

    def watch(args, extra):
        seen.append(args["attn_mask"])
        return extra["original_block"](args)

    shown.set_model_patch_replace(watch, "dit", "double_block", 3)
    patched, made, _ = apply("style")
    ours = call(apply("style", model=shown)[0], made[0][0])[2]
    assert torch.equal(ours, call(patched, made[0][0])[2]) and len(seen) == 1


def test_a_conditioning_that_is_not_used_is_said(run_node, flux, apply, prompts, caplog):
    patched, made, _ = apply("style")
    with caplog.at_level(logging.WARNING):
        alone = sample(run_node, patched, *prompts)
        assert caplog.text.count("nothing was restricted") == 1
    assert torch.equal(alone, sample(run_node, flux, *prompts))
    caplog.clear()
    sample(run_node, patched, made, prompts[1])
    assert "nothing was restricted" not in caplog.text


def test_what_does_not_fit_is_refused(host, kit, apply, models, encode, pictures, redux, prompts):
    subtracted = copy.copy(pictures())
    subtracted["styleloom_subtracted"] = "a cat"
    wide = host.comfy.sd.StyleModel(host.comfy.ldm.flux.redux.ReduxImageEncoder(144, 32, dtype=torch.float32))
    compiled, made, _ = apply("style")
    kind = host.comfy.patcher_extension.WrappersMP.APPLY_MODEL
    compiled.add_wrapper_with_key(kind, "torch.compile", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    shorter = apply("style")[0]
    shorter.set_model_patch(lambda d: {**d, "txt": d["txt"][:, 1:], "txt_ids": d["txt_ids"][:, 1:]}, "post_input")
    for words, make in (
        ("model is SDXL", lambda: apply(model=models["sdxl"][0])),
        ("2 double, 38 single", lambda: apply(model=kit.dit_models.flux1_small(depth=2))),
        ("patches of width 64", lambda: apply(picture=encode(1))),
        ("Content Subtract", lambda: apply(picture=subtracted)),
        ("tokens of width 32", lambda: apply(style_model=wide)),
        ("block_weights is empty", lambda: apply("custom")),
        ("less than nothing", lambda: apply("custom", block_weights="single 3: -1")),
        ("preset is precise", lambda: apply("precise style")),
        ("model is compiled", lambda: call(compiled, made[0][0])),
        ("20 tokens of text", lambda: call(shorter, made[0][0])),
    ):
        with pytest.raises(ValueError, match=words) as error:
            make()
        assert "Expected: " in str(error.value) and "What to do: " in str(error.value)
