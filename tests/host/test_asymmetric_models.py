"""Asymmetric CFG on models as users have them loaded: compiled, offloaded, stored in 8 bits, with layers of another kind."""

from __future__ import annotations

import copy

import pytest
import torch

SIZES = {"sd1.5": (4, 8, 8), "z-image": (16, 8, 8), "flux2": (128, 4, 4)}


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


class Rig:
    """Samples one step of one architecture in several ways."""

    def __init__(self, run_node, kit, name):
        self.run, self.kit, self.name = run_node, kit, name
        self.fresh = lambda: kit.architectures.make(name, 1)[0]
        _, self.clip, _ = kit.architectures.make(name, 1)
        self.prompts = {
            "positive": run_node("CLIPTextEncode", clip=self.clip, text="a red boat")[0],
            "negative": run_node("CLIPTextEncode", clip=self.clip, text="blurry")[0],
            "cfg": 3.0,
        }
        self.lora = kit.adapters.make(self.fresh(), "lora", seed=1, only=lambda m: isinstance(m, torch.nn.Linear))

    def sample(self, guider, steps=1):
        return self.run(
            "SamplerCustomAdvanced",
            noise=self.run("RandomNoise", noise_seed=3)[0],
            guider=guider,
            sampler=self.run("KSamplerSelect", sampler_name="euler")[0],
            sigmas=self.run("BasicScheduler", model=self.fresh(), scheduler="simple", steps=steps, denoise=1.0)[0],
            latent_image={"samples": torch.zeros(1, *SIZES[self.name])},
        )[0]["samples"]

    def guider(self, model, **loras):
        loras = loras or {"positive_lora": self.lora}
        return self.run("StyleLoomAsymmetricCFGGuider", model=model, **loras, **self.prompts)[0]

    def merged(self, model, lora=None, strength=1.0):
        return self.run("StyleLoomApplyLoRA", model=model, lora=lora or self.lora, strength=strength)[0]

    def truth(self, positive, negative):
        return self.sample(self.run("DualModelGuider", model=positive, model_negative=negative, **self.prompts)[0])

    def plain(self, model, steps=1):
        return self.sample(self.run("CFGGuider", model=model, **self.prompts)[0], steps)


@pytest.fixture(scope="module", params=["sd1.5", "z-image"])
def rig(request, run_node, kit):
    return Rig(run_node, kit, request.param)


@pytest.fixture
def small(run_node, kit):
    """Six blocks: quick to compile."""
    torch._dynamo.reset()
    yield Rig(run_node, kit, "flux2")
    torch._dynamo.reset()


def compiled(model, **options):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager", **options)
    return model


def test_a_compiled_model(small):
    """Compiled before the LoRA came, with it, with another one, and without it again: one graph for all LoRAs of one
    set of layers."""
    model = compiled(small.fresh())
    plain = small.plain(small.fresh())
    assert distance(small.plain(model), plain) < 1e-4
    graphs = []
    for seed in (1, 2, 3):
        lora = small.kit.adapters.make(small.fresh(), "lora", seed=seed)
        truth = small.truth(small.merged(small.fresh(), lora), small.fresh())
        assert distance(small.sample(small.guider(model, positive_lora=lora)), truth) < 1e-4
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert distance(small.plain(model), plain) < 1e-4
    assert graphs[0] == graphs[-1]


def test_compiled_blocks(small):
    """One by one, as nodes for large models do it."""
    model = compiled(small.fresh(), keys=["diffusion_model.single_blocks.1", "diffusion_model.double_blocks.0"])
    truth = small.truth(small.merged(small.fresh()), small.fresh())
    for _ in range(2):
        assert distance(small.sample(small.guider(model)), truth) < 1e-4


def in_eight_bits(model):
    """Weights stored as float8, computed with in float32: what a manual-cast load gives."""
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
    return model


def from_eight_bits(model):
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn).to(torch.float32)
    return model


def test_weights_in_eight_bits(rig):
    """The LoRA is added in full precision: nothing of it is rounded to the storage."""
    truth = rig.truth(rig.merged(from_eight_bits(rig.fresh())), from_eight_bits(rig.fresh()))
    model = in_eight_bits(rig.fresh())
    assert distance(rig.sample(rig.guider(model)), truth) < 1e-4
    stored = {k: v for k, v in model.model.state_dict().items() if v.dtype == torch.float8_e4m3fn}
    assert len(stored) > 20


class PackedLinear(torch.nn.Module):
    """A linear layer whose weight is stored as bytes of another shape, as quantised formats from other packs do."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = torch.nn.Parameter(
            linear.weight.data.contiguous().view(torch.uint8).flatten(), requires_grad=False
        )

    def forward(self, x):
        weight = self.weight.data.view(torch.float32).view(self.out_features, self.in_features)
        return torch.nn.functional.linear(x, weight, self.bias)


def test_linear_layers_of_another_pack(rig):
    model = rig.fresh()
    net = model.model.diffusion_model
    for name, module in list(net.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent = net.get_submodule(name.rpartition(".")[0]) if "." in name else net
            setattr(parent, name.rpartition(".")[2], PackedLinear(module))
    truth = rig.truth(rig.merged(rig.fresh()), rig.fresh())
    assert distance(rig.sample(rig.guider(model)), truth) < 1e-4


def test_an_offloaded_model_with_patches_of_its_own(rig, monkeypatch):
    """Weights stay where they are and are cast, and patched, at each use: the host's low-memory way."""
    import comfy.model_patcher

    own = rig.kit.adapters.make(rig.fresh(), "lora", seed=9, size=0.1, only=lambda m: isinstance(m, torch.nn.Linear))
    truth = rig.truth(rig.merged(rig.merged(rig.fresh(), own)), rig.merged(rig.fresh(), own))
    model = rig.merged(rig.fresh(), own)
    load = comfy.model_patcher.ModelPatcher.load

    def offloaded(self, device_to=None, **options):
        return load(self, device_to, **options | {"lowvram_model_memory": 1, "full_load": False})

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_patcher.ModelPatcher, "load", offloaded)
        ours = rig.sample(rig.guider(model))
        lowered = [m for m in model.model.modules() if getattr(m, "weight_function", None)]
    assert len(lowered) > 20
    assert distance(ours, truth) < 1e-4


def quantise(model):
    """Every linear layer as the host's quantised one, from a state dict of the published form (fp8 and a scale)."""
    import comfy.ops

    linear = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32, full_precision_mm=True).Linear
    net, restored = model.model.diffusion_model, {}
    for name, module in list(net.named_modules()):
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
            state = {
                "weight": (module.weight / scale).to(torch.float8_e4m3fn),
                "weight_scale": scale,
                "comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
            }
            if module.bias is not None:
                state["bias"] = module.bias.data
            made = linear(module.in_features, module.out_features, module.bias is not None)
            made.load_state_dict(state, strict=False)
            net.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], made)
            restored[name] = state["weight"].float() * scale
    return model, restored


def test_a_model_that_the_host_quantised(rig):
    """Weights that are the host's QuantizedTensor: the LoRA is added in full precision, nothing is requantised."""
    from comfy.quant_ops import QuantizedTensor

    with torch.inference_mode():
        model, restored = quantise(rig.fresh())
    with torch.inference_mode(False):
        same = [rig.fresh(), rig.fresh()]
        for other in same:
            for name, weight in restored.items():
                other.model.diffusion_model.get_submodule(name).weight.data = weight.clone()
    quantised = [m for m in model.model.modules() if isinstance(getattr(m, "weight", None), QuantizedTensor)]
    assert len(quantised) > 20
    assert distance(rig.sample(rig.guider(model)), rig.truth(rig.merged(same[0]), same[1])) < 1e-4


def test_a_bypass_lora_and_weight_hooks_at_once(small):
    """The host takes its injections out and puts them back whenever hooks change weights: ours among them."""
    own = small.kit.adapters.make(small.fresh(), "lora", contains="double", seed=9, size=0.1)
    lora = small.kit.adapters.make(small.fresh(), "lora", contains="double", seed=1) | small.kit.adapters.make(
        small.fresh(), "dora", contains="single", seed=2
    )
    truth = small.truth(small.merged(small.merged(small.fresh(), own), lora), small.merged(small.fresh(), own))
    model = small.run("LoraModelLoader", model=small.fresh(), lora=own, strength_model=1.0, bypass=True)[0]
    layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert distance(small.sample(small.guider(model, positive_lora=lora)), truth) < 1e-4
    assert "branch" not in layer.forward.__module__  # with the guider gone, the layer is as the host leaves it


def test_memory_for_the_adapters_is_the_hosts_business(rig, monkeypatch):
    import comfy.model_management

    asked = []
    load = comfy.model_management.load_models_gpu

    def watched(models, *args, **kwargs):
        asked.append(list(models))
        return load(models, *args, **kwargs)

    guider = rig.guider(rig.fresh())
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watched)
    rig.sample(guider)
    size = sum(t.numel() * t.element_size() for key, t in rig.lora.items() if "lora_" in key)
    sizes = [patcher.model_size() for models in asked for patcher in models]
    assert any(abs(found - size) <= 0.1 * size for found in sizes), (sizes, size)


def test_a_guider_of_a_copied_model(rig):
    """Nodes may clone the model that a guider was made for; the guider's own clone is not touched by that."""
    model = rig.fresh()
    guider = rig.guider(model)
    other = copy.copy(model.clone())
    other.model_options["cfg1"] = True
    assert "cfg1" not in guider.model_patcher.model_options
