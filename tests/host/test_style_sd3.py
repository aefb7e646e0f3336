"""Style Block Injector on SD3.5-large: InstantX's adapter against an independent forward in float64."""

from __future__ import annotations

import pytest
import sd3_oracle as oracle
import torch
from safetensors.torch import save_file

SIGMA, TEXT, HEADS = 0.7, 5, 2
# The model runs in float32: 38 blocks, each with a rounding of 6e-8 times the root of its sums' lengths.
BOUND = 2e-6


@pytest.fixture(scope="module")
def sd3(kit):
    return kit.dit_models.sd35_small(seed=1)


@pytest.fixture(scope="module")
def given(kit):
    g = torch.Generator().manual_seed(7)
    return (torch.randn(2, TEXT, kit.dit_models.SD35_TEXT, generator=g),
            torch.randn(2, kit.dit_models.SD35_POOLED, generator=g))  # fmt: skip


@pytest.fixture(scope="module")
def file(host, kit, run_node):
    folder = host.base / "models" / "ipadapter" / "sd3"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = kit.dit_adapter_files.instantx_sd3(seed=3, loud=2.0)
    save_file(tensors, str(folder / "instantx.safetensors"))
    return run_node("StyleLoomLoadIPAdapter", ipadapter_name="sd3/instantx.safetensors")[0], oracle.Adapter(tensors)


@pytest.fixture(scope="module")
def picture(run_node, kit):
    vision, made = kit.vision.siglip_small(), {}

    def encoded(seed=1, count=1):
        if (seed, count) not in made:
            image = torch.rand(count, 40, 64, 3, generator=torch.Generator().manual_seed(seed))
            made[seed, count] = run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image)[0]
        return made[seed, count]

    return encoded


@pytest.fixture(scope="module")
def inject(run_node, file, picture):
    def injected(model, preset="all", weight=0.6, style=None, **options):
        return run_node("StyleLoomStyleBlockInjector", model=model, ipadapter=file[0],
                        style={"style0": style or picture()}, preset=preset, weight=weight, **options)[0]  # fmt: skip

    return injected


def call(model, given, sides=(1, 0), count=1, sigma=SIGMA):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 16, 8, 12, generator=g).repeat(len(sides), 1, 1, 1)
    context, y = (torch.cat([t[side : side + 1].expand(count, *t.shape[1:]) for side in sides]) for t in given)
    options = {**model.model_options["transformer_options"], "cond_or_uncond": list(sides)}
    options["wrappers"] = {kind: {key: list(w) for key, w in named.items()} for kind, named in model.wrappers.items()}
    with torch.inference_mode():
        sigmas = sigma if isinstance(sigma, torch.Tensor) else torch.full((len(x),), sigma)
        return x, context, y, model.model.apply_model(x, sigmas, c_crossattn=context, y=y, transformer_options=options)


def due(model, made, add=None, sigma=SIGMA):
    x, context, y, _ = made
    with torch.inference_mode():
        t = float(torch.tensor(sigma) * 1000)
        return x.double() - sigma * oracle.forward(model.model.diffusion_model, x, t, context, y, add)


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def adds(file):
    """What each block adds. rows: features of each row, (pictures, n, width). weights: block -> weight."""
    adapter = file[1]

    def made(rows, weights, sigma=SIGMA, share=1.0):
        timed = [adapter.tokens(features, float(torch.tensor(sigma) * 1000)) for features in rows]

        def add(i, q, k, v):
            if i not in weights:
                return None
            parts = [adapter.seen(i, tokens.reshape(1, -1, tokens.shape[-1]), vector, *(t[r : r + 1] for t in (q, k, v)), HEADS)
                     for r, (tokens, vector) in enumerate(timed)]  # fmt: skip
            return weights[i] * share * torch.cat(parts)

        return add

    return made


@pytest.fixture(scope="module")
def seen(picture):
    return picture().penultimate_hidden_states


ALL = dict.fromkeys(range(38), 0.6)


def test_the_oracle_is_the_host(sd3, given):
    made = call(sd3, given)
    assert distance(made[3], due(sd3, made)) < BOUND


@pytest.mark.parametrize("sigma", [0.7, 0.2])
def test_all_blocks_both_sides_and_the_time_step(sigma, sd3, given, inject, adds, seen):
    before = call(sd3, given, sigma=sigma)
    patched = inject(sd3)
    made = call(patched, given, sigma=sigma)
    want = due(sd3, made, adds([torch.zeros_like(seen), seen], ALL, sigma), sigma)
    assert distance(made[3], want) < BOUND < 0.01 < distance(made[3], before[3])
    assert torch.equal(call(sd3, given, sigma=sigma)[3], before[3])
    assert inject(sd3, weight=0.0) is sd3
    assert len(patched.additional_models["styleloom_style"]) == 1


def test_a_mask_custom_blocks_and_two_pictures(sd3, given, inject, adds, seen, picture):
    """Sides with a different number of tokens: none is repeated, since each token has its share of the attention."""
    both, mask = picture(5, 2), torch.zeros(8, 12)
    mask[:5, :6] = 1.0
    share = mask.reshape(4, 2, 6, 2).mean((1, 3)).reshape(1, 24, 1).double()
    made = call(inject(sd3, "custom", 1.0, both, block_weights="joint 3-5: 0.5, joint 37: 2", mask=mask), given)
    weights = {3: 0.5, 4: 0.5, 5: 0.5, 37: 2.0}
    add = adds([torch.zeros_like(seen), both.penultimate_hidden_states], weights, share=share)
    assert distance(made[3], due(sd3, made, add)) < BOUND
    black = call(inject(sd3, mask=torch.zeros(2, 2)), given)[3]
    assert torch.equal(black, call(sd3, given)[3])


def test_one_picture_each_and_a_negative(sd3, given, inject, adds, picture):
    both, other = picture(5, 2), picture(9)
    made = call(inject(sd3, style=both, fusion="one per picture", negative=other), given, (1, 0), 2)
    rows = [other.penultimate_hidden_states] * 2 + list(both.penultimate_hidden_states.split(1))
    assert distance(made[3], due(sd3, made, adds(rows, ALL))) < BOUND


def test_twice_and_beside_another_override(sd3, given, inject, adds, seen, picture):
    calls, watched = [], sd3.clone()

    def override(attention, *args, **kwargs):
        calls.append(1)
        return attention(*args, **kwargs)

    watched.model_options["transformer_options"]["optimized_attention_override"] = override
    other = picture(9)
    made = call(inject(inject(watched), style=other, weight=0.3), given)
    first = adds([torch.zeros_like(seen), seen], ALL)
    second = adds([torch.zeros_like(seen), other.penultimate_hidden_states], dict.fromkeys(range(38), 0.3))
    assert distance(made[3], due(sd3, made, lambda *a: first(*a) + second(*a))) < BOUND
    assert len(calls) == 38 * (1 + 2 * 2)


def test_the_sampler_loads_the_adapter(sd3, run_node, inject, given):
    conds = [[[text[None], {"pooled_output": pooled[None]}]] for text, pooled in zip(*given)]

    def sample(model):
        return run_node("KSampler", model=model, seed=1, steps=2, cfg=3.0, sampler_name="euler", scheduler="simple",
                        positive=conds[0], negative=conds[1], latent_image={"samples": torch.zeros(1, 16, 8, 8)},
                        denoise=1.0)[0]["samples"]  # fmt: skip

    before, always = sample(sd3), sample(inject(sd3))
    off, half = sample(inject(sd3, start_percent=0.2, end_percent=0.2)), sample(inject(sd3, end_percent=0.3))
    assert torch.equal(off, before) and len({float(t.sum()) for t in (before, always, half)}) == 3
    scaled = sample(inject(sd3, weight=1.2, step_weights="0.5"))
    assert distance(scaled, always) < BOUND


def test_what_does_not_fit_is_refused(kit, sd3, given, inject, encode):
    medium = kit.dit_models.sd35_small(num_blocks=3, x_block_self_attn_layers=[0])
    for words, make in (
        ("which of them make style is not published", lambda: inject(sd3, "style")),
        ("model is SD3 .3 joint", lambda: inject(medium)),
        ("model is SD3 .38 joint", lambda: inject(kit.dit_models.sd35_small(x_block_self_attn_layers=[0]))),
        ("model is Flux", lambda: inject(kit.dit_models.flux1_small(depth=1, depth_single_blocks=1))),
        ("was not encoded by", lambda: inject(sd3, style=encode(1))),
        ("weight of a single reference is not defined", lambda: inject(sd3, reference_weights="0.5")),
        ("different time steps", lambda: call(inject(sd3), given, sigma=torch.tensor([0.7, 0.2]))),
    ):
        with pytest.raises(ValueError, match=words) as error:
            make()
        assert "Expected: " in str(error.value) and "What to do: " in str(error.value)
