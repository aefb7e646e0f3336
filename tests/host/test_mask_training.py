"""Calibrated and train of ZipRank Merge on five architectures, end to end, with an oracle for what they run on.

Each mode runs once for an architecture, through the node; what it measured, its teachers and its gradient are then held
against the host: models patched with one LoRA, inputs recorded there, and differences of the loss.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
STEPS = (0.004, 0.002)  # of a mask, for central differences
CLOSE = 1e-4  # relative: two ways through a whole model in float32
CONTENT_LINES = ["a red cube", "a red cube on a long wooden table in the sun"]
STYLE_LINES = ["an ink drawing of many small houses"]
# A part of each model of few blocks: convolutions, attention and feed-forward; q, k and v of a fused layer by their own
# names.
CONTAINS = {
    "sd1.5": ("input_blocks.1.", "diffusion_model.input_blocks.3.0.in_layers"),
    "sdxl": ("input_blocks.3.1.transformer_blocks.0.", "output_blocks.0.0.in_layers"),
    "z-image": ("layers.1.", "transformer.layers.0.attention.to_"),
    "flux2": ("double_blocks.0.img_mlp", "single_transformer_blocks.0.", "transformer.transformer_blocks.0.attn.to_"),
    "qwen-image": ("transformer_blocks.1.",),
}


@pytest.fixture(scope="module")
def ours(pack):
    return lambda name: sys.modules[f"{pack.__name__}.{name}"]


@pytest.fixture(scope="module", params=CONTAINS)
def bench(request, kit, host):
    """(model, clip, content LoRA, style LoRA) of an architecture."""
    model = kit.architectures.make_model(request.param, 1, short=True)
    with torch.inference_mode(False):
        clip = kit.architectures.ARCHITECTURES[request.param].clip(1)
    key_map = host.comfy.lora.model_lora_keys_unet(model.model, {})
    state = model.model.state_dict()
    loras = []
    for seed in (1, 2):
        g, lora, taken = torch.Generator().manual_seed(seed), {}, set()
        for stem, target in key_map.items():
            own = stem.startswith("diffusion_model.") and isinstance(target, str)
            cut = stem.startswith("transformer.") and not isinstance(target, str)
            weight = state.get(target if isinstance(target, str) else target[0])
            if not (own or cut) or weight is None or weight.ndim < 2 or "adaLN" in stem or "norm" in stem:
                continue
            if not any(word in stem for word in CONTAINS[request.param]):
                continue
            if target in taken:
                continue  # another name of the same layer
            taken.add(target)
            shape = list(weight.shape)
            if cut:
                shape[target[1][0]] = target[1][2]
            down = torch.randn(2, *shape[1:], generator=g) / weight[0].numel() ** 0.5
            lora[f"{stem}.lora_down.weight"] = down
            lora[f"{stem}.lora_up.weight"] = torch.randn(shape[0], 2, *(1 for _ in shape[2:]), generator=g) * 0.7
        loras.append(lora)
    assert len(loras[0]) > 8
    return model, clip, *loras


@pytest.fixture
def merge(bench, run_node, ours, monkeypatch):
    modes = ours("nodes.host.merge.model_modes")
    monkeypatch.setattr(modes, "LESSONS", 1)
    monkeypatch.setattr(modes, "PICTURES", 1)

    def merging(mode, **more):
        model, clip, content, style = bench
        return run_node(
            "StyleLoomZipRankMerge", mode=mode, content_lora=content, style_lora=style, model=model, clip=clip,
            content_prompt="\n".join(CONTENT_LINES), style_prompt="\n".join(STYLE_LINES), size=64, seed=LARGEST_SEED,
            calibration_steps=1, **more,
        )  # fmt: skip

    return merging


@pytest.fixture
def patched(bench, run_node, host):
    """The model with one LoRA merged into its weights by the host, loaded; afterwards it is as before."""
    management = host.comfy.model_management
    yielded = []

    def made(lora):
        model = run_node("LoraModelLoader", model=bench[0], lora=lora, strength_model=1.0)[0]
        management.load_models_gpu([model])
        yielded.append(model)
        return model

    yield made
    management.load_models_gpu([bench[0]])


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def dense_gram(module, down, part, inputs):
    """V X Xᵀ Vᵀ, float64, from the inputs that a layer got; V as the weight of a layer of its kind."""
    total = torch.zeros(len(down), len(down), dtype=torch.float64)
    for x in inputs:
        x = x.double()
        if isinstance(module, torch.nn.Conv2d):
            columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
            columns = columns.transpose(1, 2).flatten(0, 1)
        else:
            columns = (x if part is None or part[0] == 0 else x.narrow(-1, *part[1:])).flatten(0, -2)
        total += down.double() @ (columns.T @ columns) @ down.double().T
    return total


def test_calibration_sees_what_each_lora_sees(bench, merge, patched, ours, run_node, monkeypatch, host):
    """Its Grams are those of the inputs that the host's own merge of one LoRA gives each layer, for every prompt."""
    modes, passes = ours("nodes.host.merge.model_modes"), ours("nodes.host.merge.lora_passes")
    found, original = {}, modes.measure

    def spy(work):
        found["prepared"], found["grams"] = work.prepared, original(work)
        return found["grams"]

    monkeypatch.setattr(modes, "measure", spy)
    report = merge("calibrated")[1]
    assert "kept in shared layers" in report
    model, clip, *loras = bench
    prepared = found["prepared"]
    assert len(prepared.targets) > 4
    places = [(t[0], t[1]) if isinstance(t, tuple) else (t, None) for t in prepared.targets]
    modules = {key: host.comfy.utils.get_attr(model.model, key.removesuffix(".weight")) for key, _ in places}
    seeds = [LARGEST_SEED, 0]
    for role, lines in enumerate((CONTENT_LINES, STYLE_LINES)):
        one, inputs, handles = patched(loras[role]), {key: [] for key in modules}, []
        try:
            for key, module in modules.items():
                note = inputs[key].append
                handles.append(module.register_forward_pre_hook(lambda _, args, note=note: note(args[0].clone())))
            for line, seed in zip(lines, seeds):
                positive = run_node("CLIPTextEncode", clip=clip, text=line)[0]
                with torch.inference_mode():
                    passes.generate(one, positive, passes.empty_latent(one, 64), 1, seed, lambda: None)
        finally:
            for handle in handles:
                handle.remove()
        apart = 0
        for index, (key, part) in enumerate(places):
            gauge = prepared.gauges[index]
            down = torch.cat((gauge.down_c, gauge.down_s))
            due = dense_gram(modules[key], down, part, inputs[key])
            assert distance(found["grams"][index][role], due) < CLOSE, (key, role)
            apart += distance(found["grams"][index][1 - role], due) > 100 * CLOSE
        assert apart > len(places) / 2, "the two LoRAs can be told apart by what their layers see"


def test_only_the_operator_adds_out_of_place(ours):
    """What a call of `add_` is for is lost if it is not done in place."""
    with ours("nodes.host.merge.gradients").AddOutOfPlace():
        start = torch.ones(3, requires_grad=True)
        one = start * 1
        saved = one.exp()  # exp keeps its result for the backward pass
        name = saved
        name += one
        assert torch.equal(saved, one.exp()) and torch.equal(name, one.exp() + 1)
        called = start * 1
        called.add_(one)
        part = torch.zeros(3)
        part[1:] += one[1:]
        assert called.tolist() == [2, 2, 2] and part.tolist() == [0, 1, 1]
        (name.sum() + called.sum() + part.sum()).backward()
    torch.testing.assert_close(start.grad, torch.e + 1 + 2 + torch.tensor([0.0, 1, 1]))


def test_training(bench, merge, patched, ours, host, monkeypatch):
    """Teachers, prompts, and the gradient of one step, with and without checkpointing."""
    modes, masks_of = ours("nodes.host.merge.model_modes"), ours("nodes.host.merge.train_masks")
    gradients = ours("nodes.host.merge.gradients")
    seen = {}

    def spy(trainer, *rest):
        seen.update(teachers=trainer.teachers, lessons=trainer.lessons, count=trainer.lessons.count)
        start = trainer.vector.start

        def loss(z, cycle=0.0):
            return trainer.loss(1, cycle, trainer.vector.layers(z))

        def gradient(cycle):
            z = start.clone().requires_grad_()
            with gradients.AddOutOfPlace():
                (found,) = torch.autograd.grad(loss(z, cycle), z)
            return found

        seen["gradient"] = gradient(0.0)
        direction = seen["gradient"] / seen["gradient"].norm()
        with torch.no_grad():
            middle = float(loss(start))
            seen["slopes"] = [
                float(loss(start + h * direction).double() - loss(start - h * direction).double()) / (2 * h)
                for h in STEPS
            ]
        seen["rounding"] = middle * 2**-24 / STEPS[1]
        seen["cycle"] = gradient(0.5)
        with gradients.Checkpointing(trainer.model, trainer.lora):
            seen["checkpointed"] = gradient(0.5)
        return masks_of.train(trainer, *rest)

    monkeypatch.setattr(modes, "train", spy)
    merged, report, _ = merge("train", steps=1, cycle_weight=0.5)
    assert merged and "loss:" in report

    # Central differences along the gradient: of second order, so the two step widths say how far off they are; each
    # loss is a mean over the output of a whole model in float32.
    slope, (wide, narrow) = float(seen["gradient"].norm()), seen["slopes"]
    assert slope > 0 and abs(slope - narrow) <= abs(wide - narrow) + 256 * seen["rounding"] + CLOSE * slope
    assert distance(seen["checkpointed"], seen["cycle"]) < CLOSE
    assert distance(seen["cycle"], seen["gradient"]) > 30 * CLOSE, "or the line above would say nothing"

    model, clip, *loras = bench
    lessons = seen["lessons"]
    assert seen["count"] == len(CONTENT_LINES), "a picture for each line, and a lesson for each picture"
    with torch.inference_mode():
        sample = lessons.latents[0][:1]
        encoders = [clip, clip]
        conds = [
            [masks_of.model_conds(model, encode(encoders[role], line), sample, sample.device, 0) for line in lines]
            for role, lines in enumerate((CONTENT_LINES, STYLE_LINES))
        ]
    for role, lora in enumerate(loras):
        one = patched(lora)
        for number, (x, sigma, _, target) in enumerate(seen["teachers"]):
            with torch.inference_mode():
                lines = conds[role]
                made = [predicted(one, x, sigma, role, cond) for cond in lines]
            assert distance(target[role : role + 1], made[number % len(lines)]) < CLOSE
            for other in [line for i, line in enumerate(made) if i != number % len(lines)]:
                assert distance(target[role : role + 1], other) > 10 * CLOSE, "each picture has its own prompt"
            assert distance(target[1 - role : 2 - role], made[number % len(lines)]) > 10 * CLOSE


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def predicted(model, x, sigma, role, cond):
    conds = {name: each.cond for name, each in cond.items()}
    return model.model.apply_model(x[role : role + 1], sigma[role : role + 1], **conds)
