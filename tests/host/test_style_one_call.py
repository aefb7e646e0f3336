"""Style Block Injector in one call of the UNet, against the oracle: other replacements and overrides on its layers,
sides and batches, several references, masks, and what it leaves behind."""

from __future__ import annotations

import pytest
import style_oracle as oracle
import torch
from style_calls import SIZE, blocks, call, keys_values, plan

STYLE = [("output", 1)]


@pytest.fixture(scope="module")
def inject(run_node, adapters, encode):
    def injected(model, style=None, preset="style", weight=1.0, kind="base", **options):
        adapter = adapters(kind, "sdxl")[0]
        style = encode(1) if style is None else style
        return run_node("StyleLoomStyleBlockInjector", model=model, ipadapter=adapter, style={"style0": style},
                        preset=preset, weight=weight, **options)[0]  # fmt: skip

    return injected


@pytest.fixture(scope="module")
def tokens(adapters):
    """(tokens of pictures, tokens of the empty side) in float64."""
    parts = adapters("base", "sdxl")[1]
    return lambda style: (oracle.base_tokens(parts["image_proj"], style.image_embeds),
                          oracle.base_tokens(parts["image_proj"], torch.zeros(1, 48)))  # fmt: skip


@pytest.fixture(scope="module")
def due(models, adapters, tokens, encode, texts):
    """One call with the style of `encode(1)` at a weight, by the oracle; each is computed once."""
    made = {}

    def computed(weight=1.0, sides=(1, 0), count=1):
        key = (weight, sides, count)
        if key not in made:
            model = models["sdxl"][0]
            unet = model.model.diffusion_model
            weights = dict.fromkeys(blocks(unet, *STYLE), weight)
            laid = plan(unet, adapters("base", "sdxl")[1], weights, *tokens(encode(1)), sides)
            with oracle.injected(unet, laid):
                made[key] = call(model, texts["sdxl"], sides=sides, count=count)
        return made[key]

    return computed


def close(a, b, rtol=1e-4):
    return torch.allclose(a, b, atol=2e-5 * float(b.abs().max()), rtol=rtol)


def halved(q, k, v, extra_options):
    """Somebody else's replacement: half of plain attention."""
    from comfy.ldm.modules.attention import optimized_attention

    return 0.5 * optimized_attention(q, k, v, extra_options["n_heads"])


@pytest.mark.parametrize("key", [(), (3,)], ids=["whole block", "one layer"])
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_other_replacements_keep_working(key, first, models, adapters, tokens, encode, inject, due, texts):
    """Theirs alone, ours alone and both: what ours adds is the same, whoever came first."""
    model = models["sdxl"][0]
    replace = (halved, "attn2", "output", 1, *key)
    theirs = model.clone()
    theirs.set_model_attn2_replace(*replace[:1], *replace[2:])
    both = inject(theirs) if first else inject(model)
    if not first:
        both.set_model_attn2_replace(*replace[:1], *replace[2:])
    made = call(both, texts["sdxl"])
    unet = model.model.diffusion_model
    # The oracle: their half is a layer whose own attention counts half.
    changed = {layer for layer in oracle.modules(unet) if layer[:3] == ("output", 1, *(key or layer[2:]))}
    assert len(changed) == (1 if key else 10)
    with torch.inference_mode():
        alone = call(theirs, texts["sdxl"])
    assert not close(made, alone) and not close(made, due())
    # Ours off (weight 0) leaves exactly theirs.
    assert torch.equal(call(inject(theirs, weight=0.0), texts["sdxl"]), alone)
    # A replacement that computes both by hand, without ours.
    from comfy.ldm.modules.attention import optimized_attention

    parts, numbers = adapters("base", "sdxl")[1], oracle.numbers(unet)
    cond, uncond = tokens(encode(1))

    def by_hand(layer):
        (k, v), empty = (keys_values(parts, numbers[layer], side) for side in (cond, uncond))
        pictures = torch.cat([empty[0], k]), torch.cat([empty[1], v])  # the negative side stands first

        def run(q, k, v, extra):
            part = 0.5 if layer in changed else 1.0
            return part * optimized_attention(q, k, v, extra["n_heads"]) + oracle.attention(
                q.double(), *pictures, extra["n_heads"]).to(q.dtype)  # fmt: skip

        return run

    hand = model.clone()
    for layer in blocks(unet, *STYLE):
        hand.set_model_attn2_replace(by_hand(layer), layer[0], layer[1], layer[2])
    assert close(made, call(hand, texts["sdxl"]))


def test_ours_can_be_wrapped_and_added_to(models, inject, due, texts):
    """A wrapper of the UNet finds our replacements, may wrap one and add to another."""
    from comfy.patcher_extension import WrappersMP

    patched, seen = inject(models["sdxl"][0]), []

    def wrapper(executor, x, t, context, y, control, options, **kwargs):
        attn2 = options["patches_replace"]["attn2"]
        inner = attn2["output", 1, 0]

        def outside(q, k, v, extra):
            seen.append("wrapped")
            return inner(q, k, v, extra)

        attn2["output", 1, 0] = outside
        attn2["output", 1, 1].add(lambda out, q, k, v, extra, size: seen.append("added") or out * 0 + size, size=0.0)
        return executor(x, t, context, y, control, options, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "somebody", wrapper)
    assert close(call(patched, texts["sdxl"]), due()) and seen == ["wrapped", "added"]
    assert "patches_replace" not in patched.model_options["transformer_options"]


def test_overrides_and_precision_reach_both_attentions(models, inject, due, texts, monkeypatch):
    model, seen = models["sdxl"][0], []
    for module in oracle.modules(model.model.diffusion_model).values():
        monkeypatch.setattr(module, "attn_precision", torch.float32)
    for _, block in model.model.diffusion_model.named_modules():
        if hasattr(block, "attn2") and hasattr(block, "attn_precision"):
            monkeypatch.setattr(block, "attn_precision", torch.float32)

    def override(function, q, k, v, heads, *args, **kwargs):
        seen.append((tuple(k.shape), kwargs.get("attn_precision")))
        return function(q, k, v, heads, *args, **kwargs)

    made = call(inject(model), texts["sdxl"], optimized_attention_override=override)
    assert close(made, due())
    image = [entry for entry in seen if entry[0] == (2, 4, 128)]
    text = [entry for entry in seen if entry[0][1] == 11]
    assert len(image) == 10 and len(text) == 70
    assert {precision for _, precision in image + text} == {torch.float32}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("sides", [(1, 0), (0, 1), (0,), (1,), (0, 0, 1)])
def test_sides_and_batches(sides, count, models, inject, due, texts):
    assert close(
        call(inject(models["sdxl"][0]), texts["sdxl"], sides=sides, count=count), due(sides=sides, count=count)
    )


@pytest.mark.parametrize("fusion", ["concat", "average"])
def test_several_references(fusion, models, adapters, encode, texts, run_node):
    model, (adapter, parts) = models["sdxl"][0], adapters("base", "sdxl")
    first, second = encode(1, count=2), encode(2)
    made = run_node("StyleLoomStyleBlockInjector", model=model, ipadapter=adapter, preset="style", weight=1.0,
                    style={"style1": second, "style0": first, "style2": None}, fusion=fusion)[0]  # fmt: skip
    z = torch.cat([first.image_embeds, second.image_embeds])
    z = z.mean(0, keepdim=True) if fusion == "average" else z
    cond = oracle.base_tokens(parts["image_proj"], z).flatten(0, 1)[None]
    uncond = oracle.base_tokens(parts["image_proj"], torch.zeros(1, 48))
    uncond = uncond.repeat(1, cond.shape[1] // 4, 1)
    unet = model.model.diffusion_model
    with oracle.injected(unet, plan(unet, parts, dict.fromkeys(blocks(unet, *STYLE), 1.0), cond, uncond)):
        wanted = call(model, texts["sdxl"])
    assert close(call(made, texts["sdxl"]), wanted)


@pytest.mark.parametrize("frames", [None, "window", "animatediff"])
def test_one_reference_per_picture(frames, models, adapters, inject, encode, texts):
    import comfy.context_windows

    model, parts = models["sdxl"][0], adapters("base", "sdxl")[1]
    style = encode(3, count=3 if frames is None else 5)
    shown = {None: [0, 1, 2], "window": [4, 1, 2], "animatediff": [3, 4, 0]}[frames]
    window = comfy.context_windows.IndexListContextWindow(shown[:], dim=0, total_frames=5)
    options = {None: {}, "window": {"context_window": window},
               "animatediff": {"ad_params": {"sub_idxs": shown, "full_length": 5}}}[frames]  # fmt: skip
    patched = inject(model, style, fusion="one per picture")
    made = call(patched, texts["sdxl"], count=3, **options)
    cond = oracle.base_tokens(parts["image_proj"], style.image_embeds[shown])
    uncond = oracle.base_tokens(parts["image_proj"], torch.zeros(1, 48))
    unet = model.model.diffusion_model
    weights = dict.fromkeys(blocks(unet, *STYLE), 1.0)
    with oracle.injected(unet, plan(unet, parts, weights, cond, uncond)):
        assert close(made, call(model, texts["sdxl"], count=3))
    if frames is None:  # other numbers: the last is used again, or the rest is not used
        for count in (2, 5):
            cond = oracle.base_tokens(parts["image_proj"], style.image_embeds[[0, 1, 2, 2, 2][:count]])
            with oracle.injected(unet, plan(unet, parts, weights, cond, uncond)):
                due = call(model, texts["sdxl"], count=count)
            assert close(call(patched, texts["sdxl"], count=count), due)


def pooled(mask, n, size=SIZE):
    """Mean of the mask over the picture that a token of a layer with n tokens stands for."""
    side = int(n**0.5)
    step = mask.shape[-1] // side
    return mask.reshape(len(mask), side, step, side, step).mean((2, 4)).reshape(len(mask), n, 1).double()


def test_masks(models, adapters, tokens, inject, encode, texts):
    model, parts = models["sdxl"][0], adapters("base", "sdxl")[1]
    mask = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(9))
    unet = model.model.diffusion_model
    for given in (mask[:1], mask, mask[0]):
        made = call(inject(model, mask=given, preset="all"), texts["sdxl"], count=3)
        rows = given.reshape(-1, 64, 64).expand(3, -1, -1).repeat(2, 1, 1)
        laid = plan(unet, parts, dict.fromkeys(oracle.modules(unet), 1.0), *tokens(encode(1)))
        masked = {layer: lambda c, n, at=at: (*at(c, n)[:2], pooled(rows, n)) for layer, at in laid.items()}
        with oracle.injected(unet, masked):
            assert close(made, call(model, texts["sdxl"], count=3))


def test_nothing_is_read_back_inside_a_layer(models, inject, texts):
    """A value read back from the device makes a GPU wait: none with the whole schedule, one a call with a part."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def reads(model):
        call(model, texts["sdxl"])
        with Count() as counter:
            call(model, texts["sdxl"])
        return counter.reads

    model = models["sdxl"][0]
    plain = reads(model)
    assert reads(inject(model, preset="all")) == plain
    assert reads(inject(model, preset="all", mask=torch.ones(1, 8, 8))) == plain
    assert reads(inject(model, preset="all", start_percent=0.1, end_percent=0.9)) <= plain + 1


def test_stacking_and_what_is_left_behind(models, inject, due, encode, texts):
    model = models["sdxl"][0]
    once = inject(model, weight=0.5)
    twice = inject(once, weight=0.5)
    assert close(call(twice, texts["sdxl"]), due(1.0))
    assert close(call(once, texts["sdxl"]), due(0.5))
    assert model.wrappers == {} and model.patches == {} and model.object_patches == {}
    assert inject(model, weight=0.0) is model
