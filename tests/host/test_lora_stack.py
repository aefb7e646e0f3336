"""LoRA Stack beside other packs' LoRA stackers and ComfyUI's hooks, and what a LoRA file says of itself."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from shared_models import ONE
from test_bad_input import refused


@pytest.fixture(scope="module")
def files(bench, host):
    """Two LoRA files, as other packs name them, and what is in them."""
    folder = host.base / "models" / "loras" / "stack"
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for seed, name in enumerate(("one", "two"), 1):
        lora = bench.lora(seed, contains="attn2.to_q")
        tags = {"ss_tag_frequency": json.dumps({"1_ohwx": {"ohwx": 1}}), "ss_base_model_version": "sd_v1"}
        save_file(lora, str(folder / f"{name}.safetensors"), tags)
        made[f"stack/{name}.safetensors"] = lora
    return made


@pytest.fixture(scope="module")
def stacker():
    """As LoRA stacker nodes of other packs do: a new list, with what came before it but for entries called None."""

    def add(name, model, clip, stack=None):
        return [entry for entry in stack or () if entry[0] != "None"] + [(name, model, clip)]

    return add


def test_a_lora_stack_is_these_files(bench, run_node, files, stacker):
    one, two = files
    given = stacker(two, 0.4, 0.0, stacker(one, 0.8, 0.6))
    stack, tuples, report = run_node("StyleLoomLoRAStack", lora_stack=given, strength=1.0)
    assert "LoRA 1: stack/one.safetensors at strength 0.8 (0.6 for a text encoder" in report
    assert tuples == given and isinstance(tuples, list)
    made = bench.asymmetric(positive_lora=stack, sampling=ONE)
    by_hand = run_node("StyleLoomLoRAStack", lora=files[one], strength=0.8)[0]
    by_hand = run_node("StyleLoomLoRAStack", lora=files[two], strength=0.4, stack=by_hand)[0]
    assert torch.equal(made, bench.asymmetric(positive_lora=by_hand, sampling=ONE))


def test_what_this_node_sets_acts_on_all_that_it_adds(bench, run_node, files):
    one, two = files
    before = run_node("StyleLoomLoRAStack", lora=run_node("StyleLoomLoadLoRA", lora_name=two)[0], strength=0.3)[0]
    stack, tuples, _ = run_node(
        "StyleLoomLoRAStack", stack=before, lora_stack=((one, 0.8, 0.6, "trigger"), ("None", 1.0, 1.0)), strength=0.5
    )
    assert tuples == [(two, 0.3, 0.3), (one, 0.4, 0.3)]
    windowed = run_node("StyleLoomLoRAStack", lora_stack=[[one, 1, 1]], strength=1.0, end_percent=0.3)[0]
    assert [entry.end_percent for entry in windowed] == [0.3]
    for nothing in (None, [], [("None", 1.0, 1.0)], [(None, 1, 1)]):
        made, tuples, report = run_node("StyleLoomLoRAStack", lora_stack=nothing, strength=1.0)
        assert (made, tuples, report) == ((), [], "no LoRA")
    bench.guider(positive_lora=())
    assert "positive: the model as it is" in bench.report


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("name", "lora_stack is a str"),
        ([("stack/one.safetensors", 1.0)], "entry 1 of lora_stack is .'stack/one.safetensors', 1.0"),
        ([{"name": "stack/one.safetensors"}], "entry 1 of lora_stack is .'name'"),
        ([("stack/one.safetensors", 1.0, "strong")], "has the strengths"),
        ([("stack/one.safetensors", float("nan"), 1.0)], "has the strengths"),
        ([("stack/three.safetensors", 1.0, 1.0)], "'stack/three.safetensors' is not there"),
        ([("../../secret.safetensors", 1.0, 1.0)], "is not there"),
        ([("/etc/passwd", 1.0, 1.0)], "is not there"),
    ],
)
def test_what_is_no_lora_stack(given, words, run_node, files):
    refused(run_node, words, "StyleLoomLoRAStack", lora_stack=given, strength=1.0)


def test_what_a_lora_stack_cannot_say_blocks_its_users_alone(run_node, files, host):
    one = next(iter(files))
    loaded = run_node("StyleLoomLoadLoRA", lora_name=one)[0]
    filtered = run_node("StyleLoomLoRABlockFilter", lora=loaded, preset="attention only", inside=0.5)[0]
    frames = run_node("CreateHookKeyframe", strength_mult=0.5, start_percent=0.0)[0]
    for given, words in (
        ({"lora": filtered}, "LoRA 1 is no file in models/loras as it is"),
        ({"lora": dict(loaded)}, "is no file"),
        ({"lora": loaded, "start_percent": 0.2}, "has a start_percent"),
        ({"lora": loaded, "end_percent": 0.9}, "has an end_percent"),
        ({"lora": loaded, "keyframes": frames}, "has keyframes"),
    ):
        stack, tuples, report = run_node("StyleLoomLoRAStack", strength=1.0, **given)
        assert len(stack) == 1 and type(tuples).__name__ == "ExecutionBlocker"
        assert words in tuples.message and words in report


# --- ComfyUI's hooks


def hook(run_node, lora, model, clip=1.0, frames=None, before=None):
    """As Create Hook LoRA makes it of a file."""
    import comfy.hooks

    group = comfy.hooks.create_hook_lora(lora, model, clip)
    if before is not None:
        group = run_node("CombineHooks2", hooks_A=before, hooks_B=group)[0]
    return group if frames is None else run_node("SetHookKeyframes", hooks=group, hook_kf=frames)[0]


def test_hooks_are_these_loras_with_their_keyframes(bench, run_node, files, distance):
    """The truth: the same hooks on the positive conditioning, which the host runs apart."""
    one, two = files.values()
    frames = run_node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)[0]
    frames = run_node("CreateHookKeyframe", strength_mult=0.25, start_percent=0.4, prev_hook_kf=frames)[0]
    group = hook(run_node, two, 0.5, before=hook(run_node, one, 0.8, frames=frames))
    stack, tuples, report = run_node("StyleLoomLoRAStack", hooks=group, strength=1.0)
    assert [entry.strength for entry in stack] == [0.8, 0.5] and type(tuples).__name__ == "ExecutionBlocker"
    assert "LoRA 1: a hook at strength 0.8, with keyframes" in report
    made = bench.asymmetric(positive_lora=stack, sampling={"steps": 2})
    import comfy.hooks

    positive = comfy.hooks.set_hooks_for_conditioning(bench.positive, group)
    plain = run_node("CFGGuider", model=bench.model, positive=positive, negative=bench.negative, cfg=3.5)[0]
    assert distance(made, bench.through(plain, steps=2)) < 1e-4
    assert not group.hooks[0].hook_keyframe.is_empty(), "the hooks stay as they were"


def test_hooks_of_other_kinds_are_named(bench, run_node, files, host):
    import comfy.hooks

    one = next(iter(files.values()))
    model_hook = comfy.hooks.create_hook_model_as_lora({"diffusion_model.x": torch.ones(1)}, None, 1.0, 1.0)
    refused(run_node, "Create Hook Model as LoRA", "StyleLoomLoRAStack", hooks=model_hook, strength=1.0)
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook({}))
    refused(run_node, "a hook of the kind transformer_options", "StyleLoomLoRAStack", hooks=group, strength=1.0)
    frames = run_node("CreateHookKeyframe", strength_mult=0.5, start_percent=0.0)[0]
    framed = hook(run_node, one, 0.8, frames=frames)
    words = "keyframes of its own, and keyframes is connected"
    refused(run_node, words, "StyleLoomLoRAStack", hooks=framed, keyframes=frames, strength=1.0)


# --- the file itself


def test_a_loaded_file_says_its_words_and_its_model(run_node, files, host):
    lora, words, base, report = run_node("StyleLoomLoadLoRA", lora_name="stack/one.safetensors")
    assert (words, base) == ("ohwx", "sd_v1") and lora.source == "stack/one.safetensors"
    assert "trigger words: ohwx (the most frequent tags" in report
    assert "base model: sd_v1 (in the file), SD1.5 or SD2 (by its layers)" in report
    save_file(dict(lora), str(host.base / "models" / "loras" / "stack" / "bare.safetensors"))
    _, words, base, report = run_node("StyleLoomLoadLoRA", lora_name="stack/bare.safetensors")
    assert (words, base) == ("", "SD1.5 or SD2") and "the file names none" in report
