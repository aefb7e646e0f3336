"""What is this file? Recognition by header alone, never by its name: every published file is a `model.safetensors`.

The key hash is the one by which DiffSynth-Studio registers checkpoints (`diffsynth/core/loader/file.py`): for every
tensor the two strings `name:d0_d1_…` and `name`, all sorted, joined by commas, MD5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import StyleLoomError
from ..tensor_file import FLOAT_DTYPES, Header
from .file_recognition import describe
from .layouts import FAMILIES, RANK, Family, PredictorSpec, Residual, key_shapes, targets

# Published predictors by key hash. Z-Image-i2L and Z-Image-Omni-Base-i2L have one layout: the header cannot tell them.
PUBLISHED = {
    "0aad514690602ecaff932c701cb4b0bb": "Qwen-Image-i2L Style",
    "a166c33455cdbd89c0888a3645ca5c0f": "Qwen-Image-i2L Coarse",
    "a5476e691767a4da6d3a6634a10f7408": "Qwen-Image-i2L Fine",
    "9510cb8cd1dd34ee0e4f111c24905510": "Z-Image-i2L or Z-Image-Omni-Base-i2L",
    "4f04fa4db33673882c675f426bf42602": "Z-Image i2L, unreleased, compress 64",
    "cd7427f65cd4cc8092c00c373e2e0a23": "Z-Image i2L, unreleased, compress 256",
}
_NAMED = "Qwen-Image-i2L (Style, Coarse, Fine), Z-Image-i2L or Z-Image-Omni-Base-i2L"
_GET_ONE = (
    "Download one from huggingface.co/DiffSynth-Studio or modelscope.cn/models/DiffSynth-Studio into "
    "models/i2l, and choose it here."
)


def key_hash(shapes: Mapping[str, Sequence[int]]) -> str:
    """MD5 (hex) of names and shapes, equal to DiffSynth-Studio's; dtypes and values do not enter."""
    lines = []
    for name, shape in shapes.items():
        lines += [f"{name}:{'_'.join(map(str, shape))}", name]
    return hashlib.md5(",".join(sorted(lines)).encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Recognised:
    """A predictor's header, understood. `published` names the checkpoint; empty for an unknown, consistent one."""

    spec: PredictorSpec
    key_hash: str
    published: str

    @property
    def label(self) -> str:
        return self.published or f"unpublished {self.spec.family.label} i2L predictor"

    @property
    def warning(self) -> str:
        """One line where the checkpoint is not a published one, else empty."""
        if self.published:
            return ""
        widths = ", ".join(f"{name} {width}" for name, width in self.spec.widths.items())
        return (
            f"key hash {self.key_hash} is not that of a published i2L predictor; its shapes are consistent "
            f"({self.spec.family.label}, {widths}, compress {self.spec.compress}, rank {self.spec.rank}), "
            "so it is used as they say"
        )


def _family(header: Header) -> Family:
    kind = describe(header.tensors)
    if kind == "an i2L v2 predictor":
        raise StyleLoomError(
            f"{header.name}: this is an i2L v2 predictor",
            f"a v1 predictor: {_NAMED}",
            "The mathematics of v2 is published only as code inside the model's own folder, and StyleLoom runs no code "
            "from model folders. Use the v1 predictor of your base model.",
        )
    for family in FAMILIES.values():
        stored = [component.stored + "." for component in family.components]
        if any(key.startswith(stored[0]) and ".proj_a." in key for key in header.tensors):
            return family
    raise StyleLoomError(
        f"{header.name}: this is {kind}, not an i2L predictor", f"an i2L predictor: {_NAMED}", _GET_ONE
    )


def _shape(header: Header, key: str) -> tuple[int, int]:
    info = header.tensors.get(key)
    if info is None or len(info.shape) != 2 or 0 in info.shape:
        found = "is missing" if info is None else f"has the shape {list(info.shape)}"
        raise StyleLoomError(
            f"{header.name}: the tensor {key!r} {found}",
            "a matrix that every i2L predictor has",
            "The file is damaged or was cut: download it again.",
        )
    return info.shape


def _read_spec(header: Header, family: Family) -> PredictorSpec:
    """Solve the shapes of the first block of each group for the spec; the rest is compared afterwards."""
    first = {}
    for target in targets(family):
        first.setdefault((target.a_width, target.b_width), target)
    any_target = next(iter(first.values()))
    compress, in_dim = _shape(header, f"{any_target.stored}.proj_a.proj_in.weight")

    rows: dict[str, int] = {}
    for (a_width, b_width), target in first.items():
        rows.setdefault(a_width, _shape(header, f"{target.stored}.proj_a.proj_out.weight")[0])
        rows.setdefault(b_width, _shape(header, f"{target.stored}.proj_b.proj_out.weight")[0])
    # rows = width * rank. At the published widths the rank follows; at any other both are free, and the rank of all
    # published predictors is taken: a wrong guess cannot pass, as the widths then miss those of the target model.
    rank, rest = divmod(rows["dim"], family.widths["dim"])
    if rest or any(rows[name] != width * rank for name, width in family.widths.items()):
        rank = RANK
    if any(count % rank for count in rows.values()):
        raise StyleLoomError(
            f"{header.name}: the output maps have {rows} rows",
            f"multiples of the rank {rank} (published: {family.widths} times the rank)",
            _GET_ONE,
        )

    residual = None
    key = f"{any_target.block}.proj_residual.proj_in.weight"
    if key in header.tensors:
        mid, text_width = _shape(header, key)
        columns = _shape(header, f"{any_target.block}.proj_residual.proj_out.weight")[1]
        tokens, rest = divmod(columns, mid)
        if rest:
            raise StyleLoomError(f"{header.name}: {columns} residual columns", f"a multiple of {mid}", _GET_ONE)
        residual = Residual(text_width, tokens, mid)
    return PredictorSpec(family, compress, in_dim, rank, {name: rows[name] // rank for name in family.widths}, residual)


def recognise_predictor(header: Header) -> Recognised:
    """Tell from names and shapes which i2L predictor a file is.

    Args:
        header: from `read_header`; the tensors themselves are not read.

    Returns:
        Its spec, key hash and published name. Shapes that are unknown but consistent are accepted with a `warning`.

    Raises:
        StyleLoomError: not a predictor (with what it seems to be), a v2 predictor, missing, additional or misshapen
            tensors (with their names), or tensors that are not of a float dtype.
    """
    spec = _read_spec(header, _family(header))
    expected = key_shapes(spec)
    found = header.shapes
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is not part of one" for key in found if key not in expected]
    problems += [
        f"{key} is {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if found.get(key, shape) != shape
    ]
    problems += [
        f"{key} is stored as {info.dtype}" for key, info in header.tensors.items() if info.dtype not in FLOAT_DTYPES
    ]
    if problems:
        shown = "; ".join(problems[:4])
        raise StyleLoomError(
            f"{header.name}: {len(problems)} tensors do not belong to a {spec.family.label} i2L predictor: {shown}",
            f"{len(expected)} float tensors of one layout, as in {_NAMED}",
            "Download the file again; if it was converted by a tool, use the publisher's own.",
        )
    digest = key_hash(found)
    return Recognised(spec, digest, PUBLISHED.get(digest, ""))
