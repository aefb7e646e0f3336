"""Every name that the host's key maps have, with every ending that its loader reads, and what it reads not: ours must
read them all, and make the host's own patches of them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from test_bad_input import refused

# The two halves of a pair, as the host's loader knows them.
ENDINGS = (
    (".lora_down.weight", ".lora_up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_A", ".lora_B"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
)
_VIDEO = {"patch_size": [1, 2, 2], "vec_in_dim": 16, "context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 4.0,
          "num_heads": 2, "axes_dim": [4, 6, 6], "qkv_bias": True, "guidance_embed": False}  # fmt: skip
_ROPE = {"axes_dims_rope": (4, 6, 6), "axes_dim_rope": (4, 6, 6)}
# model_base class -> (supported_models class, the net): one for each branch of the host's key map.
NETS = {
    "Flux": ("Flux", {"image_model": "flux", "in_channels": 16, "out_channels": 16, "depth": 2, "theta": 10000,
                      "depth_single_blocks": 2, "txt_ids_dims": [], **_VIDEO, "patch_size": 2}),
    "HunyuanVideo": ("HunyuanVideo", {
        "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "depth": 1, "depth_single_blocks": 1,
        "theta": 256, "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
        "meanflow_sum": False, **_VIDEO}),
    "SD3": ("SD3", {
        "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 16, "num_patches": 64,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
        "pos_embed_max_size": 8, "pos_embed_scaling_factor": None, "qk_norm": "rms", "x_block_self_attn_layers": []}),
    "AuraFlow": ("AuraFlow", {"max_seq": 64, "cond_seq_dim": 32, "n_double_layers": 1, "n_layers": 2, "n_heads": 2,
                              "dim": 64}),
    "PixArt": ("PixArtAlpha", {
        "image_model": "pixart_alpha", "depth": 2, "hidden_size": 32, "num_heads": 2, "input_size": 8,
        "caption_channels": 16, "micro_condition": True, "pe_interpolation": 1, "model_max_length": 8}),
    "HunyuanDiT": ("HunyuanDiT", {
        "image_model": "hydit", "depth": 4, "hidden_size": 32, "num_heads": 2, "text_states_dim": 16, "text_len": 4,
        "text_states_dim_t5": 16, "text_len_t5": 4, "mlp_ratio": 4.0, "size_cond": False, "use_style_cond": False}),
    "HiDream": ("HiDream", {
        "image_model": "hidream", "in_channels": 16, "out_channels": 16, "patch_size": 2, "num_layers": 1,
        "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [16, 16],
        "text_emb_dim": 16, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 6, 6),
        "max_resolution": (16, 16), "llama_layers": [0, 1]}),
    "WAN21": ("WAN21_T2V", {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 1,
        "text_dim": 16, "freq_dim": 16, "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2), "qk_norm": True,
        "window_size": (-1, -1), "cross_attn_norm": True, "eps": 1e-6}),
    "LTXV": ("LTXV", {
        "image_model": "ltxv", "in_channels": 16, "cross_attention_dim": 32, "attention_head_dim": 16,
        "num_attention_heads": 2, "caption_channels": 16, "num_layers": 1}),
    "Omnigen2": ("Omnigen2", {
        "image_model": "omnigen2", "hidden_size": 32, "num_layers": 1, "num_refiner_layers": 1, "in_channels": 16,
        "num_attention_heads": 2, "num_kv_heads": 2, "axes_dim_rope": (4, 6, 6), "axes_lens": (16, 16, 16),
        "text_feat_dim": 16, "ffn_dim_multiplier": None, "multiple_of": 16, "timestep_scale": 1000.0,
        "norm_eps": 1e-5, "patch_size": 2}),
    "Kandinsky5": ("Kandinsky5", {
        "image_model": "kandinsky5", "model_dim": 32, "ff_dim": 64, "visual_embed_dim": 132, "num_text_blocks": 1,
        "num_visual_blocks": 1, "axes_dims": (4, 6, 6)}),
    "Krea2": ("Krea2", {"image_model": "krea2", "layers": 1}),
    "ErnieImage": ("ErnieImage", {"image_model": "ernie", "num_layers": 1}),
}  # fmt: skip
KIT = ("z-image", "qwen-image", "sdxl", "sd1.5", "flux2")


@pytest.fixture(scope="module")
def named(host, kit, benches):
    """name -> what stands for a MODEL of it where only its names and sizes are asked for; weights on no device."""

    def get(name, **more):
        if name in KIT:
            return benches(name).model
        import comfy.supported_models

        config, net = NETS[name]
        config = getattr(comfy.supported_models, config)(dict(net) | more)
        config.set_inference_dtype(torch.float32, None)
        made = getattr(host.comfy.model_base, name)(config, device=torch.device("meta"))
        return SimpleNamespace(model=made)

    return get


def pair(stem, shape, ending, rank=1):
    """Both halves on no device, for a weight of that shape."""
    down = torch.empty(rank, *shape[1:], device="meta")
    up = torch.empty(shape[0], rank, *[1] * len(shape[2:]), device="meta")
    return {stem + ending[0]: down, stem + ending[1]: up}


def shape_of(weights, target):
    key, part = (target[0], target[1]) if isinstance(target, tuple) else (target, None)
    if key not in weights or weights[key].ndim < 2:
        return None
    shape = list(weights[key].shape)
    if part is not None:
        shape[part[0]] = part[2]
    return tuple(shape)


def rounds(names, weights):
    """LoRAs that together have every name once, each LoRA one for a target; endings take turns."""
    made, endings = [], itertools.cycle(ENDINGS)
    for name, target in names.items():
        shape = shape_of(weights, target)
        if shape is None:
            continue
        free = next((each for each in made if target not in each[1]), None)
        if free is None:
            made.append(free := ({}, {}))
        free[0].update(pair(name, shape, next(endings)))
        free[1][target] = name
    return made


def same(ours, hosts):
    assert ours.keys() == hosts.keys()
    for target, adapter in hosts.items():
        assert all(a is b for a, b in zip(ours[target].weights, adapter.weights, strict=True)), target


@pytest.mark.parametrize("name", [*KIT, *NETS])
def test_every_name_with_every_ending(name, named, host, pack):
    """Nothing is refused, nothing is told, and the patches are the host's, tensor for tensor. The merge finds each at
    its target as well."""
    patches_of = module_of(pack, "nodes.host.lora_patches").lora_patches
    key_part, find_target = (module_of(pack, f"weights.lora.{where}") for where in ("keys", "names"))
    model = named(name)
    names = host.comfy.lora.model_lora_keys_unet(model.model, {})
    weights = model.model.state_dict()
    count = 0
    for lora, targets in rounds(names, weights):
        notes = []
        ours = patches_of(model, None, lora, notes=notes)
        same(ours, host.comfy.lora.load_lora(lora, names))
        assert notes == [] and ours.keys() == targets.keys()
        assert {find_target.find_target(key_part.key_part(key)[0], names) for key in lora} == targets.keys()
        count += len(targets)
    assert count > 30


@pytest.mark.parametrize("name", KIT)
def test_every_name_of_a_text_encoder(name, benches, host, pack):
    patches_of = module_of(pack, "nodes.host.lora_patches").lora_patches
    bench = benches(name)
    names = host.comfy.lora.model_lora_keys_clip(bench.clip.cond_stage_model, {})
    weights = bench.clip.cond_stage_model.state_dict()
    for lora, targets in rounds(names, weights):
        ours = patches_of(bench.model, bench.clip, lora)
        same(ours, host.comfy.lora.load_lora(lora, names))
        assert ours.keys() == targets.keys()


OLD = ("{}.{}_lora", "unet.{}.{}_lora", "unet.{}.processor.{}_lora", "{}.processor.{}_lora")


@pytest.mark.parametrize("spelling", OLD)
def test_attention_processors_of_old_diffusers(spelling, benches, host, run_node):
    """`to_q_lora.up.weight`: the host knows the two forms with `processor`, if it is given nothing else."""
    model = benches("sd1.5", short=False).model
    names = host.comfy.lora.model_lora_keys_unet(model.model, {})
    weights = model.model.state_dict()
    lora, targets = {}, set()
    for name, target in names.items():
        if name.startswith("down_blocks.") and ".processor.to_" in name:
            block, _, leaf = name.rpartition(".processor.")
            lora |= pair(spelling.format(block, leaf), tuple(weights[target].shape), (".down.weight", ".up.weight"))
            targets.add(target)
    assert len(targets) == 6 * 2 * 4  # six blocks, two attentions, q, k, v, out
    lora = {key: torch.ones(value.shape) for key, value in lora.items()}
    patched, _, report = run_node("StyleLoomApplyLoRA", model=model, lora=lora, strength=1.0)
    assert set(patched.patches) == targets and "48 of 48 patches" in report
    hosts = host.comfy.lora.load_lora(lora, names)
    assert hosts.keys() == (targets if "processor" in spelling else set())
    guider = run_node("StyleLoomAsymmetricCFGGuider", model=model, positive=benches("sd1.5").positive,
                      negative=benches("sd1.5").negative, cfg=3.0, positive_lora=lora)  # fmt: skip
    assert "48 patches" in guider[1]


def test_wan_fun_and_uso(named, host, pack):
    """Two published forms that the host rewrites before it reads them."""
    patches_of = module_of(pack, "nodes.host.lora_patches").lora_patches
    wan = named("WAN21")
    weights = wan.model.state_dict()
    lora = {}
    for leaf in ("cross_attn_k", "cross_attn_q", "ffn_0"):
        dotted = leaf.replace("attn_", "attn.").replace("ffn_", "ffn.")
        shape = tuple(weights[f"diffusion_model.blocks.0.{dotted}.weight"].shape)
        lora |= pair(f"lora_unet__blocks_0_{leaf}", shape, ENDINGS[0])
    assert len(patches_of(wan, None, lora)) == 3
    flux = named("Flux", depth=19, depth_single_blocks=38)
    weights = flux.model.state_dict()
    half = (".down.weight", ".up.weight")
    lora = {}
    for name, layer in (
        ("double_blocks.18.processor.qkv_lora1", "double_blocks.18.img_attn.qkv"),
        ("double_blocks.18.processor.qkv_lora2", "double_blocks.18.txt_attn.qkv"),
        ("double_blocks.18.processor.proj_lora2", "double_blocks.18.txt_attn.proj"),
        ("single_blocks.37.processor.proj_lora", "single_blocks.37.linear2"),
    ):
        lora |= pair(name, tuple(weights[f"diffusion_model.{layer}.weight"].shape), half)
    lora |= pair("single_blocks.37.processor.qkv_lora", (96, 32), half)
    made = patches_of(flux, None, lora)
    assert ("diffusion_model.single_blocks.37.linear1.weight", (0, 0, 96)) in made and len(made) == 5


def test_the_numbers_of_flux_blocks_in_every_spelling(named, host, pack):
    """The block that LoRA Block Filter takes a name for is the one that the host patches under that name."""
    flux = module_of(pack, "weights.dit.blocks").FLUX1
    names = host.comfy.lora.model_lora_keys_unet(named("Flux", depth=19, depth_single_blocks=38).model, {})
    seen = set()
    for name, target in names.items():
        key = target[0] if isinstance(target, tuple) else target
        kind, _, rest = key.removeprefix("diffusion_model.").partition("_blocks.")
        due = {"double": 1, "single": 20}.get(kind)
        due = None if due is None else due + int(rest.split(".")[0])
        assert flux.block_of(name) == due, name
        seen.add(due)
    assert seen == {None, *range(1, 58)}


# --- what finds no place


def good(bench):
    return bench.lora(1, contains="attn2.to_q")


STRAY = {"diffusion_model.output_blocks.99.0.lora_down.weight": torch.ones(1, 4),
         "diffusion_model.output_blocks.99.0.lora_up.weight": torch.ones(4, 1)}  # fmt: skip
TEXT = {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 2)}  # fmt: skip
ALPHA = {"diffusion_model.middle_block.1.proj_in.alpha": torch.tensor(1.0), "nowhere.alpha": torch.tensor(1.0)}


def test_missing_keys_are_an_error_by_default_and_left_out_by_choice(bench, run_node, caplog):
    lora = good(bench)
    count = len(lora) + 2
    words = (f"(?s)2 of the LoRA's {count} keys find no place in this BaseModel model: diffusion_model.output_blocks.99.*"
             "; by its keys it is for SD1.5 or SD2.*set missing_keys to warn")  # fmt: skip
    refused(run_node, words, "StyleLoomApplyLoRA", model=bench.model, lora=lora | STRAY)
    patched, _, report = run_node(
        "StyleLoomApplyLoRA", model=bench.model, lora=lora | STRAY, strength=1.0, missing_keys="warn"
    )
    due = run_node("StyleLoomApplyLoRA", model=bench.model, lora=lora, strength=1.0)[0]
    assert patched.patches.keys() == due.patches.keys()
    told = f"left out, as missing_keys is warn: 2 of the LoRA's {count} keys"
    assert told in report and told in caplog.text


def test_a_file_for_another_model_is_never_gone_on_with(bench, run_node):
    wan = {f"diffusion_model.blocks.0.self_attn.{leaf}.lora_{half}.weight": torch.ones(5120, 1) if half == "B" else
           torch.ones(1, 5120) for leaf in "qkvo" for half in "AB"}  # fmt: skip
    for missing in ("error", "warn"):
        words = "8 of the LoRA's 8 keys find no place.* and 5 more; by its keys it is for Wan"
        refused(run_node, words, "StyleLoomApplyLoRA", model=bench.model, lora=wan, missing_keys=missing)


def test_text_keys_and_lone_alphas_never_stop_anybody(bench, run_node):
    lora = good(bench)
    apply = lambda each, **more: run_node("StyleLoomApplyLoRA", model=bench.model, lora=each, strength=1.0, **more)  # noqa: E731
    due = apply(lora)[0].patches.keys()
    patched, _, report = apply(lora | TEXT | ALPHA)
    assert patched.patches.keys() == due
    assert "left out: 2 keys are for a text encoder: connect clip" in report
    assert "left out: 2 alphas that scale nothing: diffusion_model.middle_block.1.proj_in.alpha, nowhere" in report
    patched, _, report = apply(lora | TEXT, clip=bench.clip)  # SD1.5 has no second text encoder
    assert patched.patches.keys() == due and "2 keys are for another text encoder than the one in clip" in report
    odd = {next(iter(lora)).replace("lora_down.weight", "something_new"): torch.ones(1)}
    assert "left out: 1 keys of a form that belongs to no kind of LoRA" in apply(lora | odd)[2]


def test_asymmetric_guidance_leaves_out_by_choice(bench, distance):
    lora = good(bench)
    with pytest.raises(ValueError, match="2 of the positive LoRA's .* find no place"):
        bench.guider(positive_lora=lora | STRAY)
    made = bench.asymmetric(sampling={"steps": 1}, positive_lora=lora | STRAY | ALPHA, missing_keys="warn")
    assert "left out, as missing_keys is warn: 2 of the positive LoRA's" in bench.report
    assert "2 alphas that scale nothing" in bench.report
    assert torch.equal(made, bench.asymmetric(sampling={"steps": 1}, positive_lora=lora))


def module_of(pack, name):
    import importlib

    return importlib.import_module(f"{pack.__name__}.{name}")


_UNETS, _FLUXES = {"SD1.5, SD2 or SDXL", ""}, {"FLUX.1", "FLUX.2", "FLUX.1 or FLUX.2"}
# The host gives both FLUX models the names of both, and has some names beside which none is typical.
FAMILIES = {
    "z-image": {"Z-Image or Lumina 2"}, "qwen-image": {"Qwen-Image"}, "sdxl": {"SDXL"} | _UNETS,
    "sd1.5": {"SD1.5 or SD2"} | _UNETS, "flux2": _FLUXES, "Flux": _FLUXES, "HunyuanVideo": {"HunyuanVideo"},
    "SD3": {"SD3"}, "AuraFlow": {"AuraFlow"}, "PixArt": {"PixArt", "LTX-Video or PixArt"},
    "HunyuanDiT": {"Hunyuan DiT"}, "HiDream": {"HiDream"}, "WAN21": {"Wan"}, "LTXV": {"LTX-Video"}, "Omnigen2": {""},
    "Kandinsky5": {""}, "Krea2": {""}, "ErnieImage": {""},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_lora_with_all_names_is_for(name, named, host, pack):
    """Never another family than that of the model, whatever the spelling; where it is not in the table, none at all."""
    made_for = module_of(pack, "weights.lora.made_for").made_for
    model = named(name)
    names = host.comfy.lora.model_lora_keys_unet(model.model, {})
    found = {made_for(lora) for lora, _ in rounds(names, model.model.state_dict())}
    assert found <= FAMILIES[name] and found != {""} or found == FAMILIES[name] == {""}
