"""LoRAs with a mask in the real host, against each layer's change computed everywhere in float64 and multiplied by the
mask at that layer's size."""

from __future__ import annotations

import re

import pytest
import torch
from shared_models import BOUND, ONE
from test_asymmetric_models import compiled
from test_rows_of_a_call import coupled

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
    """(frames * height * width,): the mean over squares of (frames, ...) or of one picture, in float64."""
    rows, columns = mask.shape[-2] // height, mask.shape[-1] // width
    return mask.double().reshape(-1, height, rows, width, columns).mean((2, 4)).flatten()


def unet_shares(name, x, mask, text, size):
    if re.search(r"time_embed|label_emb|emb_layers|attn2\.to_[kv]", name):
        return text
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


def wan_picture(name, tokens):
    return None if re.search(r"text_embedding|time_|cross_attn\.[kv]$", name) else (0, 72)


PICTURES = {"wan": wan_picture, "z-image": z_image_picture, "qwen-image": qwen_picture, "flux2": flux2_picture}


def shares(bench, name, x, mask, text, size):
    """What is to be multiplied with the change of a layer: a number, or a tensor over its tokens."""
    if bench.name not in PICTURES:
        return unet_shares(name, x, mask, text, size)
    found = PICTURES[bench.name](name, x.shape[1])
    if found is None:
        return text
    made = torch.full((x.shape[1], 1), text, dtype=torch.float64)
    made[found[0] : found[0] + found[1], 0] = squares(mask, 4, 6)
    return made


def changes(model, lora, strength) -> dict[str, torch.Tensor]:
    """Layer -> the change of its weight at a strength, in float64, by the host's own merge."""
    made = model.clone()
    import comfy.lora
    import comfy.lora_convert

    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), keys)
    found = {}
    # The host's OFT mixes dtypes where it is asked for float64, and leaves the weight as it is.
    dtype = torch.float32 if any("oft_blocks" in key for key in lora) else torch.float64
    state = model.model.state_dict()
    for target, patch in patches.items():
        key = target[0] if isinstance(target, tuple) else target
        made.add_patches({target: patch}, strength)
        found[key] = None
    for key in found:
        weight = state[key].double()
        merged = comfy.lora.calculate_weight(made.patches[key], weight.clone(), key, intermediate_dtype=dtype)
        found[key] = merged - weight
    return {key.removesuffix(".weight"): change for key, change in found.items() if change is not None}


class Truth:
    """A model whose layers add, at each place, the sum of share times change, for the rows of one side."""

    def __init__(self, bench, regions, side: int, size=None):
        self.bench, self.side = bench, side
        self.size = size or SIZES.get(bench.name, (8, 12))  # of what the model is shown of the latent
        self.regions = [(changes(bench.model, lora, strength), mask, text) for lora, strength, mask, text in regions]
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
                for found, mask, text in self.regions:
                    if name in found:
                        self.seen.add(name)
                        y[rows] += self.part(name, module, found[name], x[rows], mask, text).to(y.dtype)
            return y

        return run

    def part(self, name, module, change, x, mask, text):
        if isinstance(module, torch.nn.Conv2d):
            made = torch.nn.functional.conv2d(x.double(), change, None, module.stride, module.padding)
            share = squares(mask, *made.shape[2:]).reshape(made.shape[2:])  # a map is the whole picture
            return made * share
        made = x.double() @ change.T
        return made * (shares(self.bench, name, x, mask, text, self.size) if x.ndim > 2 else text)

    def sample(self, positive=None, negative=None):
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
            guider = self.bench.run("CFGGuider", model=self.model, positive=positive or self.bench.positive,
                                    negative=negative or self.bench.negative, cfg=self.bench.kit.two_passes.CFG)[0]
            return self.bench.through(guider, **ONE)
        finally:
            for name in names:
                modules[name].__dict__.pop("forward", None)


@pytest.mark.parametrize(("name", "text"), [*((name, "none") for name in ARCHITECTURES), ("flux2", "whole")])
def test_equals_each_layers_change_times_the_mask(name, text, benches, distance, kit):
    """Two LoRAs of one side, each in its region, in as many calls of the model as without LoRAs."""
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
    assert calls == expected_calls
    truth = Truth(bench, regions, 0)
    expected = truth.sample()
    assert len(truth.seen) == len(truth.regions[0][0])
    assert distance(ours, expected) < BOUND


@pytest.mark.parametrize("kind", ("loha", "lokr", "oft", "diff", "tucker"))
def test_other_kinds(kind, bench, distance):
    lora, mask = bench.lora(3, kind=kind), picture_mask(bench, 3)
    ours = bench.asymmetric(positive_lora=stack(bench, lora, 0.7, mask=mask), sampling=ONE)
    assert distance(ours, Truth(bench, [(lora, 0.7, mask[0], 0.0)], 0).sample()) < BOUND


def test_the_negative_side(bench, distance):
    lora, mask = bench.lora(1), picture_mask(bench, 1)
    ours = bench.asymmetric(negative_lora=lora, negative_mask=mask, negative_strength=0.6, sampling=ONE)
    assert distance(ours, Truth(bench, [(lora, 0.6, mask[0], 0.0)], 1).sample()) < BOUND


def test_masks_that_cover_all_or_nothing(benches, distance):
    """All of it, text as well: the LoRA as it is, with its window and keyframes. Nothing of it: the model as it is."""
    bench = benches("flux2")
    lora, other = bench.lora(1), bench.lora(2)
    keyframes = bench.run("CreateHookKeyframe", strength_mult=0.5, start_percent=0.0)[0]
    window = {"start_percent": 0.0, "end_percent": 0.4, "keyframes": keyframes}
    last = stack(bench, other, 0.3)

    def sample(**more):
        return bench.asymmetric(positive_lora=stack(bench, lora, 0.8, last, **window, **more))

    ones = torch.ones(1, 8, 8)
    assert distance(sample(mask=ones, text_tokens="whole"), sample()) < BOUND
    assert distance(sample(mask=0 * ones), bench.asymmetric(positive_lora=last)) < BOUND


def test_inpainting_a_picture_that_is_there(benches, distance):
    """A noise mask and a denoise below 1 change nothing of where a LoRA acts; what is not painted stays."""
    bench = benches("flux2")
    lora, latent = bench.lora(1), bench.latent()
    shape = latent["samples"].shape
    latent["samples"] = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    latent["noise_mask"] = torch.zeros(1, 1, *shape[-2:])
    latent["noise_mask"][..., : shape[-1] // 2] = 1

    def paint(**loras):
        return bench.run(
            "StyleLoomAsymmetricCFGSampler", model=bench.model, positive=bench.positive, negative=bench.negative, seed=5,
            latent_image=latent, steps=3, cfg=3.5, sampler_name="euler", scheduler="simple", denoise=0.6, **loras,
        )[0]["samples"]  # fmt: skip

    without, ones = paint(), torch.ones(1, 8, 8)
    whole = paint(positive_lora=stack(bench, lora, mask=ones, text_tokens="whole"))
    assert distance(whole, paint(positive_lora=stack(bench, lora))) < BOUND < distance(whole, without)
    assert distance(paint(positive_lora=stack(bench, lora, mask=0 * ones)), without) < BOUND
    kept = latent["noise_mask"].expand(shape) == 0
    assert torch.equal(whole[kept], without[kept])


def test_masks_multiply(bench, distance):
    lora, one, two = bench.lora(1), picture_mask(bench, 1), torch.ones(1, 64, 96)
    two[:, :, :48] = 0
    both = bench.asymmetric(positive_lora=stack(bench, lora, mask=one), positive_mask=two, sampling=ONE)
    assert distance(both, bench.asymmetric(positive_lora=stack(bench, lora, mask=one * two), sampling=ONE)) < BOUND


@pytest.mark.parametrize("windows", (False, True))
def test_one_mask_for_each_picture(windows, bench, distance):
    """Each picture of a batch comes out as with its own mask alone, also where windows show some of them at a time."""
    lora, masks = bench.lora(1), picture_mask(bench, 1, 4)
    model = bench.model
    if windows:
        model = bench.run("ContextWindowsManual", model=model, context_length=2, context_overlap=1, dim=0,
                          context_schedule="standard_static", fuse_method="flat",
                          causal_window_fix=True)[0]  # fmt: skip
    with_all = bench.asymmetric(model, bench.latent(4), positive_lora=stack(bench, lora, mask=masks), sampling=ONE)
    for number in range(4):
        mask = masks[number : number + 1]
        alone = bench.asymmetric(latent=bench.latent(4), positive_lora=stack(bench, lora, mask=mask), sampling=ONE)
        assert distance(with_all[number], alone[number]) < BOUND


@pytest.mark.parametrize("at_the_end", (False, True))
def test_rows_that_a_cross_attention_repeats(at_the_end, bench, distance):
    """Each copy has the mask of the picture that it is a copy of."""
    model = coupled(bench.model, [bench.prompt("a green field")[0][0]], at_the_end)
    lora, masks = bench.lora(1), picture_mask(bench, 1, 2)

    def sample(mask):
        return bench.asymmetric(model, bench.latent(2), positive_lora=stack(bench, lora, mask=mask), sampling=ONE)

    both = sample(masks)
    for number in range(2):
        assert distance(both[number], sample(masks[number : number + 1])[number]) < BOUND


def test_a_conditioning_of_an_area(bench, distance):
    """It sees its part of the mask."""
    lora, mask = bench.lora(1), picture_mask(bench, 1)
    area = bench.run("ConditioningSetArea", conditioning=bench.positive, width=64, height=64, x=32, y=0,
                     strength=1.0)[0]  # fmt: skip
    ours = bench.asymmetric(positive=area, negative=area, positive_lora=stack(bench, lora, mask=mask), sampling=ONE)
    truth = Truth(bench, [(lora, 1.0, mask[0, :, 32:], 0.0)], 0, size=(8, 8))
    assert distance(ours, truth.sample(positive=area, negative=area)) < BOUND


def test_a_compiled_block(benches, distance):
    torch._dynamo.reset()
    bench = benches("flux2")
    made = stack(bench, bench.lora(1, contains="single_blocks.1"), mask=picture_mask(bench, 1))
    model = compiled(bench.fresh(), keys=["diffusion_model.single_blocks.1"])
    ours = bench.asymmetric(model, positive_lora=made, sampling=ONE)
    torch._dynamo.reset()
    assert distance(ours, bench.asymmetric(positive_lora=made, sampling=ONE)) < BOUND


# --- a video


@pytest.fixture(scope="module")
def video(benches, kit, run_node):
    """A small Wan with three latent frames."""
    import comfy.model_base
    import comfy.supported_models

    config = kit.diffusion._config(comfy.supported_models.WAN21_T2V, {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 64,
        "in_dim": 16, "out_dim": 16, "text_dim": 24, "freq_dim": 16})  # fmt: skip
    made = object.__new__(type(benches("sd1.5")))
    with torch.inference_mode(False):
        model = comfy.model_base.WAN21(config)
        kit.weights_fill.fill(model, 3, (), keep_buffers=lambda name: name.startswith("model_sampling."))
        made.model = kit.diffusion._patcher(model.eval())
    generator = torch.Generator().manual_seed(0)
    made.run, made.kit, made.name, made._kept = run_node, kit, "wan", []
    made.positive, made.negative = ([[torch.randn(1, 7, 24, generator=generator), {}]] for _ in range(2))
    made.latent = lambda batch=1: {"samples": torch.zeros(batch, 16, 3, 8, 12)}
    return made


@pytest.mark.parametrize("frames", (1, 3, 9))
def test_a_video(frames, video, distance):
    """One mask for all frames, for each of the latent's, or for each of the finished video's: four to a latent frame,
    the first alone."""
    lora = video.kit.adapters.make(video.model, "lora", seed=1, only=lambda m: isinstance(m, torch.nn.Linear))
    masks = picture_mask(video, 1, frames)
    mine = masks
    if frames == 9:
        mine = torch.stack([masks[0], masks[1:5].mean(0), masks[5:].mean(0)])
    ours = video.asymmetric(positive_lora=stack(video, lora, mask=masks), sampling=ONE)
    expected = Truth(video, [(lora, 1.0, mine.expand(3, -1, -1), 0.0)], 0).sample()
    assert distance(ours, expected) < BOUND
    assert distance(ours, video.plain(sampling=ONE)) > 100 * BOUND


# --- what has no place is refused by name


def tiles(apply_model, args):
    """Another pack's work: the latent in two tiles, one after the other."""
    x, t, c = args["input"], args["timestep"], args["c"]
    return torch.cat([apply_model(part.contiguous(), t, **c) for part in x.chunk(2, -1)], -1)


def test_tiles_of_another_node(bench):
    model = bench.model.clone()
    model.set_model_unet_function_wrapper(tiles)
    with pytest.raises(Exception, match="8 x 6 of a latent of 8 x 12"):
        bench.asymmetric(model, positive_lora=bench.lora(1), positive_mask=torch.ones(1, 8, 8), sampling=ONE)


def test_tokens_that_another_node_merges(bench):
    model = bench.run("TomePatchModel", model=bench.model, ratio=0.5)[0]
    lora = bench.lora(1, contains="attn1")
    with pytest.raises(Exception, match="(?s)positive LoRA finds no place in the layer.*attn1.*ToMe"):
        bench.asymmetric(model, positive_lora=lora, positive_mask=torch.ones(1, 8, 8), sampling=ONE)


def test_a_model_that_no_table_knows(benches, distance):
    bench = benches("sd1.5")
    model = bench.fresh()
    inner = model.model.diffusion_model
    inner.__class__ = type("SomeUNet", (type(inner),), {})
    lora, mask = bench.lora(1), torch.ones(1, 8, 8)
    with pytest.raises(Exception, match="(?s)not known for the class SomeUNet.*SDXL"):
        bench.guider(model, positive_lora=lora, positive_mask=mask)
    bench.guider(model, positive_lora=lora)


@pytest.mark.parametrize(("kind", "word"), [("dora", "DoRA"), ("set", "replaces"), ("glora", "GLoRA on convolutions")])
def test_kinds_that_have_no_region(kind, word, bench):
    contains = "in_layers" if kind == "glora" else "attn1"
    with pytest.raises(Exception, match=f"(?s)positive LoRA has a mask.*{word}.*for example diffusion_model"):
        bench.guider(positive_lora=bench.lora(1, kind=kind, contains=contains), positive_mask=torch.ones(1, 8, 8))


def test_norms_have_no_region(bench, kit):
    lora = kit.adapters.norm_differences(bench.model)
    with pytest.raises(Exception, match="(?s)positive LoRA has a mask.*norms"):
        bench.guider(positive_lora=lora, positive_mask=torch.ones(1, 8, 8))


def test_a_lora_of_text_alone(bench):
    lora, mask = bench.lora(1, contains="attn2.to_k"), torch.ones(1, 8, 8)
    with pytest.raises(Exception, match="(?s)have no place in the picture.*text_tokens to whole"):
        bench.guider(positive_lora=stack(bench, lora, mask=mask))
    bench.guider(positive_lora=stack(bench, lora, mask=mask, text_tokens="whole"))
    assert "have the whole of it" in bench.report


@pytest.mark.parametrize("mask", (torch.ones(1, 1, 8, 8), torch.full((1, 8, 8), float("nan")), torch.ones(1, 0, 8)))
def test_masks_that_are_none(mask, bench):
    with pytest.raises(Exception, match="mask"):
        stack(bench, bench.lora(1), mask=mask)


def test_another_number_of_masks_than_pictures(bench):
    with pytest.raises(Exception, match="(?s)positive LoRA has 3 pictures.*2, one for each"):
        bench.asymmetric(latent=bench.latent(2), positive_lora=bench.lora(1), positive_mask=torch.ones(3, 8, 8),
                         sampling=ONE)  # fmt: skip
