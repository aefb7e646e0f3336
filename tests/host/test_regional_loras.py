"""LoRAs with a mask in the real host, against each layer's change computed everywhere in float64 and multiplied by the
mask at that layer's size."""

from __future__ import annotations

import re

import pytest
import torch
from shared_models import BOUND, ONE

ARCHITECTURES = ("sd1.5", "sdxl", "z-image", "qwen-image", "flux2")
SIZES = {"flux2": (4, 6)}  # of the latent; 8 x 12 elsewhere


def picture_mask(bench, seed: int = 0, pictures: int = 1) -> torch.Tensor:
    """A random mask, with hard and soft places, eight times as large as the latent."""
    height, width = SIZES.get(bench.name, (8, 12))
    made = torch.rand(pictures, height * 8, width * 8, generator=torch.Generator().manual_seed(seed))
    return (made * 1.6 - 0.3).clamp(0, 1)


def stack(bench, lora, strength=1.0, before=None, **more):
    inputs = {"lora": lora, "strength": strength, **more} | ({} if before is None else {"stack": before})
    return bench.run("StyleLoomLoRAStack", **inputs)[0]


# --- the oracle


def squares(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(height * width,): the mean over squares, in float64."""
    rows, columns = mask.shape[0] // height, mask.shape[1] // width
    return mask.double().reshape(height, rows, width, columns).mean((1, 3)).flatten()


def unet_shares(name, x, mask, text, size):
    if re.search(r"time_embed|label_emb|emb_layers|attn2\.to_[kv]", name):
        return text
    if x.ndim == 4:
        return None  # a map, at its own size
    height, width = size
    while height * width != x.shape[1]:
        height, width = height // 2, width // 2
    return squares(mask, height, width)[:, None]


# What of a layer's tokens is the picture: (tokens before it, tokens of it), or None where nothing is.
def z_image_picture(name, tokens):
    if re.search(r"adaLN|t_embedder|cap_embedder|context_refiner", name):
        return None
    if "x_embedder" in name:
        return 0, 24
    return (0, 24) if "noise_refiner" in name else (tokens - 32, 24)  # filled up to 32


def qwen_picture(name, tokens):
    return None if re.search(r"txt|add_|to_add_out|img_mod|time_text|norm_out", name) else (0, 24)


def flux2_picture(name, tokens):
    if re.search(r"txt|_in\.|modulation|adaLN", name.replace("img_in", "")) and "single_blocks" not in name:
        return None
    return (tokens - 24, 24) if "single_blocks" in name else (0, 24)


PICTURES = {"z-image": z_image_picture, "qwen-image": qwen_picture, "flux2": flux2_picture}
TOKENS = {"z-image": (4, 6), "qwen-image": (4, 6), "flux2": (4, 6)}


def shares(bench, name, x, mask, text):
    """What is to be multiplied with the change of a layer: a number, or a tensor over its tokens."""
    size = SIZES.get(bench.name, (8, 12))
    if bench.name not in PICTURES:
        return unet_shares(name, x, mask, text, size)
    found = PICTURES[bench.name](name, x.shape[1])
    if found is None:
        return text
    made = torch.full((x.shape[1], 1), text, dtype=torch.float64)
    made[found[0] : found[0] + found[1], 0] = squares(mask, *TOKENS[bench.name])
    return made


def changes(model, lora) -> dict[str, torch.Tensor]:
    """Layer -> the change of its weight, in float64, by the host's own merge."""
    made = model.clone()
    import comfy.lora
    import comfy.lora_convert

    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), keys)
    found = {}
    state = model.model.state_dict()
    for target, patch in patches.items():
        key = target[0] if isinstance(target, tuple) else target
        made.add_patches({target: patch}, 1.0)
        found[key] = None
    for key in found:
        zero = torch.zeros(state[key].shape, dtype=torch.float64)
        found[key] = comfy.lora.calculate_weight(made.patches[key], zero, key, intermediate_dtype=torch.float64)
    return {key.removesuffix(".weight"): change for key, change in found.items() if change is not None}


class Truth:
    """A model whose layers add, at each place, the sum of share times change, for the rows of one side."""

    def __init__(self, bench, regions, side: int):
        self.bench, self.side = bench, side
        self.regions = [(changes(bench.model, lora), strength, mask, text) for lora, strength, mask, text in regions]
        self.model = bench.model.clone()
        self.order: list[int] = []
        self.seen = set()

    def layer(self, name, module, forward):
        def run(x):
            y = forward(x).clone()
            each = x.shape[0] // len(self.order)
            for place, side in enumerate(self.order):
                if side != self.side:
                    continue
                rows = slice(place * each, (place + 1) * each)
                for found, strength, mask, text in self.regions:
                    if name in found:
                        self.seen.add(name)
                        y[rows] += (self.part(name, module, found[name], x[rows], mask, text) * strength).to(y.dtype)
            return y

        return run

    def part(self, name, module, change, x, mask, text):
        if isinstance(module, torch.nn.Conv2d):
            made = torch.nn.functional.conv2d(x.double(), change, None, module.stride, module.padding)
            share = squares(mask, *made.shape[2:]).reshape(made.shape[2:])
            return made * share if "adm" not in name else made * text
        made = x.double() @ change.T
        return made * (shares(self.bench, name, x, mask, text) if x.ndim > 2 else text)

    def sample(self, sampling=ONE):
        import comfy.patcher_extension

        modules = dict(self.bench.model.model.named_modules())
        names = {name for found, *_ in self.regions for name in found}

        def note(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
            self.order = list(transformer_options["cond_or_uncond"])
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

        self.model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "truth", note)
        try:
            for name in names:
                modules[name].forward = self.layer(name, modules[name], modules[name].forward)
            return self.bench.plain(self.model, sampling=sampling)
        finally:
            for name in names:
                modules[name].__dict__.pop("forward", None)


@pytest.mark.parametrize("text", ("none", "whole"))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_each_layers_change_times_the_mask(name, text, benches, distance, kit):
    bench = benches(name)
    loras = bench.lora(1), bench.lora(2, rank=3, alpha=None)
    masks = picture_mask(bench, 1), picture_mask(bench, 2)
    regions = [(lora, strength, mask[0], 1.0 if text == "whole" else 0.0)
               for lora, strength, mask in zip(loras, (0.8, 0.5), masks)]  # fmt: skip
    made = stack(bench, loras[0], 0.8, mask=masks[0], text_tokens=text)
    made = stack(bench, loras[1], 0.5, made, mask=masks[1], text_tokens=text)
    model, calls = kit.two_passes.recorded(bench.model)
    ours = bench.asymmetric(model, positive_lora=made, sampling=ONE)
    plain, expected_calls = kit.two_passes.recorded(bench.model)
    assert distance(ours, bench.plain(plain, sampling=ONE)) > 100 * BOUND
    assert calls == expected_calls  # no call of the model more than without LoRAs
    truth = Truth(bench, regions, 0)
    expected = truth.sample()
    assert len(truth.seen) == len(truth.regions[0][0])
    assert distance(ours, expected) < BOUND
