"""Where the tokens of transformers stand, found by running the host's own model code: one place of the latent is
changed while attention is off, so that nothing spreads, and every layer is asked which of its tokens changed."""

from __future__ import annotations

import sys

import pytest
import torch

TEXT = 5
FLUX = {"in_channels": 4, "out_channels": 4, "context_in_dim": 8, "hidden_size": 12, "mlp_ratio": 2.0, "num_heads": 1,
        "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 4, 4], "theta": 100, "qkv_bias": True}  # fmt: skip
COSMOS = {"max_img_h": 32, "max_img_w": 32, "max_frames": 8, "in_channels": 4, "out_channels": 4, "patch_spatial": 2,
          "patch_temporal": 1, "model_channels": 24, "num_blocks": 1, "num_heads": 2, "crossattn_emb_channels": 8,
          "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 4}  # fmt: skip
WAN = {"in_dim": 4, "dim": 24, "ffn_dim": 16, "freq_dim": 8, "text_dim": 8, "out_dim": 4, "num_heads": 2,
       "num_layers": 2, "text_len": TEXT}  # fmt: skip


def flux(**more):
    from comfy.ldm.flux.model import Flux

    return Flux, FLUX | {"patch_size": 2, "vec_in_dim": 6, "guidance_embed": True, "txt_ids_dims": []} | more


def chroma():
    from comfy.ldm.chroma.model import Chroma

    return Chroma, FLUX | {"patch_size": 2, "in_channels": 16, "txt_ids_dims": [], "vec_in_dim": 6, "in_dim": 64,
                           "out_dim": 12, "hidden_dim": 12, "n_layers": 1}  # fmt: skip


def z_image():
    from comfy.ldm.lumina.model import NextDiT

    return NextDiT, {"patch_size": 2, "in_channels": 4, "dim": 256, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 1,
                     "n_kv_heads": 1, "axes_dims": [64, 96, 96], "axes_lens": [64, 64, 64], "cap_feat_dim": 8,
                     "qk_norm": True, "z_image_modulation": True, "pad_tokens_multiple": 32,
                     "ffn_dim_multiplier": 0.1}  # fmt: skip


def qwen_image():
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel, {"in_channels": 16, "out_channels": 4, "num_layers": 2,
                                         "attention_head_dim": 12, "num_attention_heads": 1, "joint_attention_dim": 8,
                                         "axes_dims_rope": (4, 4, 4)}  # fmt: skip


def sd3():
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    return OpenAISignatureMMDITWrapper, {
        "input_size": None, "patch_size": 2, "in_channels": 4, "depth": 2, "pos_embed_max_size": 16, "num_patches": 256,
        "adm_in_channels": 6, "qk_norm": "rms", "x_block_self_attn_layers": [0],
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 128}},
    }  # fmt: skip


def aura():
    from comfy.ldm.aura.mmdit import MMDiT

    return MMDiT, {"dim": 12, "n_layers": 2, "n_double_layers": 1, "n_heads": 1, "global_conddim": 12,
                   "cond_seq_dim": 8, "max_seq": 256}  # fmt: skip


def wan(**more):
    from comfy.ldm.wan.model import WanModel

    return WanModel, WAN | more


def vace():
    from comfy.ldm.wan.model import VaceWanModel

    return VaceWanModel, WAN | {"vace_layers": 1, "vace_in_dim": 4}


def hunyuan():
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    return HunyuanVideo, FLUX | {
        "patch_size": [1, 2, 2], "vec_in_dim": 6, "guidance_embed": True, "byt5": True, "meanflow": False,
        "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
    }  # fmt: skip


def ltxv():
    from comfy.ldm.lightricks.model import LTXVModel

    return LTXVModel, {"in_channels": 4, "cross_attention_dim": 12, "attention_head_dim": 12, "num_attention_heads": 1,
                       "caption_channels": 8, "num_layers": 1}  # fmt: skip


def cosmos():
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    return MiniTrainDIT, COSMOS


def krea2():
    from comfy.ldm.krea2.model import SingleStreamDiT

    return SingleStreamDiT, {"features": 32, "tdim": 8, "txtdim": 8, "heads": 2, "kvheads": 1, "multiplier": 2,
                             "layers": 2, "channels": 4, "txtlayers": 2, "txtheads": 1, "txtkvheads": 1}  # fmt: skip


REFS = {"ref_latents": [torch.ones(1, 4, 4, 6), torch.ones(1, 4, 2, 2)]}
REFS_5D = {"ref_latents": [torch.ones(1, 4, 1, 4, 6)]}
CASES = {
    "flux": (flux, (5, 6), {}),
    "flux with references": (flux, (4, 6), REFS),
    "chroma": (chroma, (5, 6), {"guidance": torch.ones(1)}),
    "z-image": (z_image, (5, 6), {"num_tokens": TEXT}),
    "qwen-image": (qwen_image, (1, 5, 6), {}),
    "qwen-image with references": (qwen_image, (1, 4, 6), REFS_5D),
    "sd3": (sd3, (4, 6), {}),
    "aura flow": (aura, (5, 6), {}),
    "wan": (wan, (2, 5, 6), {}),
    "wan with a reference": (lambda: wan(in_dim_ref_conv=4), (2, 4, 6), {"reference_latent": torch.ones(1, 4, 4, 6)}),
    "wan with a clip beside it": (wan, (2, 4, 6), {"time_dim_concat": torch.ones(1, 4, 1, 4, 6),
                                                   "context_latents": [torch.ones(1, 4, 2, 4, 4)]}),
    "vace": (vace, (2, 4, 6), {"vace_context": torch.ones(1, 1, 4, 2, 4, 6), "vace_strength": [1.0]}),
    "hunyuan video": (hunyuan, (2, 4, 6), {}),
    "hunyuan video with more": (hunyuan, (2, 4, 6), {"ref_latent": torch.ones(1, 4, 1, 4, 6),
                                                     "txt_byt5": torch.ones(1, 3, 1472)}),
    "ltx video": (ltxv, (2, 4, 6), {"attention_mask": None}),
    "cosmos": (cosmos, (2, 5, 6), {}),
    "krea 2": (krea2, (5, 6), {}),
    "krea 2 with references": (krea2, (4, 6), REFS | {"ref_latents_method": "index_timestep_zero"}),
}  # fmt: skip


def alone(func, q, k, v, heads, *args, skip_reshape=False, skip_output_reshape=False, **more):
    """Each token keeps to itself."""
    if skip_reshape and not skip_output_reshape:
        return q.transpose(1, 2).flatten(2)
    return q if skip_reshape or not skip_output_reshape else q.unflatten(-1, (heads, -1)).transpose(1, 2)


class Run:
    """One small model, run with such attention."""

    def __init__(self, name):
        import comfy.ops

        make, self.size, self.inputs = CASES[name]
        cls, config = make()
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode(False):
            self.model = cls(**config, operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="cpu")
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                if tensor.is_floating_point():
                    tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3 + 0.1
        self.layers = {name: module for name, module in self.model.named_modules()
                       if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d))}  # fmt: skip
        width = 16 if name.startswith("krea") else 8
        self.context = torch.randn(1, TEXT, width, generator=generator)
        self.latent = torch.randn(1, 4, *self.size, generator=generator)
        if "vace_context" in self.inputs:
            self.inputs = self.inputs | {"vace_context": self.latent[:, None]}
        self.base = self(self.latent)

    def __call__(self, x) -> dict[str, list[torch.Tensor]]:
        """Layer -> of each call its output, channels last."""
        seen: dict[str, list[torch.Tensor]] = {}
        hooks = []
        for name, module in self.layers.items():
            def note(module, args, out, name=name):
                channels_first = not isinstance(module, torch.nn.Linear)
                seen.setdefault(name, []).append(out.movedim(1, -1) if channels_first else out)

            hooks.append(module.register_forward_hook(note))
        options = {"optimized_attention_override": alone, "sigmas": torch.ones(1),
                   "sample_sigmas": torch.ones(2)}  # fmt: skip
        more = {"y": torch.ones(1, 6)} if "y" in self.model.forward.__code__.co_varnames else {}
        if "guidance" in self.model.forward.__code__.co_varnames:
            more["guidance"] = torch.ones(1)
        try:
            with torch.no_grad():
                self.model(x.clone(), torch.full((1,), 0.5), context=self.context.clone(),
                           transformer_options=dict(options), **more | self.inputs)  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()
        return seen


@pytest.fixture(scope="module")
def runs():
    made = {}

    def run(name):
        if name not in made:
            made[name] = Run(name)
        return made[name]

    return run


@pytest.mark.parametrize("name", CASES)
def test_every_layer_has_the_place_where_the_table_says(name, runs, pack):
    places, tables, regions = (
        sys.modules[f"{pack.__name__}.{name}"]
        for name in ("weights.places", "weights.token_tables", "nodes.host.guidance.regions")
    )
    run = runs(name)
    tokens = tables.tokens_of(run.model)
    given_ = regions._given(tokens, places.grid_of(run.size), {**run.inputs, "context": run.context})
    grid = [-(-size // patch) for size, patch in zip(places.grid_of(run.size), tokens.patch)]
    # Not the first row and column: where a latent is no multiple of the patch, the host repeats them behind the last.
    for spot in ((1, 1), (run.size[-2] - 1, run.size[-1] - 1), (2, 3)):
        frame = run.size[0] - 1 if len(run.size) == 3 else 0
        x = run.latent.clone()
        x[(..., frame, *spot) if len(run.size) == 3 else (..., *spot)] += 1
        if "vace_context" in run.inputs:  # the context's own layers have its places
            run.inputs["vace_context"] = x[:, None]
        after = run(x)
        at = (frame // tokens.patch[0], spot[0] // tokens.patch[1], spot[1] // tokens.patch[2])
        number = (at[0] * grid[1] + at[1]) * grid[2] + at[2]
        for layer in run.layers:
            stream = tokens.stream(layer)
            for before, now in zip(run.base.get(layer, ()), after.get(layer, ()), strict=True):
                shape = tuple(now.shape[1:-1])
                changed = (before != now).any(-1).flatten().nonzero().flatten().tolist()
                if stream == places.NOWHERE:
                    assert not changed, layer
                    continue
                try:
                    layout = tokens.layout(stream, shape, given_)
                except places.Unplaced:
                    assert stream in (places.MAP, places.TARGET) and len(run.inputs) > 0, (layer, shape)
                    continue
                assert sum(count for count, _ in layout) == before[0, ..., 0].numel()
                start, expected = 0, []
                for count, own in layout:
                    if own is not None:
                        assert list(own) == grid
                        expected.append(start + number)
                    start += count
                assert changed == expected, (layer, layout)
