"""What a merge must know of the model: its names, which spelling its LoRAs are written in, and the sizes of its
weights."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import comfy.lora_convert
import comfy.model_base

from ...weights.lora.reading import CanonicalLoRA, read_lora
from ...weights.lora.sdxl_names import clip_key_map
from .lora_patches import host_key_map, weight_at


@dataclass
class ModelTargets:
    """The targets of a model through the host's key maps; without a model, `key_map` is None and the built-in map of
    SDXL has its place."""

    key_map: dict[str, Hashable] | None = None
    family: str = ""
    roots: tuple = ()

    def read(self, lora, label: str) -> CanonicalLoRA:
        """`read_lora`, after the host's own conversions of foreign formats. What the key map names and the model has
        not (it knows a skip convolution for every block, for example) counts as unknown."""
        if self.key_map is None:
            return read_lora(lora, label)
        shape = self.weight_shape
        found = read_lora(comfy.lora_convert.convert_lora(dict(lora)), label, self.key_map, shape)
        for target in list(found.adapters):
            key = target[0] if isinstance(target, tuple) else target
            if key.startswith("diffusion_model.") and shape(key) is None:
                del found.adapters[target]
                found.unknown.append(found.stems.pop(target))
        return found

    @property
    def weight_shape(self):
        """Function of a weight's name → its shape, None for a weight that is not at hand; None without a model."""
        if self.key_map is None:
            return None

        def shape(key: str) -> tuple[int, ...] | None:
            found = weight_at(self.roots, key)
            return None if found is None else tuple(found.shape)

        return shape


def model_targets(model, clip) -> ModelTargets:
    """Of a MODEL and a CLIP; either may be None. Names of CLIP's text towers are known without the CLIP too."""
    if model is None:
        return ModelTargets()
    known = {} if clip is not None else clip_key_map()
    family = ""
    if "num_res_blocks" in model.model.model_config.unet_config:
        family = "sdxl" if isinstance(model.model, comfy.model_base.SDXL) else "sd15"
    roots = (model.model,) + (() if clip is None else (clip.cond_stage_model,))
    return ModelTargets({**known, **host_key_map(model, clip)}, family, roots)
