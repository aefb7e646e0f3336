"""Block tables, custom weights, tokens of several references, keys and values."""

from __future__ import annotations

import math

import pytest
import torch

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.unet import presets
from styleloom.weights.unet.architecture import SD15, SDXL, checkpoint_name, transformer_of
from styleloom.weights.unet.presets import choose, parse_custom
from styleloom.weights.ip_adapter.formats import recognise
from styleloom.weights.ip_adapter.keys_values import fuse, project
from styleloom.weights.ip_adapter.projections import image_tokens
from styleloom.weights.row_adapters.rows import NEGATIVE, POSITIVE


def test_the_published_counts_and_numbers():
    assert (len(SDXL.layers), len(SD15.layers)) == (70, 16)
    numbers = SDXL.file_numbers
    assert sorted(numbers.values()) == list(range(1, 140, 2))
    # First and last keys of blocks, from running the published files' layout (down, up, middle; every second).
    assert [numbers["input", 8, i] for i in (0, 9)] == [29, 47]
    assert [numbers["output", 1, i] for i in (0, 9)] == [69, 87]
    assert [numbers["middle", 0, i] for i in (0, 9)] == [121, 139]
    assert SD15.file_numbers["middle", 0, 0] == 31 and SD15.file_numbers["output", 3, 0] == 13


def test_presets_count_their_layers():
    counts = {p: len(choose(SDXL, p, 1, 1, False)) for p in presets.PRESETS if p != presets.CUSTOM}
    assert list(counts.values()) == [10, 10, 20, 70, 10, 10, 20, 20, 20, *[70] * 9, 60, 70, 20, 70]
    counts = {p: len(choose(SD15, p, 1, 1, False)) for p in presets.PRESETS if p != presets.CUSTOM}
    assert list(counts.values()) == [3, 3, 6, 16, 11, 2, 13, 6, 6, *[16] * 9, 14, 16, 13, 16]


def test_whose_picture_at_which_weight():
    plan = choose(SDXL, "style + layout", 0.8, 0.3, True)
    assert plan["output", 1, 4] == (0.8, "style") and plan["input", 8, 0] == (0.3, "layout")
    assert choose(SDXL, "style + layout", 0.8, 0.3, False)["input", 8, 0] == (0.3, "style")
    assert choose(SDXL, "layout", 0.8, 0.3, True)["input", 8, 0] == (0.8, "layout")
    assert choose(SDXL, "all", 0.8, 0.3, True)["middle", 0, 0] == (0.8, "style")
    assert choose(SDXL, "all", 0.8, 0.3, True)["input", 8, 9] == (0.3, "layout")
    assert choose(SD15, "IPAdapter Plus: layout", 0.8, 0.3, False)["input", 7, 0] == (0.2, "style")
    assert choose(SDXL, "style", 0.0, 1.0, True) == {}
    assert set(choose(SDXL, "style + layout", 0.0, 1.0, True)) == {("input", 8, i) for i in range(10)}
    with pytest.raises(StyleLoomError, match="preset is 'x'"):
        choose(SDXL, "x", 1, 1, False)


def test_custom_names():
    by_host = parse_custom(SDXL, "output 1: 1.5\ninput_8 = 0.25")
    assert by_host == parse_custom(SDXL, "6:1.5, 3:0.25") == parse_custom(
        SDXL, "up_blocks.0.attentions.1: 1.5; down_blocks.2.attentions.1: .25")  # fmt: skip
    assert len(by_host) == 20 and by_host["output", 1, 9] == 1.5
    one = parse_custom(SDXL, "output 1: 1, OUTPUT 1 3: -2, middle: 0.5")
    assert one["output", 1, 3] == -2 and one["output", 1, 2] == 1 and one["middle", 0, 0] == 0.5
    for spelling in ("output 1: 1.", "output 1: 1e0", "output 1: +10E-1", "output 1 = .1e1", "up_blocks.0.attentions.1: 1."):
        assert parse_custom(SDXL, spelling) == {("output", 1, i): 1.0 for i in range(10)}
    level = parse_custom(SDXL, "up_blocks.0: 1e-1, down_blocks.1: 2, mid_block: 3")
    assert level == {layer: share for layer in SDXL.layers for block, share in
                     {("output", 0): 0.1, ("output", 1): 0.1, ("output", 2): 0.1, ("input", 4): 2.0, ("input", 5): 2.0,
                      ("middle", 0): 3.0}.items() if layer[:2] == block}  # fmt: skip
    chosen = choose(SDXL, "custom", 2.0, 9.0, True, "output 1: 0.5, input 8: 1, middle: 0")
    assert chosen["output", 1, 0] == (1.0, "style") and chosen["input", 8, 0] == (2.0, "layout") and len(chosen) == 20


@pytest.mark.parametrize("text", ["", "  \n", "output 9: 1", "output 1", "output 1: much", "input 8 12: 1", "11: 1",
                                  "output 1: 1e999", "up_blocks.3: 1", "output 1: e3", "output 1: ."])  # fmt: skip
def test_custom_names_that_are_none(text):
    with pytest.raises(StyleLoomError, match="block_weights") as error:
        parse_custom(SDXL, text)
    assert "output 1" in error.value.expected


# --- tokens, keys, values: one linear adapter of tiny width, by hand


def adapter(seed=0, width=6, cross=10, tokens=3, out=8):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    proj = {"proj.weight": draw(tokens * cross, width), "proj.bias": draw(tokens * cross), "norm.weight": draw(cross),
            "norm.bias": draw(cross)}  # fmt: skip
    ip = {f"{n}.to_{part}_ip.weight": draw(out, cross) for n in SD15.file_numbers.values() for part in "kv"}
    return recognise("small", {"image_proj": proj, "ip_adapter": ip})


def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v


def test_fusion():
    a = adapter()
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    each = image_tokens(a, z)
    empty = image_tokens(a, torch.zeros(1, 6))
    q = torch.randn(1, 5, 10, generator=torch.Generator().manual_seed(2))

    made = fuse(a, z, None, "concat")
    assert made.shape == (2, 1, 9, 10) and torch.allclose(made[POSITIVE, 0], each.flatten(0, 1), atol=1e-6)
    # Repeated tokens are the same attention.
    assert torch.allclose(attend(q, made[NEGATIVE], made[NEGATIVE]), attend(q, empty, empty), atol=1e-5)

    made = fuse(a, z, z[:2], "concat")
    assert made.shape == (2, 1, 18, 10)
    both = each[:2].flatten(0, 1)[None]
    assert torch.allclose(attend(q, made[NEGATIVE], made[NEGATIVE]), attend(q, both, both), atol=1e-5)
    all_three = each.flatten(0, 1)[None]
    assert torch.allclose(attend(q, made[POSITIVE], made[POSITIVE]), attend(q, all_three, all_three), atol=1e-5)

    made = fuse(a, z, z[:2], "average")
    assert torch.allclose(made[POSITIVE], image_tokens(a, z.mean(0, keepdim=True)), atol=1e-6)
    assert torch.allclose(made[NEGATIVE], image_tokens(a, z[:2].mean(0, keepdim=True)), atol=1e-6)

    made = fuse(a, z, None, "one per picture")
    assert torch.allclose(made[POSITIVE], each, atol=1e-6)
    assert torch.allclose(made[NEGATIVE], empty.expand(3, -1, -1), atol=1e-6)
    made = fuse(a, z, z[:2], "one per picture")
    due = image_tokens(a, z[[0, 1, 1]])
    assert torch.allclose(made[NEGATIVE], due, atol=1e-6), "the last negative again"
    with pytest.raises(StyleLoomError, match="empty batch"):
        fuse(a, z[:0], None, "concat")


@pytest.mark.parametrize("scaling", ["V", "K+V"])
def test_the_weight_is_in_the_values(scaling):
    a = adapter()
    tokens = torch.randn(2, 1, 3, 10, generator=torch.Generator().manual_seed(3))
    layer = ("output", 3, 0)
    k, v = project(a, {layer: (0.6, "style")}, {"style": tokens}, scaling, torch.float32)[layer]
    wk, wv = a.layers[SD15.file_numbers[layer]]
    q = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(4))
    plain_k = tokens @ wk.T * (0.6 if scaling == "K+V" else 1.0)
    due = 0.6 * attend(q, plain_k, tokens @ wv.T)
    assert torch.allclose(attend(q, k, v), due, atol=1e-5)


def test_damaged_values_are_named():
    a = adapter()
    a.layers[13][1].view(-1)[3] = float("nan")
    tokens = {"style": torch.ones(2, 1, 3, 10)}
    with pytest.raises(StyleLoomError, match="13.to_v_ip.weight gives values that are not finite"):
        project(a, {("output", 3, 0): (1.0, "style")}, tokens)
    assert project(a, {("output", 4, 0): (1.0, "style")}, tokens), "a layer that is not used is not looked at"
    a.projection["proj.bias"][0] = float("inf")
    with pytest.raises(StyleLoomError, match="image tokens of small are not finite"):
        image_tokens(a, torch.zeros(1, 6))
    with pytest.raises(StyleLoomError, match=r"image_embeds is \[1, 7\]"):
        image_tokens(a, torch.zeros(1, 7))


# --- the one table of UNet blocks


def test_the_table_of_sdxl_has_every_weight():
    """Counts of the published checkpoint: 17 residual blocks (two convolutions, an embedding, two norms, a named skip),
    11 transformers with 70 layers, two steps down, two up, and the ends."""
    assert len(SDXL.weights) == 17 * 6 + 11 * 3 + 70 * 13 + 2 + 2 + 3 + 4
    assert [name for name, layer in SDXL.weights.items() if layer.kernel == (3, 3) and ".0.op" in name] == [
        "input_blocks.3.0.op", "input_blocks.6.0.op"]  # fmt: skip
    assert SDXL.weights["output_blocks.5.2.conv"] == ("up_blocks.1.upsamplers.0.conv", (3, 3))
    assert SDXL.weights["input_blocks.8.1.proj_in"] == ("down_blocks.2.attentions.1.proj_in", ())
    assert SD15.weights["input_blocks.8.1.proj_in"] == ("down_blocks.2.attentions.1.proj_in", (1, 1))
    assert SD15.weights["output_blocks.2.1.conv"] == ("up_blocks.0.upsamplers.0.conv", (3, 3))
    assert SD15.weights["output_blocks.8.2.conv"].diffusers == "up_blocks.2.upsamplers.0.conv"
    assert "label_emb.0.0" not in SD15.weights and "input_blocks.12.0.op" not in SD15.weights


@pytest.mark.parametrize("architecture", [SDXL, SD15], ids=lambda a: a.name)
def test_a_transformer_is_known_by_every_name(architecture):
    for block, depth, diffusers in architecture.blocks:
        own = f"{checkpoint_name(block)}.1"
        for name in (own, diffusers):
            leaf = f"{name}.transformer_blocks.{depth - 1}.attn2.to_k"
            for stem in (leaf, f"unet.{leaf}", "lora_unet_" + leaf.replace(".", "_"), f"diffusion_model.{leaf}"):
                assert transformer_of(stem) == (block, depth - 1)
            assert transformer_of(f"{name}.proj_in") == (block, 0)
        assert architecture.has(block, depth - 1) and not architecture.has(block, depth)
        assert architecture.weights[f"{own}.norm"].diffusers == f"{diffusers}.norm"
    for other in ("input_blocks.8.0.in_layers.2", "down_blocks.2.resnets.1.conv1", "text_model.encoder.layers.0.mlp"):
        assert transformer_of(other) is None


def test_sdxl_blocks_are_the_same_for_both_packs():
    """IPAdapter Plus chooses the same blocks as InstantStyle on SDXL, and others on SD1.5."""
    assert SDXL.other_style == SDXL.style == {("output", 1): 1.0}
    assert SDXL.other_layout == SDXL.layout == {("input", 8): 1.0}
    assert SD15.other_style != SD15.style


def test_keys_and_values_are_kept_by_content(monkeypatch):
    """Another weight or layer, or the same picture again, reads only matrices that have not been read; the numbers are
    those of an adapter that has kept nothing."""
    from styleloom.weights.ip_adapter import keys_values

    read, product = [], keys_values._product
    monkeypatch.setattr(keys_values, "_product", lambda t, m: read.append(m) or product(t, m))
    a, layers = adapter(), [("output", 3, 0), ("output", 4, 0)]
    tokens = torch.randn(2, 1, 3, 10, generator=torch.Generator().manual_seed(3))

    def made(of, weight, layers, tokens=tokens):
        return project(of, {layer: (weight, "style") for layer in layers}, {"style": tokens}, dtype=torch.float32)

    first = made(a, 0.5, layers[:1])
    assert len(read) == 2
    second = made(a, -2.0, layers, tokens.clone())
    assert len(read) == 4
    assert torch.equal(first[layers[0]].v * -4, second[layers[0]].v), "what is kept has no weight in it"
    fresh = made(adapter(), -2.0, layers)
    assert len(read) == 8 and all(torch.equal(x, y) for n in layers for x, y in zip(second[n], fresh[n]))
    other = made(a, -2.0, layers, tokens + 1)
    assert len(read) == 12 and not torch.equal(other[layers[0]].k, second[layers[0]].k)
    monkeypatch.setattr(keys_values, "_KEPT_BYTES", 0)
    made(a, 1.0, layers, tokens + 2)
    assert not keys_values._by_adapter[a], "what is kept is bounded, one set of pictures too"
    made(a, 1.0, layers)
    assert len(read) == 20


def test_a_matrix_in_pieces_is_the_whole_matrix():
    from styleloom.weights.ip_adapter.keys_values import _product

    g = torch.Generator().manual_seed(0)
    tokens, matrix = torch.randn(2, 3, 4, 10, generator=g), torch.randn(300, 10, generator=g).half()
    due = tokens.double() @ matrix.double().T
    size = float(tokens.abs().max() * matrix.float().abs().max()) * 10
    assert float((_product(tokens, matrix).double() - due).abs().max()) <= 12 * torch.finfo(torch.float32).eps * size
