"""Style Block Injector on a model that the host's own node compiles. Its guards on `transformer_options` are dropped, so
what was there when the code was made is there for ever."""

from __future__ import annotations

import sys

import pytest
import style_oracle as oracle
import torch
from style_calls import call

LOUD, QUIET = 3.0, 0.3  # noise at which a schedule is on and off
ONE_LEVEL = {"num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_middle": 1,
             "transformer_depth_output": [1, 1]}  # fmt: skip


@pytest.fixture(scope="module")
def small(kit):
    """A UNet of one level, one layer deep: what is compiled is a few layers."""
    with torch.inference_mode(False):
        return kit.architectures.ARCHITECTURES["sd1.5"].model(0, **ONE_LEVEL)


@pytest.fixture
def compiled(host):
    """The host's node; `eager` runs the traced code as it is and needs no C++ compiler."""
    torch._dynamo.reset()
    yield lambda model: host.run("TorchCompileModel", model=model, backend="eager")[0]
    torch._dynamo.reset()


@pytest.fixture
def style(host, small):
    """(options) -> the injection on some layers of the small UNet, with random keys and values."""
    pack = host.nodes["StyleLoomStyleBlockInjector"].__module__.rpartition(".")[0]
    attention = sys.modules[f"{pack}.host.style.attention"]
    modules = {layer: module for layer, module in oracle.modules(small.model.diffusion_model).items()}

    def made(seed=0, tokens=4, **options):
        g = torch.Generator().manual_seed(seed)
        pairs = {layer: attention.KeysValues(*(torch.randn(2, 1, tokens, module.heads * module.dim_head, generator=g)
                                               for _ in "kv"))
                 for layer, module in modules.items() if layer[0] != "middle"}  # fmt: skip
        return attention.StyleAttention(pairs, **options)

    return made


def test_what_changes_from_call_to_call_is_seen(compiled, style, small, texts):
    """On, then off; off, then on with other keys, another number of them and a mask; and nothing: the code that was
    compiled before for the same layers finds what is there now."""
    text, percent = texts["sd1.5"], 0.5
    plain = {sigma: call(small, text, size=8, sigma=sigma) for sigma in (LOUD, QUIET)}
    mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert QUIET < float(small.get_model_object("model_sampling").percent_to_sigma(percent)) < LOUD
    for injection in (style(end=percent), style(1, tokens=7, mask=mask, start=percent)):
        model = injection.install(small)
        code = compiled(model)
        for sigma in (LOUD, QUIET):
            due = call(model, text, size=8, sigma=sigma)
            assert torch.equal(due, plain[sigma]) == ((sigma == QUIET) == (injection.start == 0))
            assert torch.allclose(call(code, text, size=8, sigma=sigma), due, atol=1e-5 * float(due.abs().max()))
    assert torch.allclose(call(compiled(small), text, size=8), plain[LOUD], atol=1e-5 * float(plain[LOUD].abs().max()))


def test_somebody_else_on_a_layer_is_refused(compiled, style, small, texts):
    theirs = small.clone()
    theirs.set_model_attn2_replace(lambda q, k, v, extra: q, "output", 0)
    with pytest.raises(ValueError, match="the model is compiled, and another node replaces the cross-attention"):
        call(compiled(style().install(theirs)), texts["sd1.5"], size=8)
    assert not any("forward" in module.__dict__ for module in small.model.modules())
