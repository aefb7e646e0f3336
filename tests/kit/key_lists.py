"""Every key and shape of the published i2L files, at any width, written out from the fact sheet alone.

Nothing here imports the pack: the tests hold these lists against the pack's own and against the published hashes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

Shape = tuple[int, ...]

PUBLISHED_WIDTH = {"z-image": 3840, "qwen-image": 3072}
PUBLISHED_MLP = {"z-image": 10240, "qwen-image": 12288}
RESIDUAL_LENGTH = {"coarse": 64 + 7, "fine": 37 * 37 + 7}
PUBLISHED_RESIDUAL_MID = {"coarse": 1024, "fine": 64}
Z_IMAGE_PARTS = (("layers", 30), ("context_refiner", 2), ("noise_refiner", 2))
QWEN_BLOCKS = 60


@dataclass(frozen=True)
class Leaf:
    """One target matrix: the stem of its keys in a predictor, its name in the LoRA, and its two sizes."""

    stem: str
    target: str
    a_dim: int
    b_dim: int


def _z_image_groups(d: int, m: int) -> list[list[tuple[str, int, int]]]:
    return [
        [("attention.to_q", d, d), ("attention.to_k", d, d), ("attention.to_v", d, d), ("attention.to_out.0", d, d)],
        [("feed_forward.w1", d, m), ("feed_forward.w2", m, d), ("feed_forward.w3", d, m)],
    ]


def _qwen_groups(d: int, m: int) -> list[list[tuple[str, int, int]]]:
    return [
        [("attn.to_q", d, d), ("attn.to_k", d, d), ("attn.to_v", d, d), ("attn.to_out.0", d, d)],
        [("img_mlp.net.2", m, d), ("img_mod.1", d, 6 * d)],
        [("attn.add_q_proj", d, d), ("attn.add_k_proj", d, d), ("attn.add_v_proj", d, d), ("attn.to_add_out", d, d)],
        [("txt_mlp.net.2", m, d), ("txt_mod.1", d, 6 * d)],
    ]


def _blocks(family: str, width: int, mlp_width: int):
    """Yields (block stem, LoRA prefix, targets of that block) in the order of the published files."""
    if family == "z-image":
        for part, count in Z_IMAGE_PARTS:
            for g, targets in enumerate(_z_image_groups(width, mlp_width)):
                for b in range(count):
                    yield f"{part}_lora.blocks.{g * count + b}", f"{part}.{b}", targets
    elif family == "qwen-image":
        for g, targets in enumerate(_qwen_groups(width, mlp_width)):
            for b in range(QWEN_BLOCKS):
                yield f"blocks.{g * QWEN_BLOCKS + b}", f"transformer_blocks.{b}", targets
    else:
        raise ValueError(f"family {family!r}: expected 'z-image' or 'qwen-image'")


def leaves(family: str, width: int | None = None, mlp_width: int | None = None) -> list[Leaf]:
    """All target matrices in output order: 238 for Z-Image, 720 for Qwen-Image."""
    width = width or PUBLISHED_WIDTH[family]
    mlp_width = mlp_width or PUBLISHED_MLP[family]
    return [
        Leaf(f"{stem}.layers.{j}", f"{prefix}.{name}", a, b)
        for stem, prefix, targets in _blocks(family, width, mlp_width)
        for j, (name, a, b) in enumerate(targets)
    ]


def predictor_keys(family: str, width: int | None = None, mlp_width: int | None = None, *, compress: int,
                   rank: int = 4, in_dim: int = 1536 + 4096, residual: str | None = None,
                   residual_width: int = 3584, residual_mid: int | None = None) -> dict[str, Shape]:
    """Key → shape of a whole predictor file; widths default to the published ones."""
    width = width or PUBLISHED_WIDTH[family]
    mlp_width = mlp_width or PUBLISHED_MLP[family]
    keys: dict[str, Shape] = {}
    for leaf in leaves(family, width, mlp_width):
        keys[f"{leaf.stem}.proj_a.proj_in.weight"] = (compress, in_dim)
        keys[f"{leaf.stem}.proj_a.proj_out.weight"] = (leaf.a_dim * rank, compress)
        keys[f"{leaf.stem}.proj_b.proj_in.weight"] = (compress, in_dim)
        keys[f"{leaf.stem}.proj_b.proj_out.weight"] = (leaf.b_dim * rank, compress)
    if residual is not None:
        mid = residual_mid or PUBLISHED_RESIDUAL_MID[residual]
        for stem, _, _ in _blocks(family, width, mlp_width):
            keys[f"{stem}.proj_residual.proj_in.weight"] = (mid, residual_width)
            keys[f"{stem}.proj_residual.proj_out.weight"] = (compress, RESIDUAL_LENGTH[residual] * mid)
    return keys


def siglip2_keys(hidden: int = 1536, layers: int = 40, mlp: int | None = None) -> dict[str, Shape]:
    """Key → shape of the SigLIP2 vision tower: 384-pixel input, patch 16, so 24 × 24 positions at every width."""
    mlp = mlp or 4 * hidden
    keys: dict[str, Shape] = {
        "embeddings.patch_embedding.weight": (hidden, 3, 16, 16),
        "embeddings.patch_embedding.bias": (hidden,),
        "embeddings.position_embedding.weight": (24 * 24, hidden),
        "head.probe": (1, 1, hidden),
        "head.attention.in_proj_weight": (3 * hidden, hidden),
        "head.attention.in_proj_bias": (3 * hidden,),
    }

    def linear(stem: str, out: int, inp: int) -> None:
        keys[f"{stem}.weight"], keys[f"{stem}.bias"] = (out, inp), (out,)

    def norm(stem: str) -> None:
        keys[f"{stem}.weight"], keys[f"{stem}.bias"] = (hidden,), (hidden,)

    for i in range(layers):
        stem = f"encoder.layers.{i}"
        norm(f"{stem}.layer_norm1")
        norm(f"{stem}.layer_norm2")
        for which in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{stem}.self_attn.{which}", hidden, hidden)
        linear(f"{stem}.mlp.fc1", mlp, hidden)
        linear(f"{stem}.mlp.fc2", hidden, mlp)
    norm("post_layernorm")
    linear("head.attention.out_proj", hidden, hidden)
    norm("head.layernorm")
    linear("head.mlp.fc1", mlp, hidden)
    linear("head.mlp.fc2", hidden, mlp)
    return keys


def dinov3_keys(hidden: int = 4096, layers: int = 40, mlp: int | None = None) -> dict[str, Shape]:
    """Key → shape of the DINOv3 tower: gated MLP, four registers, no biases on q, k and v."""
    mlp = mlp or 2 * hidden
    keys: dict[str, Shape] = {
        "embeddings.cls_token": (1, 1, hidden),
        "embeddings.mask_token": (1, 1, hidden),
        "embeddings.register_tokens": (1, 4, hidden),
        "embeddings.patch_embeddings.weight": (hidden, 3, 16, 16),
        "embeddings.patch_embeddings.bias": (hidden,),
    }
    for i in range(layers):
        stem = f"layer.{i}"
        for which in ("norm1", "norm2"):
            keys[f"{stem}.{which}.weight"], keys[f"{stem}.{which}.bias"] = (hidden,), (hidden,)
        for which in ("q_proj", "k_proj", "v_proj", "o_proj"):
            keys[f"{stem}.attention.{which}.weight"] = (hidden, hidden)
        keys[f"{stem}.attention.o_proj.bias"] = (hidden,)
        keys[f"{stem}.layer_scale1.lambda1"] = keys[f"{stem}.layer_scale2.lambda1"] = (hidden,)
        for which in ("gate_proj", "up_proj"):
            keys[f"{stem}.mlp.{which}.weight"], keys[f"{stem}.mlp.{which}.bias"] = (mlp, hidden), (mlp,)
        keys[f"{stem}.mlp.down_proj.weight"], keys[f"{stem}.mlp.down_proj.bias"] = (hidden, mlp), (hidden,)
    keys["norm.weight"], keys["norm.bias"] = (hidden,), (hidden,)
    return keys


def key_hash(keys: dict[str, Shape]) -> str:
    """The publishers' MD5 over sorted names and name:shape pairs; says nothing about dtypes or values."""
    parts = list(keys)
    parts += [f"{key}:{'_'.join(map(str, shape))}" for key, shape in keys.items()]
    return hashlib.md5(",".join(sorted(parts)).encode("utf-8")).hexdigest()
