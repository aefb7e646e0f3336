"""Other nodes change the rows of a batch between the host and the model: each row still gets the LoRAs of its side."""

from __future__ import annotations

import pytest
import torch
from shared_models import BOUND, ONE


def in_tiles(model, tile_major: bool, tiles: int = 2):
    """A clone whose pictures are cut into tiles that stand in one batch; nobody is told. As Tiled Diffusion does it
    (all rows of one tile, then of the next), and the other way round (all tiles of one row, then of the next)."""

    def stacked(value):
        return value.repeat(tiles, *(1 for _ in value.shape[1:])) if tile_major else value.repeat_interleave(tiles, 0)

    def wrapper(apply_model, args):
        x, rows = args["input"], args["input"].shape[0]
        parts = torch.stack(x.chunk(tiles, -1), 0 if tile_major else 1).flatten(0, 1)
        c = {
            name: stacked(value) if isinstance(value, torch.Tensor) and value.shape[0] == rows else value
            for name, value in args["c"].items()
        }
        made = apply_model(parts, stacked(args["timestep"]), **c)
        made = made.unflatten(0, (tiles, rows) if tile_major else (rows, tiles))
        return torch.cat(made.unbind(0 if tile_major else 1), -1)

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("tile_major", (True, False))
@pytest.mark.parametrize("batch", (1, 2))
def test_tiles_in_the_batch(tile_major, batch, bench, loras, kit, distance):
    """One call, and the true result: the prompt that stands beside a row tells whose it is."""
    ours, truth = loras()
    model, calls = kit.two_passes.recorded(in_tiles(bench.model, tile_major))
    latent = bench.latent(batch)
    made = bench.asymmetric(model=model, latent=latent, sampling=ONE, **ours)
    assert calls == [((1, 0), 4 * batch)]
    expected = bench.truth(*truth, latent=latent, sampling=ONE, change=lambda model: in_tiles(model, tile_major))
    assert distance(made, expected) < BOUND


@pytest.mark.parametrize("tile_major", (True, False))
def test_tiles_that_nothing_tells_apart(tile_major, bench, loras, kit, distance):
    """The same prompt on both sides: the sides run alone."""
    ours, truth = loras()
    same = {"positive": bench.positive, "negative": bench.positive}
    model, calls = kit.two_passes.recorded(in_tiles(bench.model, tile_major))
    made = bench.asymmetric(model=model, sampling=ONE, **same, **ours)
    assert [order for order, _ in calls[1:]] == [(0,), (1,)]
    expected = bench.truth(*truth, sampling=ONE, change=lambda model: in_tiles(model, tile_major), **same)
    assert distance(made, expected) < BOUND


def coupled(model, regions, at_the_end=False):
    """A clone whose cross-attentions see each positive row once more for every regional prompt.

    Args:
        regions: Prompts (1, tokens, width).
        at_the_end: The copies stand behind all rows, not behind their own.
    """

    def repeat(q, k, v, extra_options):
        rows = q.shape[0] // len(extra_options["cond_or_uncond"])
        qs, ks, more_q, more_k = [], [], [], []
        for place, q_, k_ in zip(extra_options["cond_or_uncond"], q.split(rows), k.split(rows), strict=True):
            qs.append(q_)
            ks.append(k_)
            to_q, to_k = (more_q, more_k) if at_the_end else (qs, ks)
            if place == 0:
                to_q += [q_] * len(regions)
                to_k += [region.to(k).repeat(rows, 1, 1) for region in regions]
        both = torch.cat(qs + more_q), torch.cat(ks + more_k)
        extra_options["couple"] = [rows, at_the_end]
        return both[0], both[1], both[1]

    def fold(out, extra_options):
        rows, last = extra_options["couple"]
        parts, made = list(out.split(rows)), []
        order = extra_options["cond_or_uncond"]
        more = parts[len(order) :] if last else None
        for place in order:
            mine = [parts.pop(0)]
            if place == 0:
                mine += [(more if last else parts).pop(0) for _ in regions]
            made.append(sum(mine) / len(mine))
        return torch.cat(made)

    model = model.clone()
    model.set_model_attn2_patch(repeat)
    model.set_model_attn2_output_patch(fold)
    return model


@pytest.mark.parametrize("at_the_end", (False, True))
def test_rows_that_a_cross_attention_repeats(at_the_end, bench, loras, kit, distance):
    ours, truth = loras()
    regions = [bench.prompt(text)[0][0] for text in ("a green field", "dull")]

    def change(model):
        return coupled(model, regions, at_the_end)

    model, calls = kit.two_passes.recorded(change(bench.model))
    latent = bench.latent(2)
    made = bench.asymmetric(model=model, latent=latent, sampling=ONE, **ours)
    assert calls == [((1, 0), 4)]
    # Core's Dual Model CFG Guider gives each side's own call the place 0, so the patch would double both.
    expected = bench.routed(*truth, latent=latent, sampling=ONE, change=change)
    assert distance(made, expected) < BOUND
    assert distance(made, bench.routed(*truth, latent=latent, sampling=ONE)) > 0.01


@pytest.fixture(scope="module")
def full_bench(benches):
    """All blocks, which the adapter's file counts."""
    return benches("sd1.5", short=False)


@pytest.fixture(scope="module")
def sides_apart(full_bench):
    """(model) -> the picture where each side has a call of its own, which needs no telling apart."""
    from comfy.patcher_extension import WrappersMP

    def alone(executor, model, conds, x, timestep, options):
        return [
            executor(model, [cond if i == j else None for i, cond in enumerate(conds)], x, timestep, options)[j]
            for j in range(len(conds))
        ]

    def sampled(model, **more):
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "alone", alone)
        return full_bench.plain(model, **more)

    return sampled


@pytest.fixture(scope="module")
def with_style(models, adapters, encode, run_node):
    def made(model, count=1, **more):
        return run_node("StyleLoomStyleBlockInjector", model=model, ipadapter=adapters("plus", "sd1.5")[0],
                        style={"style0": encode(1, count)}, preset="all", weight=1.5, **more)[0]  # fmt: skip

    return made


def changes(bench):
    regions = [bench.prompt(text)[0][0] for text in ("a green field", "dull")]
    return {
        "tiles": lambda model: in_tiles(model, True),
        "tiles of a row": lambda model: in_tiles(model, False),
        "copies": lambda model: coupled(model, regions),
        "copies at the end": lambda model: coupled(model, regions, True),
    }


@pytest.mark.parametrize("what", ("tiles", "tiles of a row", "copies", "copies at the end"))
def test_style_on_rows_that_another_node_changes(what, full_bench, with_style, sides_apart, distance):
    run = {"latent": full_bench.latent(2), "sampling": ONE}
    model = changes(full_bench)[what](with_style(full_bench.model))
    made = full_bench.plain(model, **run)
    assert distance(made, sides_apart(model, **run)) < BOUND
    assert distance(made, full_bench.plain(changes(full_bench)[what](full_bench.model), **run)) > 0.01


@pytest.mark.parametrize("what", ("tiles", "copies"))
def test_style_that_needs_to_know_the_picture_says_so(what, full_bench, with_style):
    model = changes(full_bench)[what](with_style(full_bench.model, mask=torch.ones(1, 8, 12)))
    with pytest.raises(Exception, match="has a mask"):
        full_bench.plain(model, sampling=ONE)


def test_style_on_rows_that_nothing_tells_apart(full_bench, with_style, run_node):
    model = in_tiles(with_style(full_bench.model), True)
    guider = run_node("CFGGuider", model=model, positive=full_bench.positive, negative=full_bench.positive, cfg=3.0)[0]
    with pytest.raises(Exception, match="(?s)the model is given . rows, for 2 conditionings.*different prompts"):
        full_bench.through(guider, **ONE)
