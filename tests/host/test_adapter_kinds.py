"""Every kind of adapter on one small layer, against the host's own loader and merge: what the table of kinds says of
reading, filtering, merging, applying on rows of a batch, and writing."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.lora.block_filter import filter_blocks
from styleloom.weights.lora.kinds import NoTerm, Place, from_host, kinds_of, to_host
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.lora.reading import read_lora
from styleloom.weights.lora.writing import write_lora
from styleloom.weights.row_adapters.layers import layer_of
from styleloom.weights.row_adapters.low_rank import LowRankTerm

F64 = torch.float64
LAYERS = {
    "linear": lambda: torch.nn.Linear(12, 8),
    "square": lambda: torch.nn.Linear(16, 16),
    "conv 3x3": lambda: torch.nn.Conv2d(12, 8, 3, padding=1),
    "conv 1x1": lambda: torch.nn.Conv2d(12, 8, 1),
}
MERGED = ("lora", "tucker", "loha", "loha_tucker", "lokr", "lokr_factored", "lokr_tucker", "diff", "set")
REFUSED = {"dora": "DoRA", "oft": "OFT", "boft": "BOFT", "glora": "GLoRA", "glora_old": "GLoRA"}
NOT_SCALED = {"dora": "DoRA", "oft": "OFT", "boft": "BOFT", "set": "set weight"}
STEM = "diffusion_model.layer"
KEY_MAP = {STEM: f"{STEM}.weight"}
CASES = [(kind, name) for kind in (*MERGED, *REFUSED) for name in LAYERS]
# The host's rotations are for float32 alone. With ‖Q‖ < 1 an inverse is good to some units of 6e-8.
SINGLE = ("oft", "boft")
BOUNDS = dict.fromkeys(SINGLE, 1e-5)


@pytest.fixture(scope="module")
def made(kit):
    """(the layer, a LoRA of the kind for it), both in float64 where the host's merge can do it."""

    def get(kind, name, alpha=2.0):
        torch.manual_seed(3)
        dtype = torch.float32 if kind in SINGLE else F64
        layer = LAYERS[name]().to(dtype).requires_grad_(False)
        found = kit.adapters.KINDS[kind](f"{kind} {name}", tuple(layer.weight.shape), 3, 0.5)
        lora = {f"{STEM}.{end}": tensor.to(dtype) for end, tensor in found.items()}
        if alpha is not None and kind not in ("diff", "set"):
            lora[f"{STEM}.alpha"] = torch.tensor(alpha)
        return layer, lora

    return get


@pytest.fixture
def merged(host, monkeypatch):
    """(LoRA, weight, strength) → the weight after the host's merge."""
    kron = torch.kron
    # torch.kron stops at the layout in which the host multiplies out a Tucker form; the arithmetic is what counts.
    monkeypatch.setattr(torch, "kron", lambda a, b: kron(a.contiguous(), b.contiguous()))

    def merge(lora, weight, strength=1.0):
        patches = host.comfy.lora.load_lora(dict(lora), KEY_MAP)
        (patch,) = patches.values()
        return host.comfy.lora.calculate_weight(
            [(strength, patch, 1.0, None, None)], weight.clone(), KEY_MAP[STEM], intermediate_dtype=weight.dtype
        )

    return merge


def patch_of(host, lora):
    (patch,) = host.comfy.lora.load_lora(dict(lora), KEY_MAP).values()
    return patch


def close(found, due, kind=""):
    assert (found - due).norm() <= BOUNDS.get(kind, 1e-9) * due.norm(), float((found - due).norm() / due.norm())


def applied(kind, layer, term, x, strength):
    """A term around a layer, as a guided model runs it."""
    if isinstance(term, LowRank):
        term = LowRankTerm(layer_of(layer), [(term, 0)])
    seen = term.enter(x, (strength,))
    y = layer(seen)
    term.leave(x, y, (strength,), layer)
    return y


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_row_form_is_what_the_host_merges(kind, name, strength, host, made, merged):
    layer, lora = made(kind, name)
    place = Place(KEY_MAP[STEM], "weight", layer_of(layer), 0)
    ((row, own),) = kinds_of(from_host(patch_of(host, lora)), "x")
    if kind in ("dora", "set") or (kind, name) == ("glora_old", "conv 3x3"):
        with pytest.raises(NoTerm):
            row.row_form(own, place)
        return
    x = torch.randn(2, layer.weight.shape[1], *([] if "conv" not in name else [5, 4]), dtype=layer.weight.dtype)
    due = dict(weight=merged(lora, layer.weight, strength), bias=layer.bias)
    y = F.linear(x, **due) if "conv" not in name else F.conv2d(x, **due, padding=layer.padding)
    assert (y - layer(x)).norm() > 0.01 * y.norm(), "the host merged nothing"
    close(applied(kind, layer, row.row_form(own, place), x, strength), y, kind)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_merge_reads_the_change_or_names_the_kind(kind, name, made, merged):
    layer, lora = made(kind, name)
    shape = tuple(layer.weight.shape)
    if kind in REFUSED:
        with pytest.raises(StyleLoomError, match=f"lora0: {STEM} is an? {REFUSED[kind]} adapter"):
            read_lora(lora, "lora0", KEY_MAP, lambda key: shape)
        return
    found = read_lora(lora, "lora0", KEY_MAP, lambda key: shape)
    if kind in ("diff", "set"):
        assert not found.adapters and len(found.other) == 1
    else:
        (adapter,) = found.adapters.values()
        assert adapter.weight_shape == shape
        due = merged(lora, torch.zeros_like(layer.weight))
        down, up = adapter.factors()
        close((up @ down).reshape(shape), due)
    # and what is written, the host merges as it did before
    written = write_lora(found.adapters, found.other, [found], "", KEY_MAP, {})
    close(merged(written, layer.weight), merged(lora, layer.weight))


@pytest.mark.parametrize("alpha", [2.0, None])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_filter_puts_the_strength_into_the_file_or_names_the_kind(kind, name, alpha, made, merged):
    layer, lora = made(kind, name, alpha)
    options = dict(preset="custom patterns", patterns="layer")
    assert filter_blocks(lora, **options).lora == lora
    if kind in NOT_SCALED:
        with pytest.raises(StyleLoomError, match=rf"\({NOT_SCALED[kind]}\) whose change does not scale"):
            filter_blocks(lora, inside=-0.7, **options)
        return
    scaled = filter_blocks(lora, inside=-0.7, **options).lora
    # Alpha is written in float32: -1.4 has a rounding of 2⁻²⁴ there.
    found, due = merged(scaled, layer.weight), merged(lora, layer.weight, -0.7)
    assert (found - due).norm() <= 1e-7 * (due - layer.weight).norm()


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_shape_of_the_change(kind, name, host, made):
    layer, lora = made(kind, name)
    ((row, own),) = kinds_of(from_host(patch_of(host, lora)), "x")
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    assert (rows, columns) in row.shapes(own) or (rows, None) in row.shapes(own)
    assert row.exact_shape(own) in (None, tuple(layer.weight.shape))


@pytest.mark.parametrize(
    ("kind", "name"), [("lokr_tucker", "conv 3x3"), ("lokr_tucker", "conv 1x1"), ("boft", "linear")]
)
def test_what_would_stop_the_hosts_merge_is_given_to_it_in_another_form(
    kind, name, host, made, merged, monkeypatch, caplog
):
    """torch.kron as it is for a Tucker LoKr, and a BOFT without alpha: the host logs an error and goes on without."""
    layer, lora = made(kind, name, alpha=None if kind == "boft" else 2.0)
    due = merged(lora | ({f"{STEM}.alpha": torch.tensor(0.0)} if kind == "boft" else {}), layer.weight)
    monkeypatch.undo()  # torch.kron as it is
    patch = patch_of(host, lora)
    ((row, own),) = kinds_of(from_host(patch), "x")
    ours = to_host(patch, row.for_host(own))
    patches, weight = [(1.0, ours, 1.0, None, None)], layer.weight.clone()
    found = host.comfy.lora.calculate_weight(patches, weight, "w", layer.weight.dtype)
    close(found, due, kind)
    assert "ERROR" not in caplog.text


LOKR_FORMS = {
    "two factors": {"lokr_w1": (2, 3), "lokr_w2": (4, 4, 3)},
    "w1 of two": {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3), "lokr_w2": (4, 4, 3)},
    "w2 of two": {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 12)},
    "a core": {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3), "lokr_t2": (2, 2, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 4)},
}


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("form", LOKR_FORMS)
def test_lokr_on_convolutions_over_one_and_three_axes(form, axes, host, pack, caplog):
    """Against the product of the factors, entry by entry: of such kernels the host's own merge puts the channels of two
    whole factors in the wrong places, and cannot read a core."""
    torch.manual_seed(5)
    layer = {1: torch.nn.Conv1d, 3: torch.nn.Conv3d}[axes](12, 8, 3, padding=1).to(F64).requires_grad_(False)
    kernel = (3,) * axes
    lora = {}
    for name, shape in LOKR_FORMS[form].items():
        if name in ("lokr_w2", "lokr_t2"):
            shape = (*shape[:2], *kernel)
        elif shape == (2, 12):
            shape = (2, 4 * 3**axes)
        lora[f"{STEM}.{name}"] = torch.randn(shape, dtype=F64)
    lora[f"{STEM}.alpha"] = torch.tensor(3.0)

    t = {name.rpartition(".")[2]: value for name, value in lora.items()}
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        w2 = torch.einsum("ij...,ip,jr->pr...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2"] if "lokr_w2" in t else (t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(4, 4, *kernel)
    scale = 1.0 if form == "two factors" else 3.0 / 2
    change = scale * torch.einsum("ab,oi...->aobi...", w1, w2).reshape(layer.weight.shape)

    patch = sys.modules[f"{pack.__name__}.nodes.host.lora_patches"].workable(patch_of(host, lora))
    found = host.comfy.lora.calculate_weight([(0.5, patch, 1.0, None, None)], layer.weight.clone(), "w", F64)
    close(found, layer.weight + 0.5 * change)
    assert "ERROR" not in caplog.text
    for parts in (from_host(patch_of(host, lora)), from_host(patch)):  # as in the file, and as the host is given it
        ((row, own),) = kinds_of(parts, "x")
        assert (8, 12 * 3**axes) in row.shapes(own)
        low = row.low_rank(own)
        close((low.up @ low.down).reshape(layer.weight.shape) * low.scale, change)
        x = torch.randn(2, 12, *(5, 4, 6)[:axes], dtype=F64)
        due = layer(x) + 0.5 * layer_of(layer).convolve(x, change)
        close(applied("lokr", layer, row.row_form(own, Place(KEY_MAP[STEM], "weight", layer_of(layer), 0)), x, 0.5), due)


def test_a_member_that_a_newer_host_adds(host, made):
    """`row_offset` of a LoKr: absent it does no harm, given it is refused by name and not by "too many values"."""
    from styleloom.weights.lora.kinds import UnknownAdapter

    _, lora = made("lokr", "linear")
    patch = patch_of(host, lora)
    patch.weights = (*patch.weights, None)
    assert set(from_host(patch)) == {"lokr_w1", "lokr_w2", "alpha"}
    patch.weights = (*patch.weights[:-1], 4)
    with pytest.raises(UnknownAdapter, match="a LoKr adapter with 10 members, where 9 are known"):
        from_host(patch)
    patch.name = "newer"
    with pytest.raises(UnknownAdapter, match="an adapter of the kind newer"):
        from_host(patch)
