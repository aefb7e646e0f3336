"""Recognising the IP-Adapters of diffusion transformers, by keys and shapes.

| adapter | image projection | blocks |
|---|---|---|
| XLabs, FLUX.1 | one linear layer and a norm over CLIP ViT-L's `image_embeds` | K and V with bias, 19 double blocks |
| InstantX, FLUX.1 | an MLP and a norm over SigLIP's pooled vector | K and V, 19 double and 38 single blocks |
| InstantX, SD3.5-large | a resampler over SigLIP's tokens and the time step | K, V and four norms, 38 blocks |

Layouts: XLabs-AI/x-flux (and the form that diffusers writes), Shakker-Labs/ComfyUI-IPAdapter-Flux,
Slickytail/ComfyUI-InstantX-IPAdapter-SD3. What is the same for
every file of a kind (number of blocks, the shape of each tensor against the others) is required; widths are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..clip_space.towers import VIT_L, ImageTower
from ..dit.style_blocks import FLUX1_ALL, FLUX1_DOUBLE, SD35_LARGE, DiTArchitecture
from ..errors import StyleLoomError
from ..unet.architecture import Block
from .timed_resampler import HEAD

XLABS, INSTANTX, INSTANTX_SD3 = "XLabs", "InstantX", "InstantX (time steps)"
SIGLIP = ImageTower(
    "SigLIP so400m-384", 1152, 1152, 729, "SigLIP's own text", "google/siglip-so400m-patch14-384 (model.safetensors)"
)
POOLED = "styleloom_pooled"  # the field of an encoded picture with SigLIP's pooled vector
_STRAY = 8

_XLABS_PROJECTION = "ip_adapter_proj_model."
_XLABS_LAYER = re.compile(r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.(weight|bias)")
_LAYER = re.compile(r"(\d+)\.to_[kv]_ip\..+")


class Linear(NamedTuple):
    """weight (out, in) and bias (out,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class DiTAdapter:
    """An opened IP-Adapter for a transformer. The tensors stay where the file's reader put them.

    Attributes:
        name: of the file. kind: XLABS, INSTANTX, INSTANTX_SD3.
        feature: which field of an encoded picture it reads. width: of that feature. cross: width of its tokens.
        tokens: for one picture. encoder: the image tower that it was trained with, None if the width is of no
            published one.
        hidden: width of the model's blocks.
        projection: tensors of `image_proj`. blocks: block → (to_k, to_v), or for INSTANTX_SD3 its tensors by name.
        ignored: keys of the file that no part of the adapter needs.
        head: SigLIP's pooling head (`siglip_head.py`), where the adapter reads the pooled vector and it was given.
    """

    name: str
    kind: str
    feature: str
    width: int
    cross: int
    tokens: int
    encoder: ImageTower | None
    hidden: int
    architecture: DiTArchitecture
    projection: Mapping[str, torch.Tensor]
    blocks: Mapping[Block, tuple[Linear, Linear] | Mapping[str, torch.Tensor]]
    ignored: tuple[str, ...] = ()
    head: Mapping[str, torch.Tensor] | None = None

    @property
    def model(self) -> str:
        """The base model that it is for."""
        return self.architecture.name

    @property
    def label(self) -> str:
        """What it is, in words."""
        encoder = self.encoder.name if self.encoder else "not known"
        publisher = self.kind.partition(" ")[0]
        return f"{publisher} IP-Adapter for {self.model}, {self.tokens} tokens a picture, encoder {encoder}"


def unpacked(tensors: Mapping) -> Mapping:
    """XLabs's own names as `image_proj.…` and `ip_adapter.N.to_k_ip.…`, as diffusers writes them; other files as they
    are."""
    if not any(_XLABS_LAYER.fullmatch(str(key)) for key in tensors):
        return tensors
    made = {}
    for key, value in tensors.items():
        layer = _XLABS_LAYER.fullmatch(str(key))
        if layer:
            made[f"ip_adapter.{layer[1]}.to_{layer[2]}_ip.{layer[3]}"] = value
        else:
            made[re.sub(f"^{re.escape(_XLABS_PROJECTION)}", "image_proj.", str(key))] = value
    return made


def recognise_transformer(
    name: str, proj: Mapping[str, torch.Tensor], ip: Mapping[str, torch.Tensor], stray: list[str]
) -> DiTAdapter | None:
    """The adapter, or None for one that is for no transformer.

    Raises:
        StyleLoomError: tensors missing or of shapes that contradict one another.
    """
    numbers = {int(m[1]) for m in map(_LAYER.fullmatch, ip) if m}
    plain_mlp = "proj.2.weight" in proj and "proj.3.weight" not in proj and "norm.weight" in proj
    # Adapters for UNets may have the same projections; their layers have odd numbers.
    if "proj.weight" in proj and {0, 2} & numbers:
        return _flux(name, XLABS, proj, ip, stray)
    if plain_mlp and {0, 2} & numbers:
        return _flux(name, INSTANTX, proj, ip, stray)
    if "latents" in proj and any(key.startswith("time") for key in proj):
        return _sd3(name, proj, ip, stray)
    return None


def _sd3(name: str, proj: Mapping, ip: Mapping, stray: list[str]) -> DiTAdapter:
    latents = proj["latents"]
    if latents.ndim != 3:
        raise wrong(name, f"image_proj.latents is {list(latents.shape)}")
    tokens, dim = latents.shape[1:]

    def matrix(key: str) -> tuple[int, int]:
        return _matrix(name, f"image_proj.{key}", proj.get(key))

    width, cross = matrix("proj_in.weight")[1], matrix("proj_out.weight")[0]
    wave = matrix("time_embedding.linear_1.weight")[1]
    due = {"latents": (1, tokens, dim), "proj_in.weight": (dim, width), "proj_in.bias": (dim,)}
    due |= {"proj_out.weight": (cross, dim), "proj_out.bias": (cross,)}
    due |= {"norm_out.weight": (cross,), "norm_out.bias": (cross,)}
    due |= {"time_embedding.linear_1.weight": (dim, wave), "time_embedding.linear_1.bias": (dim,)}
    due |= {"time_embedding.linear_2.weight": (dim, dim), "time_embedding.linear_2.bias": (dim,)}
    depth = 1 + max((int(key.split(".")[1]) for key in proj if re.match(r"layers\.\d+\.", key)), default=-1)
    for i in range(max(depth, 1)):
        at = f"layers.{i}"
        inner, wide = matrix(f"{at}.0.to_q.weight")[0], matrix(f"{at}.1.1.weight")[0]
        if inner % HEAD:
            raise wrong(name, f"image_proj.{at}.0.to_q.weight has {inner} rows, no multiple of {HEAD}")
        for norm in ("0.norm1", "0.norm2", "1.0"):
            due |= {f"{at}.{norm}.weight": (dim,), f"{at}.{norm}.bias": (dim,)}
        due |= {f"{at}.0.to_q.weight": (inner, dim), f"{at}.0.to_kv.weight": (2 * inner, dim)}
        due |= {f"{at}.0.to_out.weight": (dim, inner), f"{at}.1.1.weight": (wide, dim), f"{at}.1.3.weight": (dim, wide)}
        due |= {f"{at}.2.1.weight": (4 * dim, dim), f"{at}.2.1.bias": (4 * dim,)}
    hidden = _matrix(name, "ip_adapter.0.to_k_ip.weight", ip.get("0.to_k_ip.weight"))[0]
    head = ip.get("0.norm_q.weight")
    if head is None or head.ndim != 1 or not len(head) or hidden % len(head):
        raise wrong(name, "ip_adapter.0.norm_q.weight is missing or fits no head of its blocks")
    shapes = {f"to_{part}_ip.weight": (hidden, cross) for part in "kv"}
    shapes |= {"norm_ip.linear.weight": (2 * cross, dim), "norm_ip.linear.bias": (2 * cross,)}
    shapes |= {f"{norm}.weight": (len(head),) for norm in ("norm_q", "norm_k", "norm_ip_k")}
    count = len(SD35_LARGE.blocks)
    whole = {f"{n}.{key}": shape for n in range(count) for key, shape in shapes.items()}
    ignored = (*stray, *check(name, "image_proj", proj, due), *check(name, "ip_adapter", ip, whole))
    if len(ignored) > _STRAY:
        raise wrong(name, f"{len(ignored)} keys belong to no part of an InstantX IP-Adapter: {', '.join(ignored[:3])}")
    blocks = {block: {key: ip[f"{n}.{key}"] for key in shapes} for n, (block, _, _) in enumerate(SD35_LARGE.blocks)}
    encoder = SIGLIP if width == SIGLIP.hidden else None
    projection = {key: proj[key] for key in due}
    return DiTAdapter(
        name, INSTANTX_SD3, "penultimate_hidden_states", width, cross, tokens, encoder, hidden, SD35_LARGE, projection,
        blocks, ignored,
    )  # fmt: skip


def _flux(name: str, kind: str, proj: Mapping, ip: Mapping, stray: list[str]) -> DiTAdapter:
    architecture = FLUX1_DOUBLE if kind == XLABS else FLUX1_ALL
    bias = kind == XLABS
    hidden, cross = _matrix(name, "ip_adapter.0.to_k_ip.weight", ip.get("0.to_k_ip.weight"))
    last = "proj" if kind == XLABS else "proj.2"
    rows, inner = _matrix(name, f"image_proj.{last}.weight", proj.get(f"{last}.weight"))
    if rows % cross:
        raise wrong(name, f"image_proj.{last}.weight has {rows} rows, no multiple of {cross}")
    due = {"norm.weight": (cross,), "norm.bias": (cross,), f"{last}.weight": (rows, inner), f"{last}.bias": (rows,)}
    width = inner
    if kind == INSTANTX:
        width = _matrix(name, "image_proj.proj.0.weight", proj.get("proj.0.weight"))[1]
        due |= {"proj.0.weight": (inner, width), "proj.0.bias": (inner,)}
    layers = {}
    for number in range(len(architecture.blocks)):
        for part in "kv":
            layers[f"{number}.to_{part}_ip.weight"] = (hidden, cross)
            if bias:
                layers[f"{number}.to_{part}_ip.bias"] = (hidden,)
    ignored = (*stray, *check(name, "image_proj", proj, due), *check(name, "ip_adapter", ip, layers))
    if len(ignored) > _STRAY:
        raise wrong(name, f"{len(ignored)} keys belong to no part of {a_kind(kind)}: {', '.join(ignored[:3])}")
    blocks = {
        block: tuple(Linear(ip[f"{n}.to_{p}_ip.weight"], ip.get(f"{n}.to_{p}_ip.bias") if bias else None) for p in "kv")
        for n, (block, _, _) in enumerate(architecture.blocks)
    }
    feature, tower = ("image_embeds", VIT_L) if kind == XLABS else (POOLED, SIGLIP)
    encoder = tower if width == tower.projection else None
    return DiTAdapter(
        name, kind, feature, width, cross, rows // cross, encoder, hidden, architecture, proj, blocks, ignored
    )


def a_kind(kind: str) -> str:
    return f"an {kind} IP-Adapter"


def wrong(name: str, found: str) -> StyleLoomError:
    """The error for a file whose parts do not fit together."""
    return StyleLoomError(
        f"{name}: {found}",
        "a whole IP-Adapter for FLUX.1 (XLabs, InstantX) or SD3.5-large (InstantX)",
        "The file is damaged or another version: download it again from its publisher.",
    )


def _matrix(name: str, key: str, tensor) -> tuple[int, int]:
    if tensor is None or tensor.ndim != 2:
        raise wrong(name, f"{key} is missing or no matrix")
    return tuple(tensor.shape)


def check(name: str, part: str, tensors: Mapping, due: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The keys that are not due.

    Raises:
        StyleLoomError: one that is due is missing or has another shape.
    """
    for key, shape in due.items():
        if key not in tensors:
            raise wrong(name, f"{part}.{key} is missing")
        if tuple(tensors[key].shape) != shape:
            raise wrong(name, f"{part}.{key} is {list(tensors[key].shape)} where {list(shape)} is due")
    return sorted(f"{part}.{key}" for key in tensors if key not in due)
