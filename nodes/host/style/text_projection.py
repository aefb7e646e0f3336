"""Text vectors in the space of CLIP's pictures, through the host's own tokenizer and text tower.

Most CLIPs of the host hand out a pooled vector that has not been projected (SD1.5, FLUX, SD3's clip_l), and where a
file has no projection the host's layer may hold whatever its memory held before: the loader does not say so. So the
projection is looked at before it is believed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import comfy.model_management
import torch

from ....weights.clip_space.towers import check_pair, text_tower
from ....weights.errors import StyleLoomError

_NAMES = ("clip_g", "clip_h", "clip_l")


@dataclass(frozen=True)
class Tower:
    """One text tower of a CLIP: `key` is the tokenizer's ("g"), `module` the host's, `sizes` (width, layers)."""

    key: str
    module: object
    sizes: tuple[int, int]
    pair: str


def find_tower(clip, image: tuple[int, int, int]) -> Tower:
    """The text tower of a CLIP that was trained with an image tower.

    Args:
        clip: CLIP. image: (hidden, projection, tokens) of the image tower.

    Raises:
        StyleLoomError: none of its towers was; the projection is missing.
    """
    model = clip.cond_stage_model
    found = [(name, getattr(model, name)) for name in _NAMES if getattr(model, name, None) is not None]
    found = [(name, module) for name, module in found if hasattr(module.transformer, "text_projection")]
    if not found:
        raise StyleLoomError(
            f"clip is {type(model).__name__}, which has no CLIP text tower",
            "the text tower that was trained with the image encoder",
            "Connect the CLIP of an SDXL checkpoint (for pictures encoded by ViT-bigG), or load the text encoder of "
            "your image encoder with Load CLIP.",
        )
    problem = None
    for name, module in found:
        projection = module.transformer.text_projection
        sizes = (projection.in_features, module.transformer.num_layers)
        try:
            pair = check_pair(image, sizes, projection.out_features)
        except StyleLoomError as error:
            # Of several towers that do not fit, the one that is known says best what is missing.
            problem = error if problem is None or text_tower(*sizes) else problem
            continue
        _check_projection(name, projection.weight)
        return Tower(name.removeprefix("clip_"), module, sizes, pair)
    raise problem


def _check_projection(name: str, weight: torch.Tensor | None) -> None:
    """Refuse a projection that no file can have held: none, zeros, the identity, or memory that was never written.

    A trained one has entries of the order of 1/√width, spread over all its rows and columns.
    """
    w = None if weight is None else weight.detach().float().cpu()
    what = ""
    if w is None:
        what = "is missing"
    elif not bool(w.isfinite().all()):
        what = "holds NaN or infinity"
    else:
        scale = float(w.double().std()) * math.sqrt(w.shape[1])
        rows, columns = w.double().norm(dim=1), w.double().norm(dim=0)
        if not 0.05 < scale < 20:
            what = f"has entries of size {scale / math.sqrt(w.shape[1]):.2g}"
        elif torch.equal(w, torch.eye(*w.shape)):
            what = "is the identity"
        elif min(rows.min() / rows.max(), columns.min() / columns.max()) < 1e-3:
            what = "has empty rows or columns"
    if what:
        raise StyleLoomError(
            f"the text projection of {name} {what}: the file that clip was loaded from has none",
            f"a trained {name}.transformer.text_projection.weight",
            "Checkpoints leave it out for SD1.5 and for the smaller tower of SDXL. Load the text encoder from its own "
            "file (clip_l.safetensors of FLUX or SD3 has it) with Load CLIP.",
        )


def text_vectors(clip, tower: Tower, texts: list[str]) -> torch.Tensor:
    """Projected, unnormalised text vectors, (texts, n) fp32 on the CPU.

    Raises:
        StyleLoomError: a text that is longer than the tower reads (its vector would be that of the beginning).
    """
    model, module = clip.cond_stage_model, tower.module
    vectors = []
    for text in texts:
        tokens = clip.tokenize(text)
        if len(tokens[tower.key]) > 1:
            raise StyleLoomError(
                f"{text[:40]!r}… is longer than 75 tokens",
                "short texts: one concept a line",
                "Shorten it, or break it into several lines.",
            )
        model.reset_clip_options()
        clip.load_model(tokens)
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            module.set_clip_options({"projected_pooled": True, "execution_device": clip.patcher.load_device})
            _, pooled = module.encode_token_weights(tokens[tower.key])[:2]
        finally:
            model.reset_clip_options()
        vectors.append(pooled.float().cpu().reshape(1, -1))
    made = torch.cat(vectors)
    if not bool(made.isfinite().all()):
        raise StyleLoomError(
            "a text vector is not finite", "finite numbers", "The text encoder's file is damaged: download it again."
        )
    return made
