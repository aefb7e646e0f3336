"""The masked LoRA in layers of the host, against the host's own merge of the same LoRAs, on a model of a few layers."""

from __future__ import annotations

import copy
import sys
import weakref

import pytest
import torch

KINDS = ("lora", "tucker", "loha", "loha_tucker", "lokr", "lokr_factored")
INPUTS = {
    "linear": (3, 5, 12),
    "video": (3, 2, 1, 2, 12),
    "conv": (3, 8, 6, 5),
    "strided": (3, 8, 6, 5),
    "conv3d": (3, 8, 2, 4, 4),
    "qkv": (3, 4, 12),
    "wide": (3, 12),
    "modulation": (3, 12),
}
DROPPED = 1e-4  # what the merge leaves out of each LoRA: directions below this share of the largest


class Net(torch.nn.Module):
    """Layers side by side, called one by one."""

    manual_cast_dtype = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.diffusion_model = torch.nn.ModuleDict(
            {
                "linear": torch.nn.Linear(12, 8),
                "video": torch.nn.Linear(12, 6),
                "conv": torch.nn.Conv2d(8, 6, 3, padding=1),
                "strided": torch.nn.Conv2d(8, 6, 3, stride=2, padding=2, dilation=2),
                "conv3d": torch.nn.Conv3d(8, 6, (1, 3, 3), padding=(0, 1, 1)),
                "qkv": torch.nn.Linear(12, 24),
                "wide": torch.nn.Linear(12, 8),
                "modulation": torch.nn.Linear(12, 16),
            }
        ).to(torch.float64)
        self.requires_grad_(False)

    def get_dtype(self):
        return torch.float64


@pytest.fixture(scope="module")
def ours(pack):
    """Our module of that name."""
    return lambda name: sys.modules[f"{pack.__name__}.{name}"]


@pytest.fixture(scope="module")
def key_map(host):
    from comfy.utils import swap_scale_shift

    def weight(name):
        return f"diffusion_model.{name}.weight"

    return {f"diffusion_model.{name}": weight(name) for name in ("linear", "video", "conv", "strided", "conv3d")} | {
        "q": (weight("qkv"), (0, 0, 8)),
        "k": (weight("qkv"), (0, 8, 8)),
        "v": (weight("qkv"), (0, 16, 8)),
        "half": (weight("wide"), (1, 4, 5)),
        "norm_out": (weight("modulation"), None, swap_scale_shift),
    }


@pytest.fixture(scope="module")
def model(host):
    from comfy.model_patcher import ModelPatcher

    def made():
        cpu = torch.device("cpu")
        return ModelPatcher(Net(), load_device=cpu, offload_device=cpu)

    return made


def pair(stem, out, columns, seed, rank=2):
    g = torch.Generator().manual_seed(seed)
    return {
        f"{stem}.lora_down.weight": torch.randn(rank, *columns, generator=g),
        f"{stem}.lora_up.weight": torch.randn(out, rank, *(1 for _ in columns[1:]), generator=g),
    }


@pytest.fixture(scope="module")
def loras(request, kit, model):
    """Content and style of one kind of adapter; parts of layers are plain LoRAs. Each has a layer for itself."""
    made, kind = [], getattr(request, "param", "lora")
    for seed in (1, 2):
        lora = {}
        for name in ("linear", "video", "conv", "strided"):
            lora |= kit.adapters.make(model(), kind, contains=name, rank=2, seed=seed)
        for n, name in enumerate(("q", "k", "v")):
            lora |= pair(name, 8, (12,), 10 * seed + n)
        lora |= pair("half", 8, (5,), 20 + seed) | pair("norm_out", 16, (12,), 30 + seed)
        lora |= pair("diffusion_model.conv3d", 6, (8, 1, 3, 3), 40 + seed)
        made.append(lora)
    made[0] = {key: value for key, value in made[0].items() if "strided" not in key and not key.startswith("v.")}
    made[1] = {key: value for key, value in made[1].items() if not key.startswith("half")}
    return made


@pytest.fixture(scope="module")
def prepared(loras, key_map, ours):
    read = ours("weights.lora.reading").read_lora
    content, style = (read(lora, name, key_map) for lora, name in zip(loras, ("content", "style")))
    return ours("weights.merge.two_loras").prepare(content, style, (0.8, -0.6))


def outputs(net, rows=slice(None)):
    g = torch.Generator().manual_seed(7)
    inputs = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in INPUTS.items()}
    return {name: net[name](x[rows]) for name, x in inputs.items()}


def merged_by_the_host(model, patches):
    """The net with (patches, strength), … in its weights."""
    patcher = model()
    for each, strength in patches:
        assert len(patcher.add_patches(each, strength)) == len(each)
    patcher.patch_model()
    return patcher.model.diffusion_model


def masks_for(prepared):
    g = torch.Generator().manual_seed(3)
    return [torch.rand(len(x.down_c) + len(x.down_s), generator=g) * 1.5 for x in prepared.gauges]


def folded(host, prepared, masks):
    """Host patches of a merge: each mask in the columns of `up`, the targets as the key map gives them."""
    adapter, made = host.comfy.weight_adapter.LoRAAdapter, {}
    for target, gauge, mask in zip(prepared.targets, prepared.gauges, masks):
        up, down = torch.cat((gauge.up_c, gauge.up_s), 1) * mask, torch.cat((gauge.down_c, gauge.down_s))
        made[target] = adapter(set(), (up, down, None, None, None, None))
    for target, (_, change) in prepared.one_sided.items():
        made[target] = adapter(set(), (change.up, change.down, None, None, None, None))
    return made


@pytest.mark.parametrize("loras", KINDS, indirect=True)
def test_content_style_and_merged_rows_are_what_the_host_merges(loras, prepared, key_map, host, model, ours):
    """In one call: row 0 has the content LoRA alone, row 1 the style LoRA alone, row 2 both under their masks.

    The first two are held against the LoRA files as the host reads them: the merge leaves out at most `DROPPED` of the
    largest direction for each rank. The third against the same factors; the host merges in float32.
    """
    masked, masks = ours("nodes.host.merge.masked_lora"), masks_for(prepared)
    patcher = model()
    plain = copy.deepcopy(patcher.model.diffusion_model)
    with masked.MaskedLoRA(patcher, masked.stacked_ranks(prepared)) as lora:
        lora.use([masked.CONTENT, masked.STYLE, masked.MERGED], masks)
        found = outputs(patcher.model.diffusion_model)
        lora.check_called()
        assert patcher.additional_models, "the host counts and moves what the LoRAs need"
    files = [host.comfy.lora.load_lora(dict(lora), key_map) for lora in loras]
    truths = [
        merged_by_the_host(model, [(files[0], 0.8)]),
        merged_by_the_host(model, [(files[1], -0.6)]),
        merged_by_the_host(model, [(folded(host, prepared, masks), 1.0)]),
    ]
    moved = 0
    for row, truth in enumerate(truths):
        due, before = outputs(truth, slice(row, row + 1)), outputs(plain, slice(row, row + 1))
        for name in INPUTS:
            change = float((due[name] - before[name]).norm())
            moved += change > 0
            rank = 16  # more than any layer here has directions
            bound = (DROPPED * rank if row < 2 else 0) * change + 64 * 2**-24 * float(due[name].norm() + change)
            assert float((found[name][row : row + 1] - due[name]).norm()) <= bound, (row, name)
    assert moved == 3 * len(INPUTS) - 3 + 1, "only strided and wide are without a change somewhere"
    after = outputs(patcher.model.diffusion_model)
    assert all(torch.equal(after[name], value) for name, value in outputs(plain).items())
    assert not patcher.additional_models


def test_training_on_a_class_that_is_in_no_table(prepared, model, ours):
    """It may turn the rows of its batch round between two layers, and their number says nothing of it."""
    masked, train_masks = ours("nodes.host.merge.masked_lora"), ours("nodes.host.merge.train_masks")
    patcher = model()
    net = patcher.model.diffusion_model
    patcher.model.model_sampling = None
    patcher.model.get_dtype_inference = lambda: torch.float32
    patcher.model.apply_model = lambda x, sigma, **_: net["linear"](x.flip(0)).flip(0)
    x, sigma = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(7)).double(), torch.ones(2)
    rows = [masked.CONTENT, masked.STYLE]
    with masked.MaskedLoRA(patcher, masked.stacked_ranks(prepared)) as lora:
        trainer = train_masks.Trainer(patcher, lora, None, None)
        both = trainer.predict(x, sigma, rows, [{}, {}])
        for i in range(2):
            alone = trainer.predict(x[i : i + 1], sigma[i : i + 1], rows[i : i + 1], [{}])
            torch.testing.assert_close(both[i : i + 1], alone)


def test_nothing_is_kept_when_the_block_is_left(prepared, model, ours):
    masked = ours("nodes.host.merge.masked_lora")
    patcher = model()
    with masked.MaskedLoRA(patcher, masked.stacked_ranks(prepared)) as lora:
        outputs(patcher.model.diffusion_model)
        tensors = [weakref.ref(term.down) for term in lora._terms]
    assert tensors and not any(tensor() is not None for tensor in tensors)


def test_a_layer_that_the_model_does_not_call_is_said(prepared, model, ours):
    """As the host does with the down-projections of INT8 models: what the LoRA does there would be missing."""
    masked, errors = ours("nodes.host.merge.masked_lora"), ours("weights.errors")
    patcher = model()
    net = patcher.model.diffusion_model
    with masked.MaskedLoRA(patcher, masked.stacked_ranks(prepared)) as lora:
        for name in set(INPUTS) - {"conv"}:
            net[name](torch.zeros(INPUTS[name], dtype=torch.float64))
        torch.nn.functional.conv2d(torch.zeros(INPUTS["conv"], dtype=torch.float64), net["conv"].weight)
        with pytest.raises(errors.StyleLoomError, match="1 layers .* not called by the model: diffusion_model.conv"):
            lora.check_called()


def test_a_layer_that_the_host_computes_with_its_activation(kit, host, model, ours):
    """INT8: as that layer is called while the block is open, the LoRA acts. The truth adds its product by hand."""
    masked, patcher = ours("nodes.host.merge.masked_lora"), model()
    net = patcher.model.diffusion_model
    with torch.inference_mode():
        net["linear"] = kit.int8_layers.int8_linear(torch.nn.Linear(12, 8))
        x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
        plain = host.comfy.ops.linear_input_act(net["linear"], x, "swiglu")
        g = torch.Generator().manual_seed(2)
        down, up = torch.randn(2, 12, generator=g), torch.randn(8, 2, generator=g)
        change = ours("weights.lora.low_rank").LowRank(down, up)
        ranks = [masked.StackedRanks("diffusion_model.linear.weight", change, 2)]
        with masked.MaskedLoRA(patcher, ranks) as lora:
            lora.use([masked.CONTENT, masked.STYLE, masked.CONTENT])
            found = host.comfy.ops.linear_input_act(net["linear"], x, "swiglu")
            lora.check_called()
        gate, wide = x.double().chunk(2, -1)
        due = (gate * torch.sigmoid(gate) * wide) @ down.double().T @ up.double().T
        due[1] = 0
        assert float((found - plain - due).norm()) < 1e-5 * float(due.norm() + plain.norm())
        assert torch.equal(host.comfy.ops.linear_input_act(net["linear"], x, "swiglu"), plain)


def test_a_layer_of_another_model_is_said(prepared, model, ours):
    masked, errors = ours("nodes.host.merge.masked_lora"), ours("weights.errors")
    patcher = model()
    del patcher.model.diffusion_model["conv"]
    with pytest.raises(errors.StyleLoomError, match="diffusion_model.conv is not in this model"):
        with masked.MaskedLoRA(patcher, masked.stacked_ranks(prepared)):
            pass
    assert not any("forward" in module.__dict__ for module in patcher.model.modules())
