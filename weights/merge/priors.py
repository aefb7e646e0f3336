"""Layer priors: which blocks of a model speak for content, which for style.

A prior is a weight for each of the two errors of a layer, so it decides only where the two LoRAs conflict. A weight of
0 is more: that LoRA is left out of the block, in layers that only it has too. The blocks
are SDXL's; sources: DuoLoRA (arXiv 2504.13206), B-LoRA (arXiv 2403.14572), InstantStyle (arXiv 2404.02733). They
disagree about the blocks after the middle, so the default is soft.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable

from ..errors import StyleLoomError
from ..unet.architecture import SDXL, checkpoint_name
from .targets import key_of

Prior = Callable[[Hashable], tuple[float, float]]
EVEN = (1.0, 1.0)

# Block of the checkpoint → (content, style); the first that a layer's name begins with.
_DEPTHS = {checkpoint_name(block): depth for block, depth, _ in SDXL.blocks}
_DEEPEST = max(_DEPTHS.values())
_STYLE = [checkpoint_name(block) for block in SDXL.style]
_CONTENT = [checkpoint_name(block) for block in SDXL.content]


def _by_depth(weight: float) -> dict[str, tuple[float, float]]:
    """The deep blocks, of low resolution, for content, the others for style."""
    return {name: (weight, 1.0) if depth == _DEEPEST else (1.0, weight) for name, depth in _DEPTHS.items()}


# Softly, with the block of the style taken out of the deep ones; the last of them counts evenly.
SOFT = {name: row for name, row in _by_depth(1.5).items() if name != "output_blocks.2"}
SOFT |= dict.fromkeys(_STYLE, (1.0, 1.5))
# Low resolution speaks for content, the rest for style (the paper's intent; its code reaches 240 of 560 layers).
DUOLORA = _by_depth(2.0)
# The two attentions that a B-LoRA consists of, each for one of the two alone.
B_LORA = dict.fromkeys(_CONTENT, (1.0, 0.0)) | dict.fromkeys(_STYLE, (0.0, 1.0))

PRESETS = {"soft": SOFT, "duolora": DUOLORA, "b-lora": B_LORA, "none": {}}
CUSTOM = "custom"
OPTIONS = (*PRESETS, CUSTOM)

# diffusers' names of the blocks, for custom priors.
_OTHER_NAMES = {diffusers: checkpoint_name(block) for block, _, diffusers in SDXL.blocks}
_OTHER_NAMES["mid_block"] = "middle_block"


def _table(rows: dict[str, tuple[float, float]]) -> Prior:
    def prior(target: Hashable) -> tuple[float, float]:
        name = key_of(target).removeprefix("diffusion_model.").removeprefix("name:")
        for block, weights in rows.items():
            if block != "*" and (name == block or name.startswith((f"{block}.", f"{block.replace('.', '_')}_"))):
                return weights
        return rows.get("*", EVEN)

    return prior


def _bad(found: str) -> StyleLoomError:
    return StyleLoomError(
        f"custom_prior: {found}",
        'text such as {"input_blocks.7": [1.5, 1], "up_blocks.0.attentions.1": [1, 1.5], "*": [1, 1]}: '
        "content and style weight of a block, each at least 0 and not both 0",
        "Write it so, or choose another prior.",
    )


def _parse(text: str) -> dict[str, tuple[float, float]]:
    try:
        given = json.loads(text or "null")
    except ValueError as error:
        raise _bad(f"this is no JSON ({error})") from error
    if not isinstance(given, dict) or not given:
        raise _bad(f"it is {text!r}")
    rows = {}
    for block, pair in given.items():
        numbers = isinstance(pair, list) and len(pair) == 2 and all(type(p) in (int, float) for p in pair)
        if not numbers or not all(math.isfinite(p) and p >= 0 for p in pair) or sum(pair) == 0:
            raise _bad(f"{block} has {pair!r}")
        rows[block] = (float(pair[0]), float(pair[1]))
        if block in _OTHER_NAMES:
            rows[_OTHER_NAMES[block]] = rows[block]
    return rows


def layer_prior(preset: str, family: str, custom: str = "") -> tuple[Prior, str]:
    """The prior as a function of a target, and a word for the report where it has no effect.

    Args:
        preset: one of `OPTIONS`.
        family: 'sdxl', or another: the presets are SDXL's and weigh every layer of another model evenly.
        custom: JSON for `custom`, blocks of any model by the beginning of their names.

    Raises:
        StyleLoomError: an unknown preset; a custom prior that is not as described.
    """
    if preset == CUSTOM:
        return _table(_parse(custom)), ""
    if preset not in PRESETS:
        raise StyleLoomError(f"prior is {preset!r}", f"one of {', '.join(OPTIONS)}", "Choose one of these.")
    if preset != "none" and family != "sdxl":
        return _table({}), f"prior {preset}: known for SDXL only, so every layer counts evenly here"
    return _table(PRESETS[preset]), ""
