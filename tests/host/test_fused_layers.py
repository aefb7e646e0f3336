"""INT8 layers that the host computes in one kernel with their activation, without calling them.

The truth: two separate models without anything of ours, whose down-projections add the LoRA's products themselves to
what the host's own kernel makes. A LoRA that is lost moves the result by a hundred times the bounds here.
"""

from __future__ import annotations

import sys

import pytest
import torch
from shared_models import BOUND, ONE

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
    node, report, *_ = bench.run(
        "StyleLoomAsymmetricCFGSampler", model=model, positive=bench.positive, negative=bench.negative, seed=5, steps=1,
        latent_image=bench.latent(), cfg=3.5, sampler_name="euler", scheduler="simple", denoise=1.0, **sides(loras),
    )  # fmt: skip
    without = [{key: value for key, value in lora.items() if DOWN not in key} for lora in loras]
    lost = distance(bench.asymmetric(model=fused(bench), sampling=ONE, **sides(without)), truth)
    assert distance(node["samples"], truth) < 0.1 * lost
    assert "1 layers that the model computes without calling them go through weights that are changed at each" in report
    assert f"diffusion_model.{DOWN}" in report
    assert torch.equal(model.model.diffusion_model.double_blocks[0].img_mlp[2].weight.dequantize(), before)


def test_a_mask_where_the_function_is_held_is_refused_each_time(bench, fused, loras, kit, host):
    """A weight has no places. The plan stays whole, so that the same guider does not lose a layer when it runs again,
    as it does when the queue is started once more."""
    own = host.comfy.ops.linear_input_act

    class Held(kit.int8_layers.FusedFeedForward):
        def forward(self, x):
            return own(self[2], self[0](x), self.act)

    guider = bench.guider(fused(bench, Held), positive_lora=loras[0], positive_mask=torch.ones(1, 8, 8))
    for _ in range(2):
        with pytest.raises(Exception, match=f"(?s)positive LoRA has a mask.*without calling it.*{DOWN}"):
            bench.through(guider, **ONE)


def test_a_mask_on_a_layer_that_is_computed_with_its_activation(bench, fused, loras, distance, host, monkeypatch):
    """As on the same layer when the host calls it: it does so while it trains."""
    half = torch.zeros(1, 8, 8)
    half[:, :, 4:] = 1
    given = {"model": fused(bench), "positive_lora": loras[0], "sampling": ONE}
    ours = bench.asymmetric(**given, positive_mask=half)
    everywhere = bench.asymmetric(**given)
    monkeypatch.setattr(host.comfy.model_management, "in_training", True)
    assert distance(ours, bench.asymmetric(**given, positive_mask=half)) < INT8
    assert distance(ours, everywhere) > 100 * INT8


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


@pytest.mark.parametrize("quantised", (True, False))
def test_what_has_no_term(quantised, benches, kit, distance):
    """A DoRA, biases, norms that attention computes itself, and tokens of the model, also on a model with quantised
    layers, where the host's weight hooks stop. Held against two models merged by the host."""
    bench = benches("z-image")

    def fresh():
        model = bench.fresh()
        if quantised:
            with torch.inference_mode():
                layer = model.model.diffusion_model.layers[0].feed_forward
                layer.w2 = kit.int8_layers.int8_linear(layer.w2)
        return model

    model = fresh()
    token = "diffusion_model.x_pad_token"
    lora = bench.lora(1, kind="dora", contains="layers.1.") | kit.adapters.norm_differences(model)
    lora |= kit.adapters.bias_differences(model) | {f"{token}.diff": torch.ones(model.get_model_object(token).shape)}
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    ours = bench.asymmetric(model=model, positive_lora=lora, sampling=ONE)
    truth = bench.two_models(bench.with_loras(fresh(), (lora, 1.0)), fresh(), sampling=ONE)
    bound = INT8 if quantised else BOUND
    assert distance(bench.plain(fresh(), sampling=ONE), truth) > 10 * bound
    assert distance(ours, truth) < bound
    assert ("weights that are changed at each use" if quantised else "ComfyUI's weight hooks") in bench.report
    assert "1 x a parameter beside the layers" in bench.report
    after = model.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(getattr(module, "weight_function", None) for module in model.model.modules())


# --- the function itself, as later hosts call it


class Acting:
    """The layers of a run of ours, open."""

    def __init__(self, ours, layer, change):
        forward, rows = ours("weights.row_adapters.forward"), ours("weights.row_adapters.rows")
        low_rank, layers = ours("weights.row_adapters.low_rank"), ours("weights.row_adapters.layers")
        call = forward.ModelCall()
        call.set_rows((rows.POSITIVE, rows.NEGATIVE), 2, {rows.POSITIVE: (0.7,)}, (rows.POSITIVE,))
        call.active = True
        up, down = change
        pair = ours("weights.lora.low_rank").LowRank(down, up)
        term = low_rank.LowRankTerm(layers.layer_of(layer), [(pair, 0)])
        self.call = call
        self.layers = forward.LayersWithTerms(lambda name: layer, {"layer": {rows.POSITIVE: [term]}}, call)
        self.open = ours("nodes.host.fused_layers").called(self.layers.wanted())

    def __enter__(self):
        self.open.__enter__()
        self.layers.put_in()

    def __exit__(self, *exc):
        self.layers.take_out()
        return self.open.__exit__(*exc)


@pytest.fixture(scope="module")
def ours(pack):
    return lambda name: sys.modules[f"{pack.__name__}.{name}"]


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def down(kit):
    with torch.inference_mode():
        linear = torch.nn.Linear(16, 8)
        linear.weight.copy_(numbers(8, 16, seed=1))
        linear.bias.copy_(numbers(8, seed=2))
        return kit.int8_layers.int8_linear(linear)


CHANGE = numbers(8, 3, seed=3), numbers(3, 16, seed=4)


def test_in_the_hosts_mlp(ours, down, host):
    """MiniMax-H3's feed-forward, the one class of ComfyUI 0.30 that calls the function."""
    mlp = host.comfy.ldm.minimax.model.MLP(6, 16, operations=torch.nn)
    mlp.fc2 = down
    x = numbers(2, 5, 6, seed=5)
    with torch.inference_mode():
        plain = mlp(x)
        with Acting(ours, down, CHANGE):
            made = mlp(x)
        gate, up = mlp.fc1(x).double().chunk(2, dim=-1)
        due = 0.7 * (torch.nn.functional.silu(gate) * up) @ CHANGE[1].double().T @ CHANGE[0].double().T
        assert torch.equal(mlp(x), plain)
    assert float((made - plain - due)[0].norm() / due[0].norm()) < INT8
    assert float((made - plain)[1].norm() / plain[1].norm()) < INT8, "the other side"


def gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("act", ("gelu_tanh", "swiglu", "rms_norm", None))
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("keyword", (False, True), ids=("function", "forward"))
def test_the_signature_of_later_hosts(act, residual, keyword, ours, kit, host):
    """Arguments that 0.30 does not know, to the function and to the layer's forward. The truth: the formula in
    float64."""
    layer = torch.nn.Linear(16, 8)
    x, weight = numbers(2, 5, 32 if act == "swiglu" else 16, seed=6), numbers(16, seed=7)
    given = {"input_act": act}
    if act == "rms_norm":
        given |= {"act_weight": weight, "act_eps": 1e-3}
    if residual:
        given |= {"residual": numbers(2, 5, 8, seed=8), "residual_scale": numbers(8, seed=9)}
    with torch.no_grad(), Acting(ours, layer, CHANGE):
        made = layer(x, **given) if keyword else host.comfy.ops.linear_input_act(layer, x, **given)
    wide = x.double()
    hidden = {
        "gelu_tanh": lambda: gelu(wide),
        "swiglu": lambda: wide[..., :16] / (1 + torch.exp(-wide[..., :16])) * wide[..., 16:],
        "rms_norm": lambda: wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double(),
        None: lambda: wide,
    }[act]()
    due = hidden @ layer.weight.detach().double().T + layer.bias.detach().double()
    due[0] += 0.7 * hidden[0] @ CHANGE[1].double().T @ CHANGE[0].double().T
    if residual:
        due = given["residual"].double() + given["residual_scale"].double() * due
    # Three products of at most 16 terms: some ten roundings of float32 on each way.
    assert float((made - due).norm() / due.norm()) < 64 * 2**-24


def test_a_norm_in_the_place_of_its_weight(ours):
    """As the newest hosts hand it over, so that an offloaded weight is moved."""
    layer, norm, x = torch.nn.Linear(16, 8), torch.nn.RMSNorm(16, eps=1e-2), numbers(2, 16, seed=6)
    with torch.no_grad(), Acting(ours, layer, CHANGE):
        assert torch.equal(layer(x, input_act="rms_norm", act_weight=norm), layer(norm(x)))


@pytest.mark.parametrize("given, words", (
    ({"input_act": "adaln"}, "the activation adaln"),
    ({"input_act": "swiglu", "act_up": 1}, "the keyword act_up"),
))
@pytest.mark.parametrize("keyword", (False, True), ids=("function", "forward"))
def test_what_is_not_known_is_refused(given, words, keyword, ours, host):
    layer, x = torch.nn.Linear(16, 8), numbers(2, 16, seed=6)
    error = ours("weights.errors").StyleLoomError
    with pytest.raises(error, match=f"called with {words}, so that its input is not known .ComfyUI 0.30.0, comfy-kit"):
        with torch.no_grad(), Acting(ours, layer, CHANGE):
            layer(x, **given) if keyword else host.comfy.ops.linear_input_act(layer, x, **given)
    assert "forward" not in layer.__dict__


def test_a_call_in_which_nothing_acts_is_the_layers_own(ours):
    class Own(torch.nn.Linear):
        def forward(self, x, anything):
            return super().forward(x) + anything

    layer, x = Own(16, 8), numbers(2, 16, seed=6)
    acting = Acting(ours, layer, CHANGE)
    acting.call.acting = ()
    with torch.no_grad(), acting:
        assert torch.equal(layer(x, anything=1), layer.forward(x, 1))


def test_one_run_inside_another_and_another_packs_function(ours, kit, host, monkeypatch):
    """Both runs act, the outer one goes on after the inner, and what another pack puts over the function stays."""
    first, second = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
    x, ops = numbers(2, 16, seed=6), host.comfy.ops
    own = ops.linear_input_act

    def moved(layer):
        return not torch.equal(ops.linear_input_act(layer, x, "gelu_tanh"),
                               torch.nn.functional.linear(gelu_of(x), layer.weight, layer.bias))

    def gelu_of(x):
        return torch.nn.functional.gelu(x, approximate="tanh")

    with torch.no_grad():
        with Acting(ours, first, CHANGE):
            with Acting(ours, second, CHANGE):
                assert moved(first) and moved(second)
            assert moved(first) and not moved(second)
        assert ops.linear_input_act is own and not moved(first)
        one, two = Acting(ours, first, CHANGE), Acting(ours, second, CHANGE)
        one.__enter__(), two.__enter__()
        one.__exit__(None, None, None)  # two threads: the one that came first also goes first
        assert moved(second) and not moved(first)
        two.__exit__(None, None, None)
        assert ops.linear_input_act is own
        with pytest.raises(RuntimeError):
            with Acting(ours, first, CHANGE):
                raise RuntimeError
        assert ops.linear_input_act is own

        # Another pack wraps the function while a run is open, and never takes its own out again.
        monkeypatch.setattr(ops, "linear_input_act", own)
        below = []
        with Acting(ours, first, CHANGE):
            below.append(ops.linear_input_act)
            ops.linear_input_act = theirs = lambda *args: below[0](*args)
            assert moved(first)
        assert ops.linear_input_act is theirs and not moved(first)
        with Acting(ours, second, CHANGE):
            assert moved(second) and not moved(first)
        assert ops.linear_input_act is theirs
        # It takes its own out after all: ours, which it found there, is what it puts back.
        ops.linear_input_act = below[0]
        with Acting(ours, second, CHANGE):
            assert moved(second)
        assert ops.linear_input_act is own



# --- a model with a prefix cache, as Qwen-Image-2.1 has it from 0.36 on: what it is told, not what it then does


@pytest.fixture
def cached(bench, host):
    """(a MODEL whose net has such a cache, what its calls were told of it)."""
    model, told = bench.fresh(), []
    model.model.diffusion_model.reset_prefix_cache = lambda *_: None
    model.model_options["transformer_options"]["own"] = 1

    def note(executor, *args, **kwargs):
        options = args[5] if len(args) > 5 else kwargs["transformer_options"]
        told.append((options.get("qwen_image21_cache"), options["own"]))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(host.comfy.patcher_extension.WrappersMP.APPLY_MODEL, "note", note)
    return model, told


def test_the_prefix_cache_is_off_while_a_lora_acts(bench, cached):
    model, told = cached
    bench.asymmetric(model=model, positive_lora=bench.lora(1), sampling=ONE)
    assert "cache of prompt and references is off" in bench.report
    bench.asymmetric(model=model, positive_lora=bench.lora(1), positive_strength=0.0, sampling=ONE)
    assert "cache" not in bench.report
    assert told == [({"device": "off"}, 1), (None, 1)]
    assert model.model_options["transformer_options"] == {"own": 1}


def test_the_prefix_cache_is_off_in_a_merge(bench, cached, ours):
    model, told = cached
    before = model.model_options
    with ours("nodes.host.merge.masked_lora").MaskedLoRA(model, []):
        bench.plain(model, sampling=ONE)
    assert told == [({"device": "off"}, 1)] and model.model_options is before


def test_a_probe_of_rows_sees_these_layers_too(ours, down, host):
    """Models of no known class are run without terms first, to see how their rows stand."""
    acting, x, seen = Acting(ours, down, CHANGE), numbers(2, 5, 32, seed=5), []
    acting.call.active = False
    with torch.inference_mode(), acting:
        acting.call.seen = lambda name, given: seen.append((name, tuple(given.shape)))
        made = host.comfy.ops.linear_input_act(down, x, "swiglu")
        acting.call.seen = None
        plain = host.comfy.ops.linear_input_act(down, x, "swiglu")
    assert seen == [("layer", (2, 5, 16))] and float((made - plain).norm() / plain.norm()) < INT8
