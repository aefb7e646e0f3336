"""Which tensor of an i2L predictor makes which LoRA target: one table per family.

A published v1 predictor is a bag of bias-free linear maps. For the block `b` of a component, the group `g` and the
position `j` in that group it stores, under `{component}.blocks.{g * num_blocks + b}.layers.{j}.`,

    proj_a.proj_in.weight   (compress, in_dim)     proj_a.proj_out.weight   (a_width * rank, compress)
    proj_b.proj_in.weight   (compress, in_dim)     proj_b.proj_out.weight   (b_width * rank, compress)

and, in predictors that also read a text encoder (Coarse, Fine), once per block

    proj_residual.proj_in.weight (mid, text_width)  proj_residual.proj_out.weight (compress, tokens * mid)

Names of targets are NOT stored: their order is knowledge, and this file is where it lives. It is the order of
DiffSynth-Studio's `qwen_image_image2lora.py` and `z_image_image2lora.py`; a wrong one would load without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

RANK = 4  # of every published v1 predictor, per image
TEXT_WIDTH = 3584  # Qwen2.5-VL 7B, the text encoder of Qwen-Image
RESIDUAL_TOKENS = {"coarse": 8 * 8 + 7, "fine": 37 * 37 + 7}  # image tokens + the 7 of the template around them


@dataclass(frozen=True)
class Component:
    """A stack of blocks: where the predictor keeps it, how many blocks it has, what the model calls it."""

    stored: str
    num_blocks: int
    module: str


@dataclass(frozen=True)
class Family:
    """One base model. `groups[g][j]` is (target in the block, width in, width out); widths are names."""

    name: str
    label: str
    components: tuple[Component, ...]
    groups: tuple[tuple[tuple[str, str, str], ...], ...]
    widths: dict[str, int] = field(hash=False)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "z-image",
            "Z-Image",
            (
                Component("layers_lora.blocks", 30, "layers"),
                Component("context_refiner_lora.blocks", 2, "context_refiner"),
                Component("noise_refiner_lora.blocks", 2, "noise_refiner"),
            ),
            (
                (
                    ("attention.to_q", "dim", "dim"),
                    ("attention.to_k", "dim", "dim"),
                    ("attention.to_v", "dim", "dim"),
                    ("attention.to_out.0", "dim", "dim"),
                ),
                (
                    ("feed_forward.w1", "dim", "mlp"),
                    ("feed_forward.w2", "mlp", "dim"),
                    ("feed_forward.w3", "dim", "mlp"),
                ),
            ),
            {"dim": 3840, "mlp": 10240},
        ),
        Family(
            "qwen-image",
            "Qwen-Image",
            (Component("blocks", 60, "transformer_blocks"),),
            (
                (
                    ("attn.to_q", "dim", "dim"),
                    ("attn.to_k", "dim", "dim"),
                    ("attn.to_v", "dim", "dim"),
                    ("attn.to_out.0", "dim", "dim"),
                ),
                (("img_mlp.net.2", "mlp", "dim"), ("img_mod.1", "dim", "mod")),
                (
                    ("attn.add_q_proj", "dim", "dim"),
                    ("attn.add_k_proj", "dim", "dim"),
                    ("attn.add_v_proj", "dim", "dim"),
                    ("attn.to_add_out", "dim", "dim"),
                ),
                (("txt_mlp.net.2", "mlp", "dim"), ("txt_mod.1", "dim", "mod")),
            ),
            {"dim": 3072, "mlp": 12288, "mod": 18432},
        ),
    )
}


@dataclass(frozen=True)
class Target:
    """One matrix of the base model: where its four maps are stored, and its name in the LoRA."""

    block: str
    stored: str
    name: str
    a_width: str
    b_width: str


def targets(family: Family) -> Iterator[Target]:
    """All targets in the order of DiffSynth's output: component, group, block, position in the group."""
    for component in family.components:
        for g, group in enumerate(family.groups):
            for b in range(component.num_blocks):
                block = f"{component.stored}.{g * component.num_blocks + b}"
                for j, (name, a_width, b_width) in enumerate(group):
                    yield Target(block, f"{block}.layers.{j}", f"{component.module}.{b}.{name}", a_width, b_width)


@dataclass(frozen=True)
class Residual:
    """The branch that reads a text encoder's hidden states of the picture: (tokens, text_width) to `compress`."""

    text_width: int
    tokens: int
    mid: int

    @property
    def kind(self) -> str:
        """'coarse', 'fine', or 'unknown'."""
        return next((kind for kind, tokens in RESIDUAL_TOKENS.items() if tokens == self.tokens), "unknown")


@dataclass(frozen=True)
class PredictorSpec:
    """Everything that the shapes of a predictor say. `widths` are those of the base model, as in `Family.widths`."""

    family: Family
    compress: int
    in_dim: int
    rank: int
    widths: dict[str, int] = field(hash=False)
    residual: Residual | None = None

    @property
    def is_published_width(self) -> bool:
        return self.widths == self.family.widths


def key_shapes(spec: PredictorSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes (out, in) of all tensors that a predictor of this spec stores."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets(spec.family):
        for factor, width in (("proj_a", target.a_width), ("proj_b", target.b_width)):
            shapes[f"{target.stored}.{factor}.proj_in.weight"] = (spec.compress, spec.in_dim)
            shapes[f"{target.stored}.{factor}.proj_out.weight"] = (spec.widths[width] * spec.rank, spec.compress)
        if spec.residual is not None:
            r = spec.residual
            shapes[f"{target.block}.proj_residual.proj_in.weight"] = (r.mid, r.text_width)
            shapes[f"{target.block}.proj_residual.proj_out.weight"] = (spec.compress, r.tokens * r.mid)
    return shapes
