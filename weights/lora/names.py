"""Names of layers in LoRA files: which weight a stem belongs to, and what to call it when it is written.

Trainers' spellings: kohya (`lora_unet_…` with underscores), diffusers and PEFT (`base_model.model.`, `unet.`, doubled
`unet.unet.`), the older diffusers (`.processor.to_q`), SimpleTuner (`lycoris_…`), OneTrainer (`lora_transformer_…`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

# What trainers put before the name of a layer of the diffusion model, longest first; taken off as often as they occur.
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")

# Beginnings of the names that trainers give to layers of text encoders.
_TEXT = ("lora_te", "lora_prior_te", "text_encoder", "text_model", "te.", "te1.", "te2.", "clip_l", "clip_g", "t5xxl.")


def is_text_key(key: str) -> bool:
    """Whether a key or stem of a LoRA is for a text encoder, by its name."""
    return key.startswith(_TEXT) or ".text_model." in key


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
