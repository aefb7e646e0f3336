"""Every kind of adapter on one branch only, against the host's own merge of the same adapter."""

from __future__ import annotations

import pytest
import torch

SIZES = {"sd1.5": (4, 8, 8), "z-image": (16, 8, 8), "flux2": (128, 4, 4)}
# All kinds where there are convolutions too; on the transformers those whose arithmetic differs.
KINDS = ("lora", "loha", "lokr_factored", "oft", "glora", "diff")
ONE_PASS = {"sd1.5": (*KINDS, "tucker", "loha_tucker", "lokr", "lokr_tucker", "boft"), "z-image": KINDS, "flux2": KINDS}


@pytest.fixture(scope="module")
def parts(run_node):
    made = {}

    def get(name):
        if name not in made:
            model, clip, _ = run_node("StyleLoomKitModel", architecture=name, seed=1)
            prompts = [run_node("CLIPTextEncode", clip=clip, text=text)[0] for text in ("a red boat", "blurry")]
            made[name] = (model, *prompts)
        return made[name]

    return get


@pytest.fixture(scope="module")
def sample(run_node, parts):
    def through(name, guider, steps=1):
        noise = run_node("RandomNoise", noise_seed=3)[0]
        sigmas = run_node("BasicScheduler", model=parts(name)[0], scheduler="simple", steps=steps, denoise=1.0)[0]
        return run_node(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=run_node("KSamplerSelect", sampler_name="euler")[0],
            sigmas=sigmas,
            latent_image={"samples": torch.zeros(1, *SIZES[name])},
        )[0]["samples"]

    return through


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def compare(run_node, kit, parts, sample):
    """(ours against the truth, ours against the model without the LoRA, report), the LoRA on the positive side.

    The truth's two models share nothing with the one under test; the host patches and unpatches the first each time.
    """
    others, plains = {}, {}

    def run(name, lora, strength=1.0, entries=None, merged=None):
        model, positive, negative = parts(name)
        common = {"positive": positive, "negative": negative, "cfg": 3.0}
        guider, report = run_node(
            "StyleLoomAsymmetricCFGGuider",
            model=model,
            positive_lora=entries or lora,
            positive_strength=strength,
            **common,
        )
        ours = sample(name, guider)
        if name not in others:
            others[name] = kit.architectures.make(name, 1)[0], kit.architectures.make(name, 1)[0]
            plains[name] = sample(name, run_node("CFGGuider", model=others[name][1], **common)[0])
        patched, bare = others[name]
        for one, much in merged or [(lora, strength)]:
            patched = run_node("StyleLoomApplyLoRA", model=patched, lora=one, strength=much)[0]
        truth = sample(name, run_node("DualModelGuider", model=patched, model_negative=bare, **common)[0])
        return distance(ours, truth), distance(truth, plains[name]), report

    return run


@pytest.fixture(scope="module")
def mixed(kit, parts):
    """A LoRA with another kind on each layer, in turn: (of the layers with `contains`, kinds) → LORA_MODEL. What each
    kind does to one layer, test_adapter_kinds.py compares; here they meet in a model."""

    def make(name, kinds, contains="", seed=1):
        model, lora = parts(name)[0], {}
        places = {id(module): i for i, module in enumerate(kit.adapters.modules_of(model, contains).values())}
        for number, kind in enumerate(kinds):
            mine = lambda module, number=number: places[id(module)] % len(kinds) == number  # noqa: E731
            lora |= kit.adapters.make(model, kind, contains=contains, seed=seed, size=0.2, only=mine)
        return lora

    return make


@pytest.mark.parametrize(("name", "strength"), [("sd1.5", 1.0), ("sd1.5", -0.6), ("z-image", 1.0), ("flux2", 1.0)])
def test_every_kind_in_one_pass(name, strength, compare, mixed):
    """Whatever the host's merge makes of a strength, for OFT its square, ours makes too."""
    error, moved, report = compare(name, mixed(name, ONE_PASS[name]), strength)
    assert moved > 0.01
    assert error < 1e-4, report
    assert "weight hooks" not in report


@pytest.mark.parametrize("name", ("sd1.5", "flux2"))
def test_kinds_that_need_the_weight_go_through_the_hosts_hooks(name, compare, mixed):
    error, moved, report = compare(name, mixed(name, ("dora", "set"), contains="blocks"))
    assert moved > 0.01
    assert error < 1e-4, report
    assert "weight hooks" in report and "DoRA" in report and "replaces the weight" in report


def test_the_first_glora_form(compare, kit, parts):
    """On a linear layer in one pass; on a convolution over several pixels it needs the weight."""
    model = parts("sd1.5")[0]
    lora = kit.adapters.make(model, "glora_old", contains="input_blocks.1", seed=1, size=0.2)
    error, moved, report = compare("sd1.5", lora)
    assert moved > 0.001 and error < 1e-4, report
    assert "in one pass" in report and "weight hooks" in report


@pytest.mark.parametrize("name", SIZES)
def test_biases_and_norms(name, compare, kit, parts):
    model = parts(name)[0]
    lora = kit.adapters.bias_differences(model) | kit.adapters.norm_differences(model)
    error, moved, report = compare(name, lora)
    assert moved > 0.001
    assert error < 1e-4, report  # Z-Image's attention computes its query and key norms itself: seen in the first pass


def test_mixed_kinds_ranks_and_hooks_in_one_lora(compare, kit, parts):
    model = parts("sd1.5")[0]
    lora = (
        kit.adapters.make(model, "lora", contains="attn1", rank=3, alpha=None)
        | kit.adapters.make(model, "lora", contains="attn2.to_k", rank=7, alpha=1.0)
        | kit.adapters.make(model, "lokr", contains="ff.net")
        | kit.adapters.make(model, "dora", contains="attn2.to_v")
        | kit.adapters.make(model, "oft", contains="proj_in")
        | kit.adapters.bias_differences(model, "proj_out")
    )
    error, moved, report = compare("sd1.5", lora, strength=0.7)
    assert moved > 0.01 and error < 1e-4, report


def test_a_stack_of_kinds_on_the_same_layers_keeps_the_order_of_merging(compare, kit, run_node, parts):
    """A rotation after a LoRA turns the LoRA's part too; GLoRA multiplies what came before."""
    model = parts("sd1.5")[0]
    kinds = ("lora", "oft", "glora", "boft", "lora", "glora")
    loras = [kit.adapters.make(model, kind, contains="output_blocks", seed=i, size=0.2) for i, kind in enumerate(kinds)]
    strengths = [1.0, 0.9, 0.8, 1.1, 0.6, 0.5]
    stack = ()
    for lora, strength in zip(loras, strengths, strict=True):
        stack = run_node("StyleLoomLoRAStack", lora=lora, strength=strength, stack=stack)[0]
    error, moved, report = compare("sd1.5", None, entries=stack, merged=list(zip(loras, strengths, strict=True)))
    assert moved > 0.01 and error < 1e-4, report


@pytest.mark.parametrize(("name", "contains"), [("z-image", "attention"), ("flux2", "attn")])
def test_slices_of_fused_layers(name, contains, compare, parts, host):
    """Diffusers' names for q, k and v, which the host's key map places into parts of one layer."""
    model = parts(name)[0]
    key_map = host.comfy.lora.model_lora_keys_unet(model.model, {})
    shapes = {key: value.shape for key, value in model.model.state_dict().items()}
    generator, lora, sliced = torch.Generator().manual_seed(4), {}, 0
    for stem, target in key_map.items():
        if not stem.startswith("transformer.") or isinstance(target, str):
            continue
        key, part = target[0], target[1]
        shape = list(shapes[key])
        if part is not None:
            shape[part[0]], sliced = part[2], sliced + 1
        lora[f"{stem}.lora_A.weight"] = torch.randn(3, shape[1], generator=generator) / shape[1] ** 0.5
        lora[f"{stem}.lora_B.weight"] = torch.randn(shape[0], 3, generator=generator) * 0.2
    assert sliced > 5
    error, moved, report = compare(name, lora)
    assert moved > 0.01 and error < 1e-4, report
    assert "weight hooks" not in report


def test_swapped_rows_of_a_final_modulation(compare, parts, host):
    """FLUX's norm_out is read by the host with its halves swapped."""
    model = parts("flux2")[0]
    key_map = host.comfy.lora.model_lora_keys_unet(model.model, {})
    stem, target = next(
        (s, t) for s, t in key_map.items() if not isinstance(t, str) and len(t) > 2 and "weight" in t[0]
    )
    out, inside = model.model.state_dict()[target[0]].shape
    generator = torch.Generator().manual_seed(1)
    lora = {
        f"{stem}.lora_A.weight": torch.randn(4, inside, generator=generator) / inside**0.5,
        f"{stem}.lora_B.weight": torch.randn(out, 4, generator=generator),
    }
    error, moved, report = compare("flux2", lora)
    assert moved > 0.001 and error < 1e-4, report
