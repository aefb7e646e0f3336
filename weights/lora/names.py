"""Names in LoRA files: which tensor of which adapter a key is, which weight it belongs to, and what to call it when
it is written.

Facts about spellings: kohya (`lora_unet_…`, `.lora_down/.lora_up/.alpha`), diffusers and PEFT (`.lora_A/.lora_B`, with
an adapter's name in between or not, `base_model.model.`, `unet.`, doubled `unet.unet.`), the older diffusers
(`.processor.to_q_lora.down`), LyCORIS (`hada_`, `lokr_`), and the block numbers of SDXL in both of its namings.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Iterator, Mapping

# Endings of a key, and what the tensor is. An adapter's own name may stand between `lora_A` and `weight` (PEFT).
_ENDINGS: tuple[tuple[str, str], ...] = (
    (
        r"\.lora_(?:down|A)(?:\.[^.]+)?\.weight|\.lora_A|\.lora(?:_linear_layer)?\.down\.weight|_lora\.down\.weight",
        "down",
    ),
    (r"\.lora_(?:up|B)(?:\.[^.]+)?\.weight|\.lora_B|\.lora(?:_linear_layer)?\.up\.weight|_lora\.up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?", "dora"),
    (r"\.(hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2))", ""),
    (r"\.(lokr_(?:w1|w2|w1_a|w1_b|w2_a|w2_b|t1|t2))", ""),
    (r"\.diff", "diff"),
    (r"\.diff_b|\.lora_(?:up|B)(?:\.[^.]+)?\.bias", "diff_b"),
    (r"\.w_norm", "w_norm"),
    (r"\.b_norm", "b_norm"),
    (r"\.set_weight", "set_weight"),
    (r"\.reshape_weight", "reshape_weight"),
    (r"\.oft_blocks|\.oft_diag|\.oft_R(?:\.[^.]+)?\.weight|\.rescale", "oft"),
    (r"\.[ab][12]\.weight", ""),
)
_KEY = re.compile("|".join(f"(?P<e{i}>{pattern})$" for i, (pattern, _) in enumerate(_ENDINGS)))

# What trainers put before the name of a layer of the diffusion model, longest first; taken off as often as they occur.
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")


def key_part(key: str) -> tuple[str, str] | None:
    """(stem, part) of a key of a LoRA file: `….to_q.lora_A.default.weight` → (`….to_q`, `down`); None where the ending
    belongs to no adapter that is known."""
    match = _KEY.search(key)
    if match is None or match.start() == 0:
        return None
    index = int(match.lastgroup[1:]) if match.lastgroup and match.lastgroup.startswith("e") else -1
    if index < 0:  # a group inside: find the outer one
        index = next(i for i in range(len(_ENDINGS)) if match.group(f"e{i}") is not None)
    part = _ENDINGS[index][1] or match.group(f"e{index}")[1:]
    return key[: match.start()], part


def bare(stem: str) -> str:
    """The stem without what trainers put before a layer's name."""
    found = True
    while found:
        found = False
        for prefix in _PREFIXES:
            if stem.startswith(prefix) and len(stem) > len(prefix):
                stem, found = stem[len(prefix) :], True
    return stem


def spellings(stem: str) -> Iterator[str]:
    """Names under which a key map may know a stem, the most literal first."""
    yield stem
    name = bare(stem)
    for text in ("text_encoder_2.", "text_encoder.", "te1.", "te2."):
        if name.startswith(text):
            inner = bare(name[len(text) :])
            number = "2" if "2" in text else ""
            yield f"text_encoder{'_2' if number else ''}.{inner}"
            yield f"lora_te{number or '1'}_{inner.replace('.', '_')}"
            return
    if name.startswith("text_model."):
        yield f"text_encoder.{name}"
    for variant in _variants(name):
        flat = variant.replace(".", "_")
        for prefix in ("", "diffusion_model.", "transformer.", "unet."):
            yield prefix + variant
        for prefix in _FLAT_PREFIXES:
            yield prefix + flat
    for prefix in _FLAT_PREFIXES:
        if stem.startswith(prefix):
            for other in _FLAT_PREFIXES:
                yield other + stem[len(prefix) :]


def _variants(name: str) -> Iterator[str]:
    yield name
    plain = name.replace(".processor.", ".")
    if plain.endswith(".to_out"):
        plain += ".0"
    if plain != name:
        yield plain


def find_target(stem: str, key_map: Mapping[str, Hashable]) -> Hashable | None:
    """The target of a stem in a key map, over all of its spellings; None where there is none."""
    return next((key_map[name] for name in spellings(stem) if name in key_map), None)


# --- SDXL, for when no model is given

_LINEARS = tuple(f"attn{a}.to_{p}" for a in (1, 2) for p in ("q", "k", "v", "out.0")) + ("ff.net.0.proj", "ff.net.2")
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "in_layers.0": "norm1",
    "out_layers.0": "norm2",
}
# (block in the checkpoint's numbers, in diffusers' names, transformer depth, has a widening skip, resampler in both)
_SDXL = (
    ("input_blocks.1", "down_blocks.0", 0, 0),
    ("input_blocks.2", "down_blocks.0", 1, 0),
    ("input_blocks.4", "down_blocks.1", 0, 2),
    ("input_blocks.5", "down_blocks.1", 1, 2),
    ("input_blocks.7", "down_blocks.2", 0, 10),
    ("input_blocks.8", "down_blocks.2", 1, 10),
    *((f"output_blocks.{i}", "up_blocks.0", i, 10) for i in range(3)),
    *((f"output_blocks.{i + 3}", "up_blocks.1", i, 2) for i in range(3)),
    *((f"output_blocks.{i + 6}", "up_blocks.2", i, 0) for i in range(3)),
)
_SDXL_OTHER = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
}


def _transformer(depth: int) -> Iterator[str]:
    yield from ("norm", "proj_in", "proj_out")
    for block in range(depth):
        yield from (f"transformer_blocks.{block}.{name}" for name in (*_LINEARS, "norm1", "norm2", "norm3"))


def sdxl_layers() -> dict[str, str]:
    """Each layer of SDXL's UNet: its name in the checkpoint → its name in diffusers."""
    layers = dict(_SDXL_OTHER)
    for own, other, index, depth in _SDXL:
        layers |= {f"{own}.0.{a}": f"{other}.resnets.{index}.{b}" for a, b in _RESNET.items()}
        if depth:
            layers |= {f"{own}.1.{n}": f"{other}.attentions.{index}.{n}" for n in _transformer(depth)}
    layers |= {f"middle_block.1.{n}": f"mid_block.attentions.0.{n}" for n in _transformer(10)}
    for own, other in (("middle_block.0", 0), ("middle_block.2", 1)):
        layers |= {f"{own}.{a}": f"mid_block.resnets.{other}.{b}" for a, b in _RESNET.items()}
    return layers


_CLIP_LEAVES = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("k", "q", "v", "out")))


@functools.cache
def clip_key_map() -> dict[str, str]:
    """Names of the layers of the two CLIP text encoders of SDXL (SD1.5 has the first) → weight, as the host calls
    it."""
    found = {}
    for tower, depth, flat, dotted in (
        ("clip_l", 12, ("lora_te_", "lora_te1_"), ("text_encoder.", "")),
        ("clip_g", 32, ("lora_te2_",), ("text_encoder_2.",)),
    ):
        for block in range(depth):
            for leaf in _CLIP_LEAVES:
                name = f"text_model.encoder.layers.{block}.{leaf}"
                target = f"{tower}.transformer.{name}.weight"
                found |= {prefix + name.replace(".", "_"): target for prefix in flat}
                found |= {prefix + name: target for prefix in dotted}
                found[f"text_encoders.{tower}.transformer.{name}"] = target
    return found


@functools.cache
def sdxl_key_map() -> dict[str, str]:
    """Every name that the built-in map knows → the weight's name in the host (`diffusion_model.….weight`)."""
    found = dict(clip_key_map())
    for own, other in sdxl_layers().items():
        target = f"diffusion_model.{own}.weight"
        for name in (own, other):
            found |= {f"lora_unet_{name.replace('.', '_')}": target, f"lycoris_{name.replace('.', '_')}": target}
        found[f"diffusion_model.{own}"] = found[f"unet.{other}"] = target
    return found


# --- what is written


def written_stem(target: Hashable, key_map_names: Mapping[Hashable, list[str]], family: str, given: str) -> str:
    """The stem under which a target is written: what the host and the tools of that family read.

    Args:
        target: as the key map names it.
        key_map_names: all names of each target.
        family: 'sdxl' and 'sd15' are written in kohya's names, everything else in the checkpoint's own dotted ones.
        given: the stem in the file, for targets that no map knows.
    """
    names = key_map_names.get(target, [])
    if not names:
        return given
    if family in ("sdxl", "sd15"):
        text = ("lora_te1_", "lora_te2_") if family == "sdxl" else ("lora_te_",)
        numbered = ("input_blocks", "middle_block", "output_blocks", "out", "time_embed_", "label_emb")
        flat = [n for n in names if n.startswith(("lora_unet_", *text)) and "." not in n]
        own = [n for n in flat if n.startswith(tuple("lora_unet_" + b for b in numbered))]
        other = [n for n in flat if n not in own]
        chosen = (own or other) if family == "sdxl" else (other or own)
        if chosen:
            return chosen[0]
    for prefix in ("diffusion_model.", "text_encoders.", "transformer."):
        dotted = [n for n in names if n.startswith(prefix)]
        if dotted:
            return dotted[0]
    return given if given in names else names[0]
