"""Style Block Injector on FLUX.1: XLabs's and InstantX's adapters against an independent forward in float64."""

from __future__ import annotations

import flux_oracle as oracle
import pytest
import style_oracle
import torch
from safetensors.torch import save_file

SIGMA, TEXT, HEADS = 0.7, 5, 2
# The model runs in float32: 57 blocks, each with a rounding of 6e-8 times the root of its sums' lengths.
BOUND = 2e-6


@pytest.fixture(scope="module")
def flux(kit):
    return kit.dit_models.flux1_small(seed=1)


@pytest.fixture(scope="module")
def given(kit):
    g = torch.Generator().manual_seed(7)
    width, pooled = kit.dit_models.FLUX1_TEXT, kit.dit_models.FLUX1_POOLED
    return torch.randn(2, TEXT, width, generator=g), torch.randn(2, pooled, generator=g)


@pytest.fixture(scope="module")
def files(host, kit, run_node):
    """kind -> (what Load IP-Adapter gives, the file's tensors)."""
    folder, encoders = (host.base / "models" / name / "flux" for name in ("ipadapter", "clip_vision"))
    for made in (folder, encoders):
        made.mkdir(parents=True, exist_ok=True)
    save_file(kit.vision.siglip_head(), str(encoders / "siglip.safetensors"))
    made = {}
    for kind, width in (("xlabs", 48), ("instantx", 144)):
        tensors = getattr(kit.dit_adapter_files, kind)(width, seed=3, loud=2.0)
        save_file(tensors, str(folder / f"{kind}.safetensors"))
        head = {"siglip_head": "flux/siglip.safetensors"} if kind == "instantx" else {}
        made[kind] = run_node("StyleLoomLoadIPAdapter", ipadapter_name=f"flux/{kind}.safetensors", **head)[0], tensors
    return made


@pytest.fixture(scope="module")
def pictures(run_node, kit, encode):
    """(kind, seed, count) -> the encoded pictures."""
    vision, made = kit.vision.siglip_small(), {}

    def encoded(kind, seed=1, count=1):
        if kind == "xlabs":
            return encode(seed, count)
        if (seed, count) not in made:
            image = torch.rand(count, 40, 64, 3, generator=torch.Generator().manual_seed(seed))
            made[seed, count] = run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image)[0]
        return made[seed, count]

    return encoded


@pytest.fixture(scope="module")
def inject(run_node, files, pictures):
    def injected(model, kind, preset="all", weight=0.8, style=None, **options):
        return run_node("StyleLoomStyleBlockInjector", model=model, ipadapter=files[kind][0],
                        style={"style0": pictures(kind) if style is None else style}, preset=preset, weight=weight,
                        **options)  # fmt: skip

    return injected


def call(model, given, sides=(1, 0), count=1, size=(8, 12), **extra):
    """One call of the model as the sampler makes it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 16, *size, generator=g).repeat(len(sides), 1, 1, 1)
    context, y = (torch.cat([t[side : side + 1].expand(count, *t.shape[1:]) for side in sides]) for t in given)
    options = {**model.model_options["transformer_options"], "cond_or_uncond": list(sides)}
    options["wrappers"] = {kind: {key: list(w) for key, w in named.items()} for kind, named in model.wrappers.items()}
    with torch.inference_mode():
        out = model.model.apply_model(x, torch.full((len(x),), SIGMA), c_crossattn=context, y=y,
                                      guidance=torch.full((len(x),), 3.5), transformer_options=options, **extra)  # fmt: skip
    return x, context, y, out


def due(model, made, add, **more):
    x, context, y, _ = made
    net = model.model.diffusion_model
    t = torch.full((len(x),), SIGMA)
    with torch.inference_mode():
        out = oracle.forward(net, x, t, context, y, torch.full((len(x),), 3.5), add, **more)
    return x.double() - SIGMA * out


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def norm(x, eps):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def siglip_vector(kit, hidden):
    """SigLIP's pooling head in float64."""
    p = {key.removeprefix("vision_model.head."): t.double() for key, t in kit.vision.siglip_head().items()}
    (wq, wk, wv), (bq, bk, bv) = (p[f"attention.in_proj_{x}"].chunk(3) for x in ("weight", "bias"))
    x, probe = hidden.double(), p["probe"].expand(len(hidden), -1, -1)
    q, k, v = (oracle.heads_of(t @ w.T + b, 2) for t, w, b in ((probe, wq, bq), (x, wk, bk), (x, wv, bv)))
    y = oracle.attention(q, k, v) @ p["attention.out_proj.weight"].T + p["attention.out_proj.bias"]
    z = torch.nn.functional.layer_norm(y, y.shape[-1:], p["layernorm.weight"], p["layernorm.bias"], 1e-6)
    z = torch.nn.functional.gelu(z @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"], approximate="tanh")
    return (y + z @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"])[:, 0]


@pytest.fixture(scope="module")
def tokens(files, kit):
    """(kind, encoded pictures or None for none) -> tokens (pictures, tokens, cross)."""

    def made(kind, encoded=None):
        tensors = files[kind][1]
        if kind == "xlabs":
            proj = {key.removeprefix("ip_adapter_proj_model."): t for key, t in tensors.items() if "proj_model" in key}
            return style_oracle.base_tokens(proj, torch.zeros(1, 48) if encoded is None else encoded.image_embeds)
        p = {key.removeprefix("image_proj."): t.double() for key, t in tensors.items() if key.startswith("image_proj.")}
        x = torch.zeros(1, 144).double() if encoded is None else siglip_vector(kit, encoded.last_hidden_state)
        x = style_oracle.gelu(x @ p["proj.0.weight"].T + p["proj.0.bias"])
        x = (x @ p["proj.2.weight"].T + p["proj.2.bias"]).reshape(len(x), -1, 20)
        return style_oracle.norm(x, p["norm.weight"], p["norm.bias"])

    return made


AT = {"xlabs": "end", "instantx": "attention"}


@pytest.fixture(scope="module")
def adds(files):
    """What each block adds. rows: tokens of each row, (1, tokens, cross). weights: block -> weight. share: the mask on
    the tokens of the picture, (rows, target, 1). values: weight of each token."""

    def made(kind, rows, weights, share=None, values=None, target=24):
        p = {key: t.double() for key, t in files[kind][1].items()}
        t = torch.cat(list(rows))

        def add(part, i, q, n):
            if (part, i) not in weights:
                return None
            if kind == "xlabs":
                name = f"double_blocks.{i}.processor.ip_adapter_double_stream"
                k, v = (t @ p[f"{name}_{x}_proj.weight"].T + p[f"{name}_{x}_proj.bias"] for x in "kv")
                k, v = (oracle.heads_of(x, HEADS) for x in (k, v))
            else:
                number = i + 19 * (part == "single")
                k, v = (norm(oracle.heads_of(t @ p[f"ip_adapter.{number}.to_{x}_ip.weight"].T, HEADS), 1e-5) for x in "kv")
            if values is not None:
                v = v * values
            out = weights[part, i] * oracle.attention(q, k, v)
            level = torch.zeros(len(out), out.shape[1], 1, dtype=torch.float64)
            level[:, n : n + target] = 1.0 if share is None else share
            if part == "single":
                level[:, :n] = 1.0 if share is None else share.mean(1, keepdim=True)
            return out * level

        return add

    return made


DOUBLE, SINGLE = [("double", i) for i in range(19)], [("single", i) for i in range(38)]
ALL = {"xlabs": DOUBLE, "instantx": DOUBLE + SINGLE}
KINDS = pytest.mark.parametrize("kind", ALL)


@pytest.fixture(scope="module")
def plain(flux, given):
    return call(flux, given)


def test_the_oracle_is_the_host(flux, plain):
    assert distance(plain[3], due(flux, plain, None)) < BOUND


@KINDS
def test_all_blocks_and_both_sides(kind, flux, given, plain, inject, tokens, adds, pictures):
    """The batch has the negative side first: it sees the projection of nothing."""
    patched, report = inject(flux, kind)
    made = call(patched, given)
    add = adds(kind, [tokens(kind), tokens(kind, pictures(kind))], dict.fromkeys(ALL[kind], 0.8))
    assert distance(made[3], due(flux, made, add, at=AT[kind])) < BOUND < 0.05 < distance(made[3], plain[3])
    assert torch.equal(call(flux, given)[3], plain[3])
    assert f"{len(ALL[kind])} of {len(ALL[kind])} layers" in report and "IP-Adapter for FLUX.1" in report


def test_the_style_blocks_of_splitflux(flux, given, inject, tokens, adds, pictures):
    made = call(inject(flux, "instantx", "style", 1.5)[0], given)
    add = adds("instantx", [tokens("instantx"), tokens("instantx", pictures("instantx"))], dict.fromkeys(SINGLE[10:], 1.5))
    assert distance(made[3], due(flux, made, add, at="attention")) < BOUND


@KINDS
def test_weight_zero_is_the_model_itself(kind, flux, inject):
    assert inject(flux, kind, weight=0.0)[0] is flux


@KINDS
def test_a_mask_and_reference_pictures(kind, flux, given, inject, tokens, adds, pictures):
    """Reference latents (Kontext) get nothing, and under a mask the text gets its mean."""
    mask = torch.zeros(8, 12)
    mask[:5, :6] = 1.0
    reference = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    made = call(inject(flux, kind, mask=mask)[0], given, ref_latents=[reference])
    share = mask.reshape(4, 2, 6, 2).mean((1, 3)).reshape(1, 24, 1).double()
    add = adds(kind, [tokens(kind), tokens(kind, pictures(kind))], dict.fromkeys(ALL[kind], 0.8), share)
    assert distance(made[3], due(flux, made, add, at=AT[kind], reference=reference)) < BOUND
    black = call(inject(flux, kind, mask=torch.zeros(3, 3))[0], given)[3]
    assert torch.equal(black, call(flux, given)[3])


@KINDS
def test_several_pictures_with_weights_and_custom_blocks(kind, flux, given, inject, tokens, adds, pictures):
    """A weight multiplies the values behind bias and norm; the negative side has their mean."""
    encoded = pictures(kind, 5, 2)
    made = call(inject(flux, kind, "custom", 1.0, encoded, block_weights="double 2-4: 0.5, double 3: 2",
                       reference_weights="1, 0.25")[0], given)  # fmt: skip
    each = tokens(kind, encoded)
    seen, none = each.reshape(1, -1, 20), tokens(kind).repeat(1, 2, 1)
    values = torch.cat([torch.full((2 * each.shape[1],), 0.625),
                        torch.tensor([1.0, 0.25]).repeat_interleave(each.shape[1])]).view(2, 1, -1, 1).double()  # fmt: skip
    weights = {("double", 2): 0.5, ("double", 3): 2.0, ("double", 4): 0.5}
    assert distance(made[3], due(flux, made, adds(kind, [none, seen], weights, values=values), at=AT[kind])) < BOUND


def test_one_picture_each_without_guidance(flux, given, inject, tokens, adds, pictures):
    encoded = pictures("instantx", 5, 2)
    made = call(inject(flux, "instantx", style=encoded, fusion="one per picture")[0], given, (0,), 2)
    add = adds("instantx", [t[None] for t in tokens("instantx", encoded)], dict.fromkeys(ALL["instantx"], 0.8))
    assert distance(made[3], due(flux, made, add, at="attention")) < BOUND


def test_two_adapters_and_another_nodes_replacement(flux, given, inject, tokens, adds, pictures):
    """What is there runs around ours, also where it leaves the block out; a second injection adds to the first."""
    seen, shown = [], flux.clone()

    def skip(args, extra):
        return {"img": args["img"], "txt": args["txt"]}

    def watch(args, extra):
        seen.append("before")
        return extra["original_block"](args)

    shown.set_model_patch_replace(skip, "dit", "double_block", 3)
    shown.set_model_patch_replace(watch, "dit", "single_block", 4)
    both = inject(inject(flux, "xlabs")[0], "instantx")[0]
    made = call(both, given)
    parts = [adds(k, [tokens(k), tokens(k, pictures(k))], dict.fromkeys(ALL[k], 0.8)) for k in ("xlabs", "instantx")]
    x, context, y, out = made
    with torch.inference_mode():
        want = oracle.forward(flux.model.diffusion_model, x, torch.full((2,), SIGMA), context, y, torch.full((2,), 3.5),
                              parts[1], "attention", end=parts[0])  # fmt: skip
    assert distance(out, x.double() - SIGMA * want) < BOUND
    one = inject(shown, "xlabs", "custom", block_weights="double 3: 1")[0]
    assert torch.equal(call(one, given)[3], call(shown, given)[3]), "a block that is left out adds nothing"
    call(inject(shown, "instantx")[0], given)
    assert len(seen) == 3


def test_the_schedule_in_the_sampler(flux, run_node, inject, given):
    """From the host's own sampler: on in the first half, off in the second, and with step weights at their middle."""
    conds = [[[text[None], {"pooled_output": pooled[None], "guidance": 3.5}]] for text, pooled in zip(*given)]

    def sample(model, **more):
        return run_node("KSampler", model=model, seed=1, steps=2, cfg=3.0, sampler_name="euler", scheduler="simple",
                        positive=conds[0], negative=conds[1], latent_image={"samples": torch.zeros(1, 16, 8, 8)},
                        denoise=1.0, **more)[0]["samples"]  # fmt: skip

    before, always = sample(flux), sample(inject(flux, "xlabs")[0])
    halves = [sample(inject(flux, "xlabs", start_percent=a, end_percent=b)[0]) for a, b in ((0, 0.3), (0.3, 1))]
    assert len({float(t.sum()) for t in (before, always, *halves)}) == 4
    off = sample(inject(flux, "xlabs", start_percent=0.2, end_percent=0.2)[0])
    assert torch.equal(off, before)
    scaled = sample(inject(flux, "xlabs", weight=1.6, step_weights="0.5")[0])
    assert distance(scaled, always) < BOUND


def test_what_does_not_fit_is_refused(kit, flux, inject, encode, run_node, files, models):
    for words, make in (
        ("reaches none of the blocks of", lambda: inject(flux, "xlabs", "style")),
        ("transformer", lambda: inject(flux, "xlabs", "precise style")),
        ("scaling is K.V", lambda: inject(flux, "xlabs", scaling="K+V")),
        ("model is SDXL", lambda: inject(models["sdxl"][0], "xlabs")),
        ("2 double and 38 single", lambda: inject(kit.dit_models.flux1_small(depth=2), "xlabs")),
        ("was not encoded by", lambda: inject(flux, "instantx", style=encode(1))),
    ):
        with pytest.raises(ValueError, match=words) as error:
            make()
        assert "Expected: " in str(error.value) and "What to do: " in str(error.value)
    without = run_node("StyleLoomLoadIPAdapter", ipadapter_name="flux/instantx.safetensors")[0]
    with pytest.raises(ValueError, match="SigLIP's pooled vector"):
        run_node("StyleLoomStyleBlockInjector", model=flux, ipadapter=without, style={"style0": encode(1)}, preset="all",
                 weight=1.0)  # fmt: skip
    with pytest.raises(ValueError, match="siglip_head only for"):
        run_node("StyleLoomLoadIPAdapter", ipadapter_name="flux/xlabs.safetensors", siglip_head="flux/siglip.safetensors")


def test_a_compiled_model_is_refused(host, flux, given, inject):
    patched = inject(flux, "xlabs")[0]
    kind = host.comfy.patcher_extension.WrappersMP.APPLY_MODEL
    patched.add_wrapper_with_key(kind, "torch.compile", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    with pytest.raises(ValueError, match="model is compiled"):
        call(patched, given)
