"""INT8 layers that the host computes in one kernel with their activation, without calling them.

The truth: two separate models without anything of ours, whose down-projections add the LoRA's products themselves to
what the host's own kernel makes. A LoRA that is lost moves the result by a hundred times the bounds here.
"""

from __future__ import annotations

import pytest
import torch
from shared_models import ONE

# INT8 rounds a layer's input to 127 steps a row. Where float32 sums in another order, some hundred thousandth of the
# values fall to the other side of a step, and move the product of a row by less than 1/127/sqrt(width) each.
INT8 = 1e-3
DOWN = "double_blocks.0.img_mlp.2"


@pytest.fixture(scope="module")
def fused(kit):
    """A MODEL whose first feed-forward is computed as newer hosts do, its down-projection in INT8."""

    def make(bench, kind=None):
        model = bench.fresh()
        block = model.model.diffusion_model.double_blocks[0]
        with torch.inference_mode():  # as the host's loaders do
            block.img_mlp[2] = kit.int8_layers.int8_linear(block.img_mlp[2])
            block.img_mlp = (kind or kit.int8_layers.FusedFeedForward)(block.img_mlp)
        return model

    return make


@pytest.fixture(scope="module")
def bench(benches):
    return benches("flux2")


@pytest.fixture(scope="module")
def loras(bench):
    """Positive, negative: large on the down-projection, so that a loss is seen."""
    return [bench.lora(seed, rank=rank) | bench.lora(seed, rank=rank, contains=DOWN, size=3.0)
            for seed, rank in ((1, 4), (2, 3))]


@pytest.fixture(scope="module")
def truth(bench, fused, kit, loras):
    """Core's Dual Model CFG Guider on two models, each with its LoRA."""

    def one(lora, strength):
        own = {key: value for key, value in lora.items() if DOWN in key}
        rest = {key: value for key, value in lora.items() if DOWN not in key}
        up, down, alpha = (next(v for k, v in own.items() if k.endswith(e)) for e in ("up.weight", "down.weight", "alpha"))
        scale = strength * float(alpha) / down.shape[0]

        class Added(kit.int8_layers.FusedFeedForward):
            def forward(self, x):
                gate, up_ = self[0](x).chunk(2, dim=-1)
                hidden = torch.nn.functional.silu(gate.double()) * up_.double()
                return super().forward(x) + scale * (hidden @ down.double().T @ up.double().T).float()

        return bench.with_loras(fused(bench, Added), (rest, strength))

    return bench.two_models(one(loras[0], 0.8), one(loras[1], 0.5), sampling=ONE)


def sides(loras):
    return {"positive_lora": loras[0], "negative_lora": loras[1], "positive_strength": 0.8, "negative_strength": 0.5}


def test_the_lora_acts_in_one_batch(bench, fused, loras, truth, distance, kit, host):
    seam = host.comfy.ops.linear_input_act
    model, calls = kit.two_passes.recorded(fused(bench))
    ours = bench.asymmetric(model=model, sampling=ONE, **sides(loras))
    without = [{key: value for key, value in lora.items() if DOWN not in key} for lora in loras]
    lost = bench.asymmetric(model=model, sampling=ONE, **sides(without))
    assert distance(lost, truth) > 100 * INT8, "what is lost on the way shows"
    assert distance(ours, truth) < INT8
    assert {rows for order, rows in calls} == {2}, "one batch"
    assert host.comfy.ops.linear_input_act is seam


def test_a_feed_forward_that_holds_the_hosts_own_function(bench, fused, loras, truth, distance, kit, host):
    """Taken by value when it was made, so that nothing of ours is asked: seen in the first pass, then the weight itself
    is another one for each side. It is dequantised for that, so the layer's input is not rounded: the one difference
    to the truth, of the size of INT8's own error."""
    own = host.comfy.ops.linear_input_act

    class Held(kit.int8_layers.FusedFeedForward):
        def forward(self, x):
            return own(self[2], self[0](x), self.act)

    model = fused(bench, Held)
    before = model.model.diffusion_model.double_blocks[0].img_mlp[2].weight.dequantize()
    node, report = bench.run(
        "StyleLoomAsymmetricCFGSampler", model=model, positive=bench.positive, negative=bench.negative, seed=5, steps=1,
        latent_image=bench.latent(), cfg=3.5, sampler_name="euler", scheduler="simple", denoise=1.0, **sides(loras),
    )  # fmt: skip
    without = [{key: value for key, value in lora.items() if DOWN not in key} for lora in loras]
    lost = distance(bench.asymmetric(model=fused(bench), sampling=ONE, **sides(without)), truth)
    assert distance(node["samples"], truth) < 0.1 * lost
    assert "1 layers that the model computes without calling them go through weights that are changed at each" in report
    assert f"diffusion_model.{DOWN}" in report
    assert torch.equal(model.model.diffusion_model.double_blocks[0].img_mlp[2].weight.dequantize(), before)


def test_the_model_as_it_is_while_no_lora_acts(bench, fused, loras):
    """A window that has not begun: bit by bit the host's own kernel."""
    late = {**sides(loras), "positive_start_percent": 0.9, "negative_start_percent": 0.9}
    # The first pass calls every layer, to see which there are, and each step has one pass: so two steps, of which the
    # second is looked at through what it is given.
    seen = []
    model = fused(bench)
    net = model.model.diffusion_model.double_blocks[0].img_mlp

    class Counting(type(net)):
        def forward(self, x):
            out = super().forward(x)
            seen.append((x.clone(), out.clone()))
            return out

    net.__class__ = Counting
    bench.asymmetric(model=model, sampling={"steps": 3}, **late)
    net.__class__ = Counting.__bases__[0]
    assert len(seen) == 3
    with torch.inference_mode():
        assert torch.equal(net(seen[1][0]), seen[1][1])


def test_what_has_no_term_on_a_model_with_quantised_layers(benches, kit, distance):
    """A DoRA, biases, norms that attention computes itself, and tokens of the model: the host's weight hooks stop on
    such a model. Held against two models merged by the host."""
    bench = benches("z-image")

    def quantised():
        model = bench.fresh()
        with torch.inference_mode():
            layer = model.model.diffusion_model.layers[0].feed_forward
            layer.w2 = kit.int8_layers.int8_linear(layer.w2)
        return model

    model = quantised()
    token = "diffusion_model.x_pad_token"
    lora = bench.lora(1, kind="dora", contains="layers.1.") | kit.adapters.norm_differences(model)
    lora |= kit.adapters.bias_differences(model) | {f"{token}.diff": torch.ones(model.get_model_object(token).shape)}
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    ours = bench.asymmetric(model=model, positive_lora=lora, sampling=ONE)
    truth = bench.two_models(bench.with_loras(quantised(), (lora, 1.0)), quantised(), sampling=ONE)
    assert distance(bench.plain(quantised(), sampling=ONE), truth) > 10 * INT8
    assert distance(ours, truth) < INT8
    assert "weights that are changed at each use" in bench.report
    after = model.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(getattr(module, "weight_function", None) for module in model.model.modules())
