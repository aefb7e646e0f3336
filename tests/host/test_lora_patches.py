"""What Apply LoRA makes of files that the host's loader takes in part: nothing is lost without a word."""

from __future__ import annotations

import pytest
import torch
from styleloom.weights.lora.reading import read_lora
from styleloom.weights.lora.writing import write_lora
from test_bad_input import refused


@pytest.fixture(scope="module")
def model(kit):
    made = {}

    def get(name):
        if name not in made:
            made[name] = kit.architectures.make(name)[0]
        return made[name]

    yield get
    made.clear()


@pytest.fixture(scope="module")
def apply(run_node, model):
    return lambda name, lora, **more: run_node("StyleLoomApplyLoRA", model=model(name), lora=lora, **more)


def pair(stem, shape, rank=2, **more):
    draw = lambda seed, *size: torch.randn(*size, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    kernel = tuple(shape[2:])
    parts = {"lora_down.weight": draw(1, rank, shape[1], *kernel),
             "lora_up.weight": draw(2, shape[0], rank, *[1] * len(kernel))} | more
    return {f"{stem}.{part}": tensor for part, tensor in parts.items()}


def shape_of(model, key):
    return tuple(model.get_model_object(key).shape)


W1 = "diffusion_model.layers.1.feed_forward.w1"


def test_parameters_that_the_host_never_merges_are_exchanged(apply, model, host, run_node):
    """A token of the model itself, twice, beside a weight: the model that the host has loaded has both changes, and the
    one without has none, in either order."""
    token = "diffusion_model.x_pad_token"
    lora = {f"{W1}.diff": torch.ones(shape_of(model("z-image"), f"{W1}.weight")),
            f"{token}.diff": torch.ones(shape_of(model("z-image"), token))}
    before = {key: model("z-image").get_model_object(key).clone() for key in (f"{W1}.weight", token)}
    patched, _, report = apply("z-image", lora)
    twice = run_node("StyleLoomApplyLoRA", model=patched, lora=lora)[0]
    for loaded, times in ((patched, 1), (twice, 2), (model("z-image"), 0), (patched, 1)):
        host.comfy.model_management.load_models_gpu([loaded], force_full_load=True)
        for key, value in before.items():
            found = host.comfy.utils.get_attr(loaded.model, key)
            assert torch.allclose(found, value + times, atol=1e-5), (key, times)
    host.comfy.model_management.unload_all_models()
    assert all(torch.equal(model("z-image").get_model_object(key), value) for key, value in before.items())
    assert "2 of 2 patches" in report
    assert f"1 of them on parameters that ComfyUI's own merge passes over, which this node sets itself: {token}" in report


def test_several_changes_of_one_weight(apply, model):
    """The host keeps the difference and drops the pair; of two spellings it keeps the last."""
    shape = shape_of(model("z-image"), f"{W1}.weight")
    words = "1 weights are changed more than once by the LoRA, and ComfyUI would keep one change of each: "
    refused(apply, rf"{words}{W1} \(LoRA\), {W1} \(diff\)", "z-image", pair(W1, shape, diff=torch.ones(shape)))
    other = "lora_unet_layers_1_feed_forward_w1"
    refused(apply, f"{words}{W1} .LoRA., {other}", "z-image", pair(W1, shape) | pair(other, shape))
    bias = "diffusion_model.cap_embedder.1"
    lora = pair(bias, shape_of(model("z-image"), f"{bias}.weight")) | {
        f"{bias}.diff_b": torch.ones(shape_of(model("z-image"), f"{bias}.bias"))}
    assert "2 of 2 patches" in apply("z-image", lora)[2]


def test_a_difference_of_another_shape_with_as_many_numbers(apply, model):
    """The host compares the shapes and drops the patch."""
    shape = shape_of(model("z-image"), f"{W1}.weight")
    for change in (torch.ones(*shape, 1, 1), torch.ones(shape[0], 2, shape[1] // 2)):
        refused(apply, "1 patches of the LoRA have another size", "z-image", {f"{W1}.diff": change})


def test_an_alpha_of_two_numbers(apply, model):
    lora = pair(W1, shape_of(model("z-image"), f"{W1}.weight"), alpha=torch.ones(2))
    refused(apply, r"1 patches of the LoRA are incomplete or damaged: .*w1: alpha is \[2\]", "z-image", lora)


def test_a_half_is_named(apply):
    refused(apply, "it has up and lacks down of a LoRA", "z-image", {f"{W1}.lora_up.weight": torch.ones(256, 2)})


def test_a_bias_that_the_host_does_not_read_is_named(apply, model):
    """PEFT's `lora_B.bias`: the host takes the pair and passes over it."""
    stem = "diffusion_model.cap_embedder.1"
    shape = shape_of(model("z-image"), f"{stem}.weight")
    lora = {f"{stem}.lora_A.weight": torch.ones(2, shape[1]), f"{stem}.lora_B.weight": torch.ones(shape[0], 2)}
    lora[f"{stem}.lora_B.bias"] = torch.ones(shape[0])
    refused(apply, "1 patches of the LoRA are incomplete or of an unknown kind: diffusion_model.cap", "z-image", lora)


def test_a_member_of_an_adapter_that_a_newer_host_adds(apply, model, host, monkeypatch):
    shape = shape_of(model("z-image"), f"{W1}.weight")
    lora = {f"{W1}.lokr_w1": torch.ones(2, 2), f"{W1}.lokr_w2": torch.ones(shape[0] // 2, shape[1] // 2)}
    kind = host.comfy.weight_adapter.LoKrAdapter
    first = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self, keys, weights: first(self, keys, (*weights, 7)))
    refused(apply, "reads a part of the LoRA as a LoKr adapter with 10 members, where 9 are known", "z-image", lora)


def test_a_tucker_lokr_reaches_the_weights(apply, model, host, kit, caplog):
    """Given to the host as it is in the file, this torch stops at its layout, and the host goes on without."""
    lora = kit.adapters.make(model("sd1.5"), "lokr_tucker", contains="input_blocks.1.0.in_layers")
    ((key, patches),) = apply("sd1.5", lora)[0].patches.items()
    weight = model("sd1.5").get_model_object(key)
    t = {name.rpartition(".")[2]: value.double() for name, value in lora.items()}
    second = torch.einsum("ijkl,ip,jr->prkl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"]).contiguous()
    due = torch.kron(t["lokr_w1"][..., None, None], second) * t["alpha"] / 4
    found = host.comfy.lora.calculate_weight(patches, torch.zeros_like(weight), key).double()
    assert (found - due).norm() < 1e-5 * due.norm() and "ERROR" not in caplog.text


def test_what_the_merge_leaves_out_of_an_oft_is_said(apply, model):
    rows = shape_of(model("z-image"), f"{W1}.weight")[0]
    lora = {f"{W1}.oft_blocks": torch.zeros(rows // 4, 4, 4), f"{W1}.rescale": torch.ones(rows, 1)}
    assert "ComfyUI's merge leaves out the rescale of an OFT (1 x)" in apply("z-image", lora)[2]


# --- FLUX


@pytest.fixture(scope="module")
def control(model):
    """As Black Forest Labs write their control LoRAs: the picture's channels beside those of the latent."""
    out, inside = shape_of(model("flux2"), "diffusion_model.img_in.weight")
    norm = "single_blocks.0.norm.key_norm"
    size = shape_of(model("flux2"), f"diffusion_model.{norm}.weight")
    down, up = torch.randn(2, inside + 8), torch.randn(out, 2)
    return (out, inside), {"img_in.lora_A.weight": down, "img_in.lora_B.weight": up, f"{norm}.scale": torch.ones(size)}


def test_a_control_lora_enlarges_the_layer_as_in_the_host(apply, model, host, control, run_node):
    (out, inside), lora = control
    patched, _, report = apply("flux2", lora)
    assert "2 of 2 patches" in report
    key = "diffusion_model.img_in.weight"
    weight = model("flux2").get_model_object(key)
    made = host.comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key)
    due = torch.cat([weight, weight.new_zeros(out, 8)], 1) + lora["img_in.lora_B.weight"] @ lora["img_in.lora_A.weight"]
    assert torch.allclose(made, due, atol=1e-4)
    narrow = lora | {"img_in.lora_A.weight": torch.randn(2, inside - 8)}
    refused(apply, "is to be enlarged to", "flux2", narrow)
    words = r"img_in enlarges diffusion_model.img_in.weight from .* as control LoRAs do"
    refused(run_node, words, "StyleLoomMergeLoRAs", loras={"lora0": lora, "lora1": lora}, model=model("flux2"))


def test_a_layer_whose_rows_the_host_swaps(apply, model, host):
    """Read and written again under a name that means the same rows; a bias the host has no place for there."""
    names = host.comfy.lora.model_lora_keys_unet(model("flux2").model, {})
    stem, target = next((s, t) for s, t in names.items() if s.startswith("transformer.") and t[1:2] == (None,))
    shape = shape_of(model("flux2"), target[0])
    lora = pair(stem, shape)

    def change(found):
        ((_, patches),) = apply("flux2", found)[0].patches.items()
        return host.comfy.lora.calculate_weight(patches, torch.zeros(shape), target[0])

    read = read_lora(lora, "x", names, lambda key: shape)
    assert list(read.adapters) == [target]
    written = write_lora(read.adapters, read.other, [read], "", names, {})
    due = target[2](lora[f"{stem}.lora_up.weight"] @ lora[f"{stem}.lora_down.weight"])
    assert torch.allclose(change(lora), due, atol=1e-4) and torch.allclose(change(written), due, atol=1e-4)
    bias = lora | {f"{stem}.diff_b": torch.ones(shape[0])}
    refused(apply, "changes a bias under .* ComfyUI has no place", "flux2", bias)
