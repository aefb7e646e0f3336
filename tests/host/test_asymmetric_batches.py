"""Whatever the host makes of the batch, every row gets the LoRAs of its own side of guidance."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file
from shared_models import BOUND, ONE

ALL = ("sdxl", "sd1.5", "z-image", "qwen-image", "flux2")


def memory_for(monkeypatch, host, chunks):
    """The host believes that `chunks` conditionings fit into memory at once."""
    monkeypatch.setattr(
        host.comfy.model_base.BaseModel,
        "memory_required",
        lambda self, shape, cond_shapes={}: 0 if shape[0] <= chunks else 1 << 60,
    )
    monkeypatch.setattr(host.comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1 << 40)


@pytest.mark.parametrize("name", ALL)
def test_one_batch_holds_both_sides(name, benches, loras, kit, distance):
    """Prompts of one length: the sides stand in one batch, on every architecture."""
    bench = benches(name)
    ours, truth = loras(name)
    same = {"positive": bench.positive, "negative": bench.positive}
    model, calls = kit.two_passes.recorded(bench.model)
    made = bench.asymmetric(model=model, sampling=ONE, **same, **ours)
    assert calls == [((1, 0), 2)]
    assert distance(made, bench.truth(*truth, sampling=ONE, **same)) < BOUND


def flipped(args, order):
    """A model wrapper's work: the chunks of the batch in another order, and everything that tells of it."""
    count = len(args["cond_or_uncond"])
    order = order(count)

    def turn(value):
        if isinstance(value, torch.Tensor) and value.shape[0] % count == 0:
            chunks = value.chunk(count)
            return torch.cat([chunks[i] for i in order])
        return value

    c = {name: turn(value) for name, value in args["c"].items()}
    options = dict(c["transformer_options"])
    for name in ("cond_or_uncond", "uuids"):
        options[name] = [options[name][i] for i in order]
    return turn(args["input"]), turn(args["timestep"]), c | {"transformer_options": options}, order, count


@pytest.mark.parametrize("order", (lambda n: [*range(n)][::-1], lambda n: [*range(0, n, 2), *range(1, n, 2)]))
@pytest.mark.parametrize("batch", (1, 2))
def test_any_order_of_the_chunks(order, batch, bench, loras, kit, distance, run_node):
    """The host lays the negative side first; a wrapper may turn that round, or mix the sides."""
    model, calls = kit.two_passes.recorded(bench.model)

    def wrapper(apply_model, args):
        x, t, c, order_, count = flipped(args, order)
        chunks = apply_model(x, t, **c).chunk(count)
        return torch.cat([chunks[order_.index(i)] for i in range(count)])

    model.set_model_unet_function_wrapper(wrapper)
    prompts = {
        side: [*getattr(bench, side), *bench.prompt(text)]
        for side, text in (("positive", "a green field"), ("negative", "dull"))
    }
    ours, truth = loras()
    made = bench.asymmetric(model=model, latent=bench.latent(batch), sampling=ONE, **prompts, **ours)
    assert len(calls) == 1 and calls[0][1] == 4 * batch and calls[0][0] != (1, 1, 0, 0)
    assert distance(made, bench.truth(*truth, latent=bench.latent(batch), sampling=ONE, **prompts)) < BOUND


@pytest.mark.parametrize("chunks", (1, 2, 3))
def test_split_for_lack_of_memory(chunks, bench, loras, kit, distance, host, monkeypatch):
    ours, truth = loras()
    prompts = {"positive": [*bench.positive, *bench.prompt("a field")], "negative": bench.negative}
    expected = bench.truth(*truth, sampling=ONE, **prompts)
    model, calls = kit.two_passes.recorded(bench.model)
    memory_for(monkeypatch, host, chunks)
    made = bench.asymmetric(model=model, sampling=ONE, **prompts, **ours)
    assert len(calls) == {1: 3, 2: 2, 3: 1}[chunks] and max(rows for _, rows in calls) == chunks
    assert distance(made, expected) < BOUND


def test_prompts_of_lengths_that_do_not_fit_together(bench, loras, kit, distance):
    ours, truth = loras()
    prompts = {"positive": bench.prompt("boat " * 330), "negative": bench.negative}
    model, calls = kit.two_passes.recorded(bench.model)
    made = bench.asymmetric(model=model, sampling=ONE, **prompts, **ours)
    assert sorted(calls) == [((0,), 1), ((1,), 1)]
    assert distance(made, bench.truth(*truth, sampling=ONE, **prompts)) < BOUND


def region(run_node, conditioning, kind, at=0):
    if kind == "area":
        return run_node("ConditioningSetArea", conditioning=conditioning, width=64, height=64, x=32 * at, y=0,
                        strength=0.9)[0]  # fmt: skip
    mask = torch.zeros(1, 64, 96)
    mask[:, :, 48 * at : 48 * (at + 1)] = 1.0
    bounds = "mask bounds" if kind == "bounds" else "default"
    return run_node("ConditioningSetMask", conditioning=conditioning, mask=mask, strength=0.7, set_cond_area=bounds)[0]


@pytest.mark.parametrize("where", ("positive", "negative", "both"))
@pytest.mark.parametrize("kind", ("mask", "area", "bounds"))
def test_regions(kind, where, bench, loras, distance, run_node):
    """An area of one side is also computed by the other, with that side's prompt: then with its LoRAs too."""
    prompts = {}
    for side, texts in (("positive", ("a red boat", "a field")), ("negative", ("blurry", "dull"))):
        prompts[side] = bench.prompt("over all")
        if where in (side, "both"):
            parts = [region(run_node, bench.prompt(text), kind, at) for at, text in enumerate(texts)]
            prompts[side] = [*prompts[side], *parts[0], *parts[1]]
    ours, truth = loras()
    made = bench.asymmetric(sampling=ONE, **prompts, **ours)
    expected = bench.routed(*truth, sampling=ONE, **prompts)
    assert distance(made, expected) < BOUND


def test_regions_with_a_patch_that_goes_through_weight_hooks(bench, distance, run_node):
    """The host hands an area's hooks to the other side together with the area."""
    lora = bench.lora(1, kind="dora", contains="attn2")
    prompts = {"positive": [*bench.positive, *region(run_node, bench.prompt("a field"), "area", 1)]}
    made = bench.asymmetric(sampling=ONE, positive_lora=lora, **prompts)
    assert "weight hooks" in bench.report
    assert distance(made, bench.routed([(lora, 1.0)], (), sampling=ONE, **prompts)) < BOUND


def test_a_default_conditioning_for_the_rest(bench, loras, distance, run_node):
    part = region(run_node, bench.prompt("a field"), "mask", 1)
    positive = run_node("ConditioningSetDefaultCombine", cond=part, cond_DEFAULT=bench.positive)[0]
    ours, truth = loras()
    made = bench.asymmetric(sampling=ONE, positive=positive, **ours)
    assert distance(made, bench.routed(*truth, sampling=ONE, positive=positive)) < BOUND


@pytest.mark.parametrize("name", ("sd1.5", "z-image", "flux2"))
def test_a_batch_of_latents(name, benches, loras, kit, distance):
    bench = benches(name)
    ours, truth = loras(name)
    generator = torch.Generator().manual_seed(3)
    latent = {"samples": torch.randn(3, *kit.two_passes.LATENTS[name], generator=generator), "batch_index": [5, 0, 2]}
    made = bench.asymmetric(latent=latent, sampling=ONE, **ours)
    assert distance(made, bench.truth(*truth, latent=latent, sampling=ONE)) < BOUND


def controlnet(kit, bench):
    """A ControlNet of the model's own structure; none of its weights is zero."""
    import comfy.cldm.cldm
    import comfy.controlnet

    left_out = ("out_channels", "transformer_depth_output", "use_temporal_attention", "use_temporal_resblock",
                "disable_unet_model_creation")  # fmt: skip
    config = {k: v for k, v in bench.model.model.model_config.unet_config.items() if k not in left_out}
    with torch.inference_mode(False):
        net = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, **config)
        kit.weights_fill.fill(net, 3, prefix="control.")
    return comfy.controlnet.ControlNet(net.eval(), load_device=comfy.model_management.get_torch_device())


@pytest.mark.parametrize("where", ("positive", "negative", "both"))
def test_controlnet(where, bench, loras, kit, distance, run_node):
    hint = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    with_net = run_node(
        "ControlNetApplyAdvanced", positive=bench.positive, negative=bench.negative,
        control_net=controlnet(kit, bench), image=hint, strength=0.6, start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    prompts = {
        side: made for side, made in zip(("positive", "negative"), with_net, strict=True) if where in (side, "both")
    }
    ours, truth = loras()
    made = bench.asymmetric(sampling=ONE, **prompts, **ours)
    assert distance(made, bench.truth(*truth, sampling=ONE, **prompts)) < BOUND
    assert distance(made, bench.truth(*truth, sampling=ONE)) > 0.01


@pytest.mark.parametrize("overlap", (0, 1))
def test_context_windows(overlap, bench, loras, kit, distance, run_node):
    def windows(model):
        return run_node(
            "ContextWindowsManual", model=model, context_length=2, context_overlap=overlap, context_stride=1,
            context_schedule="standard_static", closed_loop=False, fuse_method="pyramid", dim=0, freenoise=False,
        )[0]  # fmt: skip

    ours, truth = loras()
    latent = bench.latent(4)
    model, calls = kit.two_passes.recorded(windows(bench.model))
    made = bench.asymmetric(model=model, latent=latent, sampling=ONE, **ours)
    assert len(calls) > 1 and {order for order, _ in calls} == {(1, 0)}
    assert distance(made, bench.truth(*truth, latent=latent, sampling=ONE, change=windows)) < BOUND


def test_loras_of_the_model_stay_on_both_sides(bench, loras, distance):
    ours, (positive, negative) = loras()
    base = bench.lora(7, rank=2)
    made = bench.asymmetric(model=bench.merged((base, 0.6), side="ours"), sampling=ONE, **ours)
    expected = bench.truth([(base, 0.6), *positive], [(base, 0.6), *negative], sampling=ONE)
    assert distance(made, expected) < BOUND


def test_a_lora_loaded_in_bypass_mode_at_once(bench, loras, distance, host, run_node):
    """The host's bypass loader also stands before the forward of the same layers."""
    base = bench.lora(8, rank=2)
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in base.items()}, folder / "asymmetric_bypass.safetensors")
    model = run_node(
        "LoraLoaderBypassModelOnly", model=bench.fresh(), lora_name="asymmetric_bypass.safetensors", strength_model=0.6
    )[0]
    ours, (positive, negative) = loras()
    expected = bench.truth([(base, 0.6), *positive], [(base, 0.6), *negative], sampling=ONE)
    for _ in range(2):  # also after the first run was cleaned up
        assert distance(bench.asymmetric(model=model, sampling=ONE, **ours), expected) < BOUND


def test_a_layer_that_hides_the_batch(bench, loras, kit, distance, monkeypatch, caplog):
    """Rows that cannot be told apart: both sides run alone, with a warning for the run and the true result."""
    ours, truth = loras()
    expected = bench.truth(*truth)
    block = bench.model.model.diffusion_model.middle_block[1].transformer_blocks[0].ff
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda x: forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]), raising=False)
    model, calls = kit.two_passes.recorded(bench.model)
    with caplog.at_level(logging.WARNING):
        made = bench.asymmetric(model=model, **ours)
    assert distance(made, expected) < BOUND
    assert sum("one after the other" in record.getMessage() for record in caplog.records) == 1
    assert [order for order, _ in calls] == [(1, 0), (0,), (1,), (0,), (1,)]
