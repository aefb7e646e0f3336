"""Asymmetric CFG on models as users have them loaded: compiled, offloaded, in 8 bits, with layers of another kind."""

from __future__ import annotations

import copy

import pytest
import torch
from shared_models import BOUND, ONE


@pytest.fixture(params=["sd1.5", "z-image"])
def rig(request, benches):
    return benches(request.param)


@pytest.fixture
def small(benches):
    """Three blocks: quick to compile."""
    torch._dynamo.reset()
    yield benches("flux2")
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def linear_lora(kit):
    """A LoRA for linear layers alone: some of these formats have no convolutions."""
    return lambda bench, **more: bench.lora(more.pop("seed", 1), only=lambda m: isinstance(m, torch.nn.Linear), **more)


def compiled(model, **options):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager", **options)
    return model


def test_a_compiled_model(small, distance):
    """Compiled before the LoRA came, with it, with another one, and without it again: one graph for all LoRAs of one
    set of layers."""
    model = compiled(small.fresh())
    plain = small.plain(sampling=ONE)
    assert distance(small.plain(model, sampling=ONE), plain) < BOUND
    graphs = []
    for seed in (1, 2):
        lora = small.lora(seed)
        truth = small.truth([(lora, 1.0)], sampling=ONE)
        assert distance(small.asymmetric(model=model, positive_lora=lora, sampling=ONE), truth) < BOUND
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert distance(small.plain(model, sampling=ONE), plain) < BOUND
    assert graphs[0] == graphs[-1]


def test_compiled_blocks(small, distance, linear_lora):
    """One by one, as nodes for large models do it."""
    model = compiled(small.fresh(), keys=["diffusion_model.single_blocks.1", "diffusion_model.double_blocks.0"])
    lora = linear_lora(small)
    truth = small.truth([(lora, 1.0)], sampling=ONE)
    for _ in range(2):
        assert distance(small.asymmetric(model=model, positive_lora=lora, sampling=ONE), truth) < BOUND


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


def test_weights_in_eight_bits(rig, distance, linear_lora):
    """The LoRA is added in full precision: nothing of it is rounded to the storage."""
    lora = linear_lora(rig)
    truth = rig.two_models(rig.with_loras(from_eight_bits(rig.fresh()), (lora, 1.0)), from_eight_bits(rig.fresh()),
                           sampling=ONE)  # fmt: skip
    model = in_eight_bits(rig.fresh())
    assert distance(rig.asymmetric(model=model, positive_lora=lora, sampling=ONE), truth) < BOUND
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


def test_linear_layers_of_another_pack(rig, distance, linear_lora):
    model, lora = rig.fresh(), linear_lora(rig)
    net = model.model.diffusion_model
    for name, module in list(net.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent = net.get_submodule(name.rpartition(".")[0]) if "." in name else net
            setattr(parent, name.rpartition(".")[2], PackedLinear(module))
    truth = rig.truth([(lora, 1.0)], sampling=ONE)
    assert distance(rig.asymmetric(model=model, positive_lora=lora, sampling=ONE), truth) < BOUND


def test_an_offloaded_model_with_patches_of_its_own(rig, distance, linear_lora, monkeypatch):
    """Weights stay where they are and are cast, and patched, at each use: the host's low-memory way."""
    import comfy.model_patcher

    lora, own = linear_lora(rig), (linear_lora(rig, seed=9, size=0.1), 1.0)
    truth = rig.truth([own, (lora, 1.0)], [own], sampling=ONE)
    model = rig.with_loras(rig.fresh(), own)
    load = comfy.model_patcher.ModelPatcher.load

    def offloaded(self, device_to=None, **options):
        return load(self, device_to, **options | {"lowvram_model_memory": 1, "full_load": False})

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_patcher.ModelPatcher, "load", offloaded)
        ours = rig.asymmetric(model=model, positive_lora=lora, sampling=ONE)
        lowered = [m for m in model.model.modules() if getattr(m, "weight_function", None)]
    assert len(lowered) > 20
    assert distance(ours, truth) < BOUND


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


def test_a_model_that_the_host_quantised(rig, distance, linear_lora):
    """Weights that are the host's QuantizedTensor: the LoRA is added in full precision, nothing is requantised."""
    from comfy.quant_ops import QuantizedTensor

    lora = linear_lora(rig)
    with torch.inference_mode():
        model, restored = quantise(rig.fresh())
    with torch.inference_mode(False):
        same = [rig.fresh(), rig.fresh()]
        for other in same:
            for name, weight in restored.items():
                other.model.diffusion_model.get_submodule(name).weight.data = weight.clone()
    quantised = [m for m in model.model.modules() if isinstance(getattr(m, "weight", None), QuantizedTensor)]
    assert len(quantised) > 20
    ours = rig.asymmetric(model=model, positive_lora=lora, sampling=ONE)
    assert distance(ours, rig.two_models(rig.with_loras(same[0], (lora, 1.0)), same[1], sampling=ONE)) < BOUND


def test_a_bypass_lora_and_weight_hooks_at_once(small, distance):
    """The host takes its injections out and puts them back whenever hooks change weights: ours among them."""
    own = small.lora(9, contains="double", size=0.1)
    lora = small.lora(1, contains="double") | small.lora(2, kind="dora", contains="single")
    truth = small.truth([(own, 1.0), (lora, 1.0)], [(own, 1.0)], sampling=ONE)
    model = small.run("LoraModelLoader", model=small.fresh(), lora=own, strength_model=1.0, bypass=True)[0]
    layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert distance(small.asymmetric(model=model, positive_lora=lora, sampling=ONE), truth) < BOUND
    assert "branch" not in layer.forward.__module__  # with the guider gone, the layer is as the host leaves it


def test_memory_for_the_adapters_is_the_hosts_business(rig, linear_lora, monkeypatch):
    import comfy.model_management

    asked = []
    load = comfy.model_management.load_models_gpu

    def watched(models, *args, **kwargs):
        asked.append(list(models))
        return load(models, *args, **kwargs)

    lora = linear_lora(rig)
    guider = rig.guider(positive_lora=lora)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watched)
    rig.through(guider, **ONE)
    size = sum(t.numel() * t.element_size() for key, t in lora.items() if "lora_" in key)
    sizes = [patcher.model_size() for models in asked for patcher in models]
    assert any(abs(found - size) <= 0.1 * size for found in sizes), (sizes, size)


def test_a_guider_of_a_copied_model(rig, linear_lora):
    """Nodes may clone the model that a guider was made for; the guider's own clone is not touched by that."""
    model = rig.fresh()
    guider = rig.guider(model, positive_lora=linear_lora(rig))
    other = copy.copy(model.clone())
    other.model_options["cfg1"] = True
    assert "cfg1" not in guider.model_patcher.model_options
