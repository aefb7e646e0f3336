"""Style Block Injector through the host's own samplers: schedule, regions, guiders, ControlNet, LoRA, interrupts."""

from __future__ import annotations

import gc

import pytest
import style_oracle as oracle
import torch
from style_calls import blocks, keys_values

STEPS = 1


@pytest.fixture(scope="module")
def sdxl(models):
    return models["sdxl"][0]


@pytest.fixture(scope="module")
def prompts(run_node, models):
    clip = models["sdxl"][1]
    return [run_node("CLIPTextEncode", clip=clip, text=text)[0] for text in ("a red fox", "blurry")]


@pytest.fixture(scope="module")
def inject(run_node, adapters, encode):
    def injected(model, seed=1, preset="style", weight=1.5, **options):
        return run_node("StyleLoomStyleBlockInjector", model=model, ipadapter=adapters("base", "sdxl")[0],
                        style={"style0": encode(seed)}, preset=preset, weight=weight, **options)[0]  # fmt: skip

    return injected


@pytest.fixture(scope="module")
def sample(run_node, prompts):
    def sampled(model, positive=None, negative=None, sampler="euler", batch=1, cfg=4.0, steps=STEPS):
        latent = {"samples": torch.zeros(batch, 4, 16, 16)}
        return run_node("KSampler", model=model, seed=1, steps=steps, cfg=cfg, sampler_name=sampler, scheduler="simple",
                        positive=positive or prompts[0], negative=negative or prompts[1], latent_image=latent,
                        denoise=1.0)[0]["samples"]  # fmt: skip

    return sampled


@pytest.fixture(scope="module")
def planned(sdxl, adapters, encode):
    """An oracle's plan in which `side(rows, n)` says which side each row is on, and at which weight."""
    parts, unet = adapters("base", "sdxl")[1], sdxl.model.diffusion_model
    cond = oracle.base_tokens(parts["image_proj"], encode(1).image_embeds)
    uncond = oracle.base_tokens(parts["image_proj"], torch.zeros(1, 48))
    numbers = oracle.numbers(unet)

    def made(side, names=(("output", 1),)):
        def at(number):
            def rows(count, n):
                sides, weight = side(count, n)
                pairs = [keys_values(parts, number, cond if s else uncond) for s in sides]
                return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]), weight

            return rows

        return {layer: at(numbers[layer]) for layer in blocks(unet, *names)}

    return made


def close(a, b):
    return torch.allclose(a, b, atol=2e-4 * float(b.abs().max()), rtol=1e-3)


def negative_first(count, n):
    """The host's usual batch: the negative side, then the positive one."""
    return [row >= count // 2 for row in range(count)], 1.5


def test_a_whole_run(sdxl, inject, sample, planned):
    run = {"batch": 2, "steps": 2}
    plain = sample(sdxl, **run)
    made = sample(inject(sdxl), **run)
    with oracle.injected(sdxl.model.diffusion_model, planned(negative_first)) as hit:
        due = sample(sdxl, **run)
    assert close(made, due) and not close(made, plain)
    assert len(hit) == 70 and set(hit.values()) == {2}
    assert torch.equal(sample(sdxl, **run), plain)


@pytest.mark.parametrize(
    ("start", "end", "sampler"), [(0.0, 0.5, "euler"), (0.5, 1.0, "euler"), (0.0, 0.5, "heun"), (0.2, 0.2, "euler")]
)
def test_the_schedule(start, end, sampler, sdxl, inject, sample, planned):
    """On and off by the sigma of each call of the UNet, also in samplers that call it between the steps."""
    sampling = sdxl.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    sigmas, unet = [], sdxl.model.diffusion_model

    def spy(executor, x, t, *args, **kwargs):
        sigmas.append(float(t[0]))
        return executor(x, t, *args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    watched = sdxl.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)

    def side(count, n):
        return negative_first(count, n)[0], 1.5 if last <= sigmas[-1] <= first else 0.0

    with oracle.injected(unet, planned(side)):
        due = sample(watched, sampler=sampler, steps=3)
    on = [last <= sigma <= first for sigma in sigmas]
    assert any(on) == (start < end) and not all(on)
    made = sample(inject(sdxl, start_percent=start, end_percent=end), sampler=sampler, steps=3)
    assert close(made, due)
    assert any(on) or torch.equal(made, sample(sdxl, sampler=sampler, steps=3)), "switched off, nothing is there"


def region_of(kind, run_node, prompts):
    """The positive prompt for the right half of the picture, by each way that the host has."""
    node, options = {
        "area": ("ConditioningSetArea", {"width": 64, "height": 128, "x": 64, "y": 0}),
        "percentage": ("ConditioningSetAreaPercentage", {"width": 0.5, "height": 1.0, "x": 0.5, "y": 0.0}),
        "mask bounds": ("ConditioningSetMask", {"set_cond_area": "mask bounds",
                                                "mask": torch.arange(16).ge(8).float().expand(1, 16, 16)}),
    }[kind]  # fmt: skip
    return run_node(node, conditioning=prompts[0], strength=1.0, **options)[0]


@pytest.mark.parametrize("kind", ["area", "percentage", "mask bounds"])
def test_a_mask_meets_a_region(kind, sdxl, run_node, inject, sample, planned, prompts):
    """The positive side has the right half of the picture only, and the mask's right half with it. The host hands a
    copy of that region to the negative side, with the negative prompt: it then sees the negative's picture."""
    region = region_of(kind, run_node, prompts)
    mask = torch.linspace(0, 1, 16).expand(1, 16, 16).contiguous()

    def side(count, n):
        height = 8 if n in (64, 32) else 4
        right = n in (32, 8)  # half as many tokens as the whole picture has
        width = n // height
        step = 16 // height
        small = mask.reshape(1, height, step, height, step).mean((2, 4))
        part = (small[..., height // 2 :] if right else small).reshape(1, n, 1).double()
        assert part.shape[1] == height * width
        assert count == (2 if right else 1)
        return [False, right][:count], 1.5 * part

    with oracle.injected(sdxl.model.diffusion_model, planned(side, [("output", 1), ("output", 4)])):
        due = sample(sdxl, positive=region)
    options = {"preset": "custom", "block_weights": "output 1: 1, output 4: 1"}
    made = sample(inject(sdxl, mask=mask, **options), positive=region)
    assert close(made, due)
    assert not close(sample(inject(sdxl, **options), positive=region), due)


@pytest.mark.parametrize("per_frame", ["reference", "mask"])
def test_context_windows_of_the_host(per_frame, sdxl, run_node, adapters, encode, sample, inject):
    """At its defaults the host puts the picture before a window in front of it. Which rows a call has is told here by
    the noise in them, not by what the window says."""
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    frames, unet = 5, sdxl.model.diffusion_model
    noise = comfy.sample.prepare_noise(torch.zeros(frames, 4, 16, 16), 1).flatten(1)
    mask = torch.rand(frames, 16, 16, generator=torch.Generator().manual_seed(4))
    style = encode(3, count=frames if per_frame == "reference" else 1)
    parts, calls = adapters("base", "sdxl")[1], []

    def windowed(model):
        return run_node("ContextWindowsManual", model=model, context_length=3, context_overlap=1,
                        context_schedule="standard_static", context_stride=1, closed_loop=False, fuse_method="pyramid",
                        dim=0, freenoise=False)[0]  # fmt: skip

    def spy(executor, x, t, *args, **kwargs):
        calls.append(torch.nn.functional.cosine_similarity(x.flatten(1)[:, None], noise[None], dim=2).argmax(1))
        return executor(x, t, *args, **kwargs)

    watched = windowed(sdxl)
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    cond = oracle.base_tokens(parts["image_proj"], style.image_embeds)
    uncond = oracle.base_tokens(parts["image_proj"], torch.zeros(1, 48))
    numbers = oracle.numbers(unet)

    def at(number):
        def rows(count, n):
            shown, half = calls[-1], count // 2  # the negative side stands first
            pictures = cond[shown[half:]] if len(cond) > 1 else cond.expand(count - half, -1, -1)
            k, v = keys_values(parts, number, torch.cat([uncond.expand(half, -1, -1), pictures]))
            side = int(n**0.5)
            part = mask[shown].reshape(count, side, 16 // side, side, 16 // side).mean((2, 4)).reshape(count, n, 1)
            return k, v, 1.5 * (part.double() if per_frame == "mask" else 1.0)

        return rows

    with oracle.injected(unet, {layer: at(numbers[layer]) for layer in blocks(unet, ("output", 1))}):
        due = sample(watched, batch=frames)
    assert [len(shown) for shown in calls] == [6, 8], "the second window has the picture before it in front"
    options = {"fusion": "one per picture"} if per_frame == "reference" else {"mask": mask}
    injected = run_node("StyleLoomStyleBlockInjector", model=sdxl, ipadapter=adapters("base", "sdxl")[0],
                        style={"style0": style}, preset="style", weight=1.5, **options)[0]  # fmt: skip
    assert close(sample(windowed(injected), batch=frames), due)


def test_tiles_one_at_a_time(sdxl, inject, sample, planned):
    """The rows are all there, so only the size of the input tells that it is a tile: the style needs no place, a mask
    does."""

    def tiled(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(lambda apply_model, args: torch.cat(
            [apply_model(part, args["timestep"], **args["c"]) for part in args["input"].chunk(2, -1)], -1))  # fmt: skip
        return model

    with oracle.injected(sdxl.model.diffusion_model, planned(negative_first)):
        due = sample(tiled(sdxl))
    assert close(sample(tiled(inject(sdxl))), due)
    with pytest.raises(ValueError, match="is given a part of .16, 8. of a latent of .16, 16., and .* has a mask"):
        sample(tiled(inject(sdxl, mask=torch.ones(1, 16, 16))))


def test_two_regions_in_one_batch(sdxl, run_node, inject, sample, planned, prompts):
    """Both regions are positive, whatever their order in the batch."""
    both = prompts[0] + prompts[1]

    def side(count, n):
        return [False] + [True] * 2 if count == 3 else pytest.fail(f"{count} rows"), 1.5

    with oracle.injected(sdxl.model.diffusion_model, planned(side)):
        due = sample(sdxl, positive=both)
    assert close(sample(inject(sdxl), positive=both), due)


def test_a_guider_that_numbers_its_sides_otherwise(sdxl, run_node, inject, planned, prompts):
    """Dual CFG Guider puts the negative at place 0, where others have the positive."""
    third = run_node("ConditioningAverage", conditioning_to=prompts[0], conditioning_from=prompts[1],
                     conditioning_to_strength=0.5)[0]  # fmt: skip

    def run(model):
        guider = run_node("DualCFGGuider", model=model, cond1=prompts[0], cond2=third, negative=prompts[1],
                          cfg_conds=4.0, cfg_cond2_negative=3.0, style="regular")[0]  # fmt: skip
        noise = run_node("RandomNoise", noise_seed=1)[0]
        sampler = run_node("KSamplerSelect", sampler_name="euler")[0]
        sigmas = run_node("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0)[0]
        return run_node("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                        latent_image={"samples": torch.zeros(1, 4, 16, 16)})[0]["samples"]  # fmt: skip

    orders = []

    def spy(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        orders.append(list(options["cond_or_uncond"]))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    from comfy.patcher_extension import WrappersMP

    watched = sdxl.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    with oracle.injected(sdxl.model.diffusion_model, planned(lambda c, n: ([i != 0 for i in orders[-1]], 1.5))):
        due = run(watched)
    assert orders and all(sorted(order) == [0, 1, 2] for order in orders)
    assert close(run(inject(sdxl)), due)


def test_lora_at_once(sdxl, kit, run_node, inject, sample, planned):
    """A LoRA on the very layers: ours takes q as it reaches the replacement."""
    layers = kit.diffusion_files.kohya_layers(sdxl, "output_blocks_1_1")
    g = torch.Generator().manual_seed(2)
    lora = {}
    for name, (wide, out) in layers.items():
        lora |= {f"{name}.lora_down.weight": torch.randn(2, wide, generator=g) * 0.1,
                 f"{name}.lora_up.weight": torch.randn(out, 2, generator=g) * 0.5}  # fmt: skip
    with_lora = run_node("LoraModelLoader", model=sdxl, lora=lora, strength_model=1.0)[0]
    with oracle.injected(sdxl.model.diffusion_model, planned(negative_first)):
        due = sample(with_lora)
    made = sample(inject(with_lora))
    assert close(made, due) and not close(made, sample(inject(sdxl)))
    after = run_node("LoraModelLoader", model=inject(sdxl), lora=lora, strength_model=1.0)[0]
    assert torch.equal(sample(after), made)


def test_control_is_left_alone(sdxl, kit, inject, sample, planned, prompts, run_node, host):
    """A ControlNet has cross-attentions at the same places; the picture is not shown to them, as published."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = {k: v for k, v in sdxl.model.model_config.unet_config.items()
              if k not in ("out_channels", "transformer_depth_output", "use_temporal_attention",
                           "use_temporal_resblock", "disable_unet_model_creation")}  # fmt: skip
    with torch.inference_mode(False):
        net = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, **config).eval()
        kit.weights_fill.fill(net, 4)
    control = comfy.controlnet.ControlNet(net, load_device=sdxl.load_device, manual_cast_dtype=None)
    seen = []
    for layer in (m for m in net.modules() if hasattr(m, "attn2")):
        layer.attn2.register_forward_hook(lambda *_: seen.append(1))
    positive, negative = run_node(
        "ControlNetApplyAdvanced", positive=prompts[0], negative=prompts[1], control_net=control, strength=0.5,
        image=torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1)), start_percent=0.0,
        end_percent=1.0)[:2]  # fmt: skip
    everywhere = [("input", n) for n in (4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(6)]
    with oracle.injected(sdxl.model.diffusion_model, planned(negative_first, everywhere)):
        due = sample(sdxl, positive, negative)
    plain, counted = sample(sdxl, positive, negative), len(seen)
    made = sample(inject(sdxl, preset="all"), positive, negative)
    assert counted and len(seen) == counted * 3 // 2, "each of the control net's own cross-attentions ran as before"
    assert close(made, due) and not close(made, plain)


def held():
    """Bytes of all tensors that Python code still holds."""
    gc.collect()
    return sum(o.numel() * o.element_size() for o in gc.get_objects() if issubclass(type(o), torch.Tensor))


def test_nothing_is_held_after_a_run_or_an_interrupt(sdxl, inject, sample, host):
    """Copies for the device, in 16 bit here, and the mask's sizes live as long as a run."""
    from comfy.patcher_extension import WrappersMP

    low = sdxl.clone()
    low.set_model_compute_dtype(torch.bfloat16)
    sample(inject(low))  # what the host keeps after any run
    model = inject(low, mask=torch.ones(1, 8, 8), start_percent=0.0, end_percent=0.9)
    stopped, during = model.clone(), []

    def stop(executor, *args, **kwargs):
        executor(*args, **kwargs)
        during.append(held())
        raise host.comfy.model_management.InterruptProcessingException()

    stopped.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "stop", stop)
    before = held()
    first = sample(model)
    assert held() - first.numel() * first.element_size() == before
    try:
        sample(stopped)
    except host.comfy.model_management.InterruptProcessingException:
        pass
    assert len(during) == 1 and during[0] > before
    assert held() - first.numel() * first.element_size() == before
    assert torch.equal(sample(model), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype, sdxl, inject, sample):
    """The keys and values follow the queries: computed in 16 bit, the picture moves like in 32."""
    low = sdxl.clone()
    low.set_model_compute_dtype(dtype)
    plain, styled = sample(low), sample(inject(low))
    assert styled.isfinite().all()
    moved, due = styled - plain, sample(inject(sdxl)) - sample(sdxl)
    assert float(torch.nn.functional.cosine_similarity(moved.flatten(), due.flatten(), dim=0)) > 0.95
