"""Recognising an IP-Adapter by the keys and shapes of its file, never by its name.

A `.bin` holds two dicts, `image_proj` and `ip_adapter` (some write `adapter_modules`); a `.safetensors` the same flat
with these prefixes. Layout and encoders: tencent-ailab/IP-Adapter (`ip_adapter.py`, `resampler.py`) and
Kwai-Kolors/Kolors (`ipadapter`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..clip_space.towers import BIG_G, VIT_H, VIT_L, VIT_L_336, ImageTower
from ..errors import StyleLoomError
from ..unet.architecture import ARCHITECTURES, SDXL, Architecture
from .dit_formats import DiTAdapter, recognise_transformer, unpacked

BASE, PLUS, FULL = "base", "plus", "full"
HEAD = 64  # width of a head of the published resamplers
_STRAY = 8  # keys that may be left over: more are a part of a kind that is not known
_FACE = 512  # width of a face vector of insightface

# (kind of feature, width) → the encoder that has it
_EMBEDS = {tower.projection: tower for tower in (VIT_H, BIG_G, VIT_L)}
_HIDDEN = {tower.hidden: tower for tower in (VIT_H, BIG_G, VIT_L_336)}

_LAYER = re.compile(r"(\d+)\.to_([kv])_ip\.weight")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An opened IP-Adapter. The tensors stay where the file's reader put them, usually in the mapped file.

    Attributes:
        name: of the file. kind: base, plus (resampler) or full (one token for each of the encoder's).
        feature: which field of CLIP_VISION_OUTPUT it reads. width: of that feature. cross: width of its tokens.
        tokens: for one picture; for kind full the encoder's number of tokens, given here as 0.
        encoder: the image tower that it was trained with, None where the sizes are of no published one.
        projection: tensors of `image_proj`. layers: number in the file → (to_k, to_v), each (width, cross).
        ignored: keys of the file that no part of the adapter needs.
    """

    name: str
    kind: str
    feature: str
    width: int
    cross: int
    tokens: int
    encoder: ImageTower | None
    architecture: Architecture
    projection: Mapping[str, torch.Tensor]
    layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    ignored: tuple[str, ...] = ()

    @property
    def is_for_kolors(self) -> bool:
        """Kolors has SDXL's UNet and another text encoder: the sizes of the layers say nothing, the encoder does."""
        return self.encoder is VIT_L_336 and self.architecture is SDXL

    @property
    def model(self) -> str:
        """The base model that it is for."""
        return "Kolors" if self.is_for_kolors else self.architecture.name

    @property
    def label(self) -> str:
        """What it is, in words."""
        kind = {BASE: "IP-Adapter", PLUS: "IP-Adapter plus", FULL: "IP-Adapter full-face"}[self.kind]
        made = f"{self.tokens} tokens a picture" if self.tokens else "one token for each of the encoder's"
        return f"{kind} for {self.model}, {made}, encoder {self.encoder.name if self.encoder else 'not known'}"


def _refuse(name: str, found: str, fix: str = "Use an IP-Adapter base, light, plus, plus-face or full-face file."):
    return StyleLoomError(
        f"{name}: {found}", "an IP-Adapter with image_proj and ip_adapter (N.to_k_ip.weight, N.to_v_ip.weight)", fix
    )


def _parts(name: str, tensors: Mapping) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    """(image_proj, ip_adapter, keys that are in neither) of a nested or flat file."""
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    stray = []
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            part = "ip_adapter" if key == "adapter_modules" else key
            if part in parts:
                parts[part].update(value)
            else:
                stray.append(str(key))
            continue
        head, _, rest = str(key).partition(".")
        part = "ip_adapter" if head == "adapter_modules" else head
        if part in parts and rest:
            parts[part][rest] = value
        else:
            stray.append(str(key))
    if not parts["image_proj"] or not parts["ip_adapter"]:
        first = ", ".join(list(map(str, tensors))[:3]) or "none"
        raise _refuse(name, f"this is no IP-Adapter (first keys: {first})")
    strange = [key for part in parts.values() for key, value in part.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise _refuse(name, f"{strange[0]!r} is no tensor", "Download the file again.")
    return parts["image_proj"], parts["ip_adapter"], stray


def _refuse_others(name: str, proj: Mapping[str, torch.Tensor], ip: Mapping[str, torch.Tensor]) -> None:
    """What is published in the same two parts and reads no picture.

    Sizes: tencent-ailab/IP-Adapter (`ip_adapter_faceid.py`: 512 numbers a face), InstantX's InstantID (a resampler over
    the same 512).
    """
    first = proj.get("proj.0.weight", proj.get("proj_in.weight"))
    width = first.shape[-1] if first is not None and first.ndim else 0
    plain_mlp = "proj.2.weight" in proj and "proj.3.weight" not in proj
    resampler = "latents" in proj and width == _FACE
    if any("lora" in key for key in ip) or any(key.startswith("perceiver_resampler.") for key in proj):
        what = "a FaceID"
    elif plain_mlp and width in (_FACE, 0):
        what = "a FaceID or portrait"
    elif resampler:
        what = "an InstantID or portrait"
    else:
        return
    raise _refuse(
        name,
        f"this is {what} adapter: it reads the face vectors of insightface, not pictures, and says who somebody is and "
        "not how a picture is made. The licence of insightface's models also allows no commercial use, so this pack "
        "leaves them out",
    )


def _layers(
    name: str, ip: Mapping[str, torch.Tensor]
) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], int, list[str]]:
    """(number → to_k and to_v, their columns, keys that are neither)."""
    halves: dict[int, dict[str, torch.Tensor]] = {}
    stray = []
    for key, value in ip.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            stray.append(f"ip_adapter.{key}")
            continue
        halves.setdefault(int(match[1]), {})[match[2]] = value
    layers, cross = {}, 0
    for number, pair in sorted(halves.items()):
        if set(pair) != {"k", "v"}:
            raise _refuse(name, f"{number}.to_{'v' if 'k' in pair else 'k'}_ip.weight is missing", "Download it again.")
        k, v = pair["k"], pair["v"]
        if k.ndim != 2 or k.shape != v.shape or (cross and k.shape[1] != cross):
            raise _refuse(
                name,
                f"{number}.to_k_ip.weight is {list(k.shape)} and to_v_ip {list(v.shape)}; other layers read {cross}",
                "Download it again.",
            )
        cross = k.shape[1]
        layers[number] = (k, v)
    if not layers:
        raise _refuse(name, f"ip_adapter has no layer that is known (first keys: {', '.join(stray[:3])})")
    return layers, cross, stray


def recognise(name: str, tensors: Mapping) -> Adapter | DiTAdapter:
    """Sort the tensors of a file. Those for transformers: see `dit_formats.py`.

    Args:
        name: for messages. tensors: the file's content, nested or flat.

    Returns:
        The adapter. Keys that it does not need are named in `ignored`: some publishers leave a counter or a switch of
        the training in the file.

    Raises:
        StyleLoomError: no IP-Adapter; a FaceID kind; halves missing; sizes that contradict one another; more than a
            few keys that are not known.
    """
    proj, ip, stray = _parts(name, unpacked(tensors))
    transformer = recognise_transformer(name, proj, ip, stray)
    if transformer is not None:
        return transformer
    _refuse_others(name, proj, ip)
    layers, cross, more = _layers(name, ip)
    architecture = next((a for a in ARCHITECTURES if sorted(a.file_numbers.values()) == sorted(layers)), None)
    if architecture is None:
        due = " or ".join(f"{len(a.layers)} ({a.name})" for a in ARCHITECTURES)
        raise _refuse(name, f"it has {len(layers)} layers, numbered {min(layers)} to {max(layers)}; known are {due}")
    kind, feature, width, tokens, due = _projection(name, proj, cross)
    missing = sorted(key for key in due if key not in proj)
    wrong = sorted(key for key, shape in due.items() if key in proj and tuple(proj[key].shape) != shape)
    if missing or wrong:
        first = (missing or wrong)[0]
        what = "is missing" if missing else f"is {list(proj[first].shape)} where {list(due[first])} is due"
        raise _refuse(name, f"image_proj.{first} {what}", "Download the file again.")
    ignored = (*stray, *more, *sorted(f"image_proj.{key}" for key in proj if key not in due))
    if len(ignored) > _STRAY:
        raise _refuse(name, f"{len(ignored)} keys belong to no part of an IP-Adapter: {', '.join(ignored[:3])}")
    encoder = (_EMBEDS if feature == "image_embeds" else _HIDDEN).get(width)
    return Adapter(name, kind, feature, width, cross, tokens, encoder, architecture, proj, layers, ignored)


def _projection(name: str, proj: Mapping[str, torch.Tensor], cross: int):
    """(kind, feature, its width, tokens, every key with the shape that is due)."""
    if "proj.weight" in proj:
        rows, width = _matrix(name, proj, "proj.weight")
        if rows % cross:
            raise _refuse(name, f"image_proj.proj.weight has {rows} rows, no multiple of {cross}", "Download it again.")
        due = {"proj.weight": (rows, width), "proj.bias": (rows,), "norm.weight": (cross,), "norm.bias": (cross,)}
        return BASE, "image_embeds", width, rows // cross, due
    if "proj.3.weight" in proj:
        width = _matrix(name, proj, "proj.0.weight")[1]
        due = {"proj.0.weight": (width, width), "proj.0.bias": (width,), "proj.2.weight": (cross, width)}
        due |= {"proj.2.bias": (cross,), "proj.3.weight": (cross,), "proj.3.bias": (cross,)}
        return FULL, "penultimate_hidden_states", width, 0, due
    if "latents" in proj:
        if proj["latents"].ndim != 3:
            raise _refuse(name, f"image_proj.latents is {list(proj['latents'].shape)}", "Download it again.")
        _, tokens, dim = proj["latents"].shape
        width = _matrix(name, proj, "proj_in.weight")[1]
        due = {"latents": (1, tokens, dim), "proj_in.weight": (dim, width), "proj_in.bias": (dim,)}
        due |= {"proj_out.weight": (cross, dim), "proj_out.bias": (cross,)}
        due |= {"norm_out.weight": (cross,), "norm_out.bias": (cross,)}
        for i in range(depth(proj)):
            inner = _matrix(name, proj, f"layers.{i}.0.to_q.weight")[0]
            wide = _matrix(name, proj, f"layers.{i}.1.1.weight")[0]
            if inner % HEAD:
                raise _refuse(name, f"image_proj.layers.{i}.0.to_q.weight has {inner} rows, no multiple of {HEAD}")
            for norm in ("0.norm1", "0.norm2", "1.0"):
                due |= {f"layers.{i}.{norm}.weight": (dim,), f"layers.{i}.{norm}.bias": (dim,)}
            due |= {f"layers.{i}.0.to_q.weight": (inner, dim), f"layers.{i}.0.to_kv.weight": (2 * inner, dim)}
            due |= {f"layers.{i}.0.to_out.weight": (dim, inner)}
            due |= {f"layers.{i}.1.1.weight": (wide, dim), f"layers.{i}.1.3.weight": (dim, wide)}
        return PLUS, "penultimate_hidden_states", width, tokens, due
    raise _refuse(name, f"its image projection is of an unknown kind (keys: {', '.join(sorted(proj)[:4])})")


def depth(proj: Mapping[str, torch.Tensor]) -> int:
    """Layers of a resampler."""
    return 1 + max((int(key.split(".")[1]) for key in proj if re.match(r"layers\.\d+\.", key)), default=-1)


def _matrix(name: str, proj: Mapping[str, torch.Tensor], key: str) -> tuple[int, int]:
    if key not in proj or proj[key].ndim != 2:
        raise _refuse(name, f"image_proj.{key} is missing or no matrix", "Download the file again.")
    return tuple(proj[key].shape)
