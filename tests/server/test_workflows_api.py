"""The demo workflows in API form, queued in a real server: what runs, what is remembered, what a stop leaves behind."""

from __future__ import annotations

import copy
import json
import re
import struct
from pathlib import Path

import psutil
import pytest

API = Path(__file__).resolve().parents[2] / "workflows" / "api"


def api_of(stem: str) -> dict:
    return json.loads((API / f"{stem}.json").read_text("utf-8"))


def quick(stem: str, steps: int = 2) -> dict:
    """A demo with few steps in each sampler: what is tested is the way through the nodes, and not the picture."""
    prompt = api_of(stem)
    for entry in prompt.values():
        if "steps" in entry["inputs"]:
            entry["inputs"]["steps"] = steps
    return prompt


DEMO = quick("demo_image_to_lora")

# The titles of the demo's nodes that do not see its reference pictures, and of the pictures themselves.
APART = {"Load i2L Image Encoders", "Load i2L Predictor", "Kit: Small Model", "EmptySD3LatentImage", "Prompt",
         "Negative prompt", "KSampler without the LoRA", "Decode, without"}
PICTURES = {f"Reference {i}{end}" for i in (1, 2, 3) for end in ("", ", as it is")}


def titles(ids, prompt=DEMO) -> set[str]:
    return {prompt[node]["_meta"]["title"] for node in ids}


def find(prompt: dict, title: str) -> str:
    """The id of the one node with this title."""
    (node,) = [node for node, entry in prompt.items() if entry["_meta"]["title"] == title]
    return node


def changed(prompt: dict, title: str, **inputs) -> dict:
    prompt = copy.deepcopy(prompt)
    prompt[find(prompt, title)]["inputs"].update(inputs)
    return prompt


def part(prompt: dict, *outputs: str) -> dict:
    """Only what the nodes of these titles need."""
    todo, kept = [find(prompt, title) for title in outputs], {}
    while todo:
        node = todo.pop()
        if node not in kept:
            kept[node] = prompt[node]
            todo += [value[0] for value in prompt[node]["inputs"].values() if isinstance(value, list)]
    return copy.deepcopy(kept)


def run(client, prompt: dict) -> tuple[set[str], set[str], dict]:
    """Queues, waits: (titles of what ran, titles of what was cached, the last event)."""
    events = client.follow(client.queue(prompt), timeout=300)
    ran = {e["data"]["node"] for e in events if e["type"] == "executing" and e["data"]["node"]}
    cached = {node for e in events if e["type"] == "execution_cached" for node in e["data"]["nodes"]}
    return titles(ran, prompt), titles(cached, prompt), events[-1]


def stopped_at(client, prompt: dict, title: str, share: float = 0.0) -> tuple[dict, int]:
    """Queues, interrupts once the node of this title has done this share; returns the last event and all its steps."""
    node, steps = find(prompt, title), []

    def interrupt(event):
        data = event["data"]
        if event["type"] == "progress" and data["node"] == node and data["value"] >= share * data["max"] and not steps:
            steps.append(data["max"])
            client.interrupt()

    events = client.follow(client.queue(prompt), interrupt, timeout=300)
    assert steps, f"{title} showed no progress: {[event['type'] for event in events]}"
    return events[-1], steps[0]


def test_the_demo_makes_pictures_and_a_lora_and_remembers(server, client):
    prompt_id = client.queue(DEMO)
    events = client.follow(prompt_id, timeout=300)
    assert events[-1]["type"] == "execution_success", events[-1]
    outputs = client.history(prompt_id)["outputs"]
    for title in ("Save Image: without, with, difference", "Save Image: the LoRA's targets"):
        (image,) = outputs[find(DEMO, title)]["images"]
        png = client.view(image["filename"], image["subfolder"], image["type"])
        width, height = struct.unpack("!II", png[16:24])
        assert png.startswith(b"\x89PNG") and width > 500 and height > 200
        assert (server.base / "output" / image["subfolder"] / image["filename"]).read_bytes() == png
    (said,) = outputs[find(DEMO, "Preview as Text: how much it moved")]["text"]
    assert said.startswith("Moved by"), said
    (report,) = outputs[find(DEMO, "Preview as Text: what was made of what")]["text"]
    assert "238 targets" in report and "rank 12" in report and "3 pictures" in report

    (said,) = outputs[find(DEMO, "Save LoRA File")]["text"]
    path = server.base / "output" / said.removeprefix("LoRA saved as ")
    assert path.parent == server.base / "output" / "loras"
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8:8 + size])
    recipe = json.loads(header.pop("__metadata__")["styleloom.recipe"])
    assert len(header) == 2 * 238 and all(key.startswith("diffusion_model.") for key in header)
    assert len(recipe["images"]) == 3

    ran, cached, end = run(client, DEMO)
    assert end["type"] == "execution_success"
    assert (ran, cached) == (set(), titles(DEMO))

    other = changed(DEMO, "Reference 2", name="statues in the clouds")  # in no workflow: not seen before
    ran, cached, end = run(client, other)
    assert end["type"] == "execution_success"
    touched = {"Reference 2", "Reference 2, as it is"}
    assert cached == (APART | PICTURES) - touched
    assert ran == titles(DEMO) - cached


def test_a_stop_while_sampling_leaves_nothing_behind(server, client):
    process = psutil.Process(server.process.pid)
    assert run(client, DEMO)[2]["type"] == "execution_success"
    before = process.memory_info().rss
    for seed in range(3):
        title = "KSampler with the LoRA"
        end, _ = stopped_at(client, changed(DEMO, title, steps=10000, seed=seed), title)
        assert end["type"] == "execution_interrupted" and end["data"]["node_id"] == find(DEMO, title)
    ran, _, end = run(client, changed(DEMO, "KSampler with the LoRA", steps=1, seed=99))
    assert end["type"] == "execution_success" and "KSampler with the LoRA" in ran
    grown = process.memory_info().rss - before
    assert grown < 32 * 2**20, f"{grown / 2**20:.0f} MiB more than before the interrupts"


def said(client, prompt: dict, *outputs: str) -> list[str]:
    """Queues, waits, and returns what these text previews show. Runs what they need, and with it nothing else."""
    prompt = part(prompt, *outputs)
    prompt_id = client.queue(prompt)
    end = client.follow(prompt_id, timeout=300)[-1]
    assert end["type"] == "execution_success", end
    shown = client.history(prompt_id)["outputs"]
    return [shown[find(prompt, title)]["text"][0] for title in outputs]


def moved(text: str) -> float:
    """The percentage that Kit: How Much It Moved names; 0 where the pictures are equal."""
    found = re.match(r"Moved by ([\d.]+) % ", text)
    assert found or text.startswith("The two pictures are equal"), text
    return float(found[1]) if found else 0.0


MOVED, SIDES = "Preview as Text: how much it moved", "Preview as Text: the LoRAs of both sides"
SAMPLER = "Asymmetric CFG Sampler"
DEMOS = sorted(path.stem for path in API.glob("demo_asymmetric_*.json"))  # those of other nodes have files of their own


@pytest.mark.parametrize("stem", DEMOS)
def test_each_demo_saves_its_pictures_and_says_how_far_they_moved(server, client, stem):
    prompt = quick(stem)
    prompt_id = client.queue(prompt)
    end = client.follow(prompt_id, timeout=300)[-1]
    assert end["type"] == "execution_success", end
    outputs = client.history(prompt_id)["outputs"]
    saves = [node for node, entry in prompt.items() if entry["class_type"] == "SaveImage"]
    assert saves
    for node in saves:
        (image,) = outputs[node]["images"]
        png = client.view(image["filename"], image["subfolder"], image["type"])
        assert png.startswith(b"\x89PNG") and struct.unpack("!II", png[16:24]) > (500, 200)
        assert (server.base / "output" / image["subfolder"] / image["filename"]).read_bytes() == png
    (text,) = outputs[find(prompt, MOVED)]["text"]
    assert moved(text) > 5, text
    assert run(client, prompt)[:2] == (set(), titles(prompt, prompt))


def test_the_gray_lora_acts_on_the_negative_side(client):
    """Without both LoRAs the picture is that of a KSampler; each of them changes it, and no patch is left out."""
    demo = quick("demo_asymmetric_z_image")
    text, sides = said(client, demo, MOVED, SIDES)
    positive, negative, batch = sides.splitlines()
    for line, side in ((positive, "positive"), (negative, "negative")):
        assert line.startswith(f"{side} LoRA") and ": 238 patches at strength 1" in line, line
        assert line.endswith("in one pass: 238 LoRA"), line
    assert batch.startswith("sampled with the sides one after the other"), "the prompts are not of one length"
    shares = {}
    for strengths in ((0, 0), (1, 0), (0, 1)):
        named = dict(zip(("positive_strength", "negative_strength"), strengths))
        shares[strengths] = moved(*said(client, changed(demo, SAMPLER, **named), MOVED))
    assert shares[0, 0] < 0.1, "plain CFG: KSampler's picture"
    assert min(shares[1, 0], shares[0, 1], moved(text)) > 5
    assert len({*shares.values(), moved(text)}) == 4, "each side has its own part in the picture"


def test_the_style_lora_acts_on_the_positive_side_only(client):
    demo = quick("demo_asymmetric_sdxl")
    text, sides = said(client, demo, MOVED, SIDES)
    assert sides.splitlines() == [
        "positive LoRA (kit/sdxl_paper.safetensors): 560 patches at strength 1; in one pass: 560 LoRA",
        "negative: the model as it is", "sampled with both sides in one batch, in 2 of 2 evaluations"]
    assert moved(text) > 5
    assert moved(*said(client, changed(demo, SAMPLER, positive_strength=0), MOVED)) < 0.1


def test_symmetric_and_asymmetric_differ_and_meet_at_cfg_1(client):
    """With cfg 1 the positive side is the whole picture: merged into the model or not, it has the LoRA."""
    demo = quick("demo_asymmetric_compare")
    assert moved(*said(client, demo, MOVED)) > 5
    alone = changed(changed(demo, "KSampler: symmetric", cfg=1.0), SAMPLER, cfg=1.0)
    assert moved(*said(client, alone, MOVED)) < 0.1


def test_a_lora_for_another_model_is_refused_in_words(client):
    prompt = part(api_of("demo_asymmetric_sdxl"), SIDES)
    prompt = changed(prompt, "Load LoRA File", lora_name="kit/qwen_image_i2l_bias.safetensors")
    end = run(client, prompt)[2]
    assert end["type"] == "execution_error" and end["data"]["node_id"] == find(prompt, SAMPLER)
    found, expected, fix = end["data"]["exception_message"].strip().split("\n")
    assert found.startswith("1440 of the positive LoRA's 1440 keys find no place in this SDXL model: transformer_blocks")
    assert expected == "Expected: a LoRA for SDXL" and fix.startswith("What to do: ")


def test_a_stop_while_encoding_keeps_what_was_encoded(client):
    """Forty pictures that no one has seen, so that there is something to stop."""
    prompt = part(DEMO, "Preview as Text: what was made of what")
    encode = prompt[find(prompt, "Encode References")]["inputs"]
    for name in [name for name in encode if name.startswith("images.")]:
        del prompt[encode.pop(name)[0]]
    previous = None
    for i in range(40):
        picture, node = f"picture{i}", f"batch{i}"
        prompt[picture] = {"class_type": "EmptyImage", "_meta": {"title": picture}, "inputs": {
            "width": 400, "height": 300, "batch_size": 1, "color": 0x10203 * (i + 1)}}
        if previous is not None:
            prompt[node] = {"class_type": "ImageBatch", "_meta": {"title": node},
                            "inputs": {"image1": [previous, 0], "image2": [picture, 0]}}
        previous = picture if previous is None else node
    encode["images.image0"] = [previous, 0]

    end, steps = stopped_at(client, prompt, "Encode References", share=0.3)
    assert end["type"] == "execution_interrupted" and end["data"]["node_type"] == "StyleLoomEncodeReferences"
    end, fewer = stopped_at(client, prompt, "Encode References")
    assert end["type"] == "execution_interrupted" and fewer < 0.8 * steps
    ran, _, end = run(client, prompt)
    assert end["type"] == "execution_success"
    assert ran == {"Encode References", "Image-to-LoRA Predictor", "Preview as Text: what was made of what"}


@pytest.mark.parametrize(("title", "name"), [
    ("Load i2L Predictor", "predictor_name"), ("Load i2L Image Encoders", "siglip_name"),
    ("Load i2L Image Encoders", "dino_name")])
@pytest.mark.parametrize("value", ["../x.safetensors", "../loras/kit/qwen_image_i2l_bias.safetensors",
                                   "/etc/hostname", "kit/not_there.safetensors"])
def test_a_name_outside_the_folders_is_refused(client, title, name, value):
    prompt = part(changed(DEMO, title, **{name: value}), "Save LoRA File")
    with pytest.raises(RuntimeError) as refused:
        client.queue(prompt)
    assert refused.value.status == 400
    errors = refused.value.body["node_errors"][find(prompt, title)]["errors"]
    assert [(e["type"], e["extra_info"]["input_name"]) for e in errors] == [("value_not_in_list", name)]


def test_a_prefix_that_leaves_the_output_folder_is_refused(server, client):
    prompt = part(changed(DEMO, "Save LoRA File", filename_prefix="../../outside/x"), "Save LoRA File")
    end = run(client, prompt)[2]
    assert end["type"] == "execution_error" and end["data"]["node_type"] == "StyleLoomSaveLoRA"
    assert "filename_prefix is '../../outside/x'" in end["data"]["exception_message"]
    assert not list(server.base.parent.rglob("outside"))


def test_an_error_inside_a_node_says_what_where_and_what_to_do(client):
    prompt = part(changed(DEMO, "Image-to-LoRA Predictor", image_weights="1, 2"), "Save LoRA File")
    end = run(client, prompt)[2]
    assert end["type"] == "execution_error" and end["data"]["node_id"] == find(prompt, "Image-to-LoRA Predictor")
    found, expected, fix = end["data"]["exception_message"].strip().split("\n")
    assert "image_weights" in found and "2" in found and "3 pictures" in found
    assert expected.startswith("Expected: ") and fix.startswith("What to do: ")
