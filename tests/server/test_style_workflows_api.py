"""The demos of the style nodes in API form, queued in a real server: pictures, reports, and what is remembered."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

API = Path(__file__).resolve().parents[2] / "workflows" / "api"
# Demo → what its text nodes must say.
DEMOS = {
    "demo_style_only_sdxl": [],
    "demo_style_and_layout_sdxl": [],
    "demo_content_subtract_sdxl": ["method: rejection at strength 1", "cosine to “a puppy”"],
    "demo_content_by_pictures_sdxl": ["alone, without a text encoder", "cosine to “content picture 2”"],
    "demo_style_lora_blocks_sdxl": ["inside: 80 of 560 layers at 1 (style blocks of SDXL: up_blocks.0.attentions.1)"],
}


def load(name: str) -> dict:
    """The file, with fewer steps: what is tested is the way through the nodes, and not the picture."""
    prompt = json.loads((API / f"{name}.json").read_text("utf-8"))
    for entry in prompt.values():
        if entry["class_type"] == "KSampler":
            entry["inputs"]["steps"] = 2
    return prompt


def run(client, prompt: dict) -> tuple[dict, set[str], dict]:
    """Queues and waits: (outputs, the classes of what ran, the last event)."""
    prompt_id = client.queue(prompt)
    events = client.follow(prompt_id, timeout=300)
    ran = {e["data"]["node"] for e in events if e["type"] == "executing" and e["data"]["node"]}
    return client.history(prompt_id)["outputs"], {prompt[node]["class_type"] for node in ran}, events[-1]


def of_class(prompt: dict, name: str) -> list[str]:
    return [node for node, entry in prompt.items() if entry["class_type"] == name]


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_makes_its_pictures_and_remembers(name, client):
    prompt = load(name)
    outputs, _, end = run(client, prompt)
    assert end["type"] == "execution_success", end
    (saved,) = (outputs[node]["images"][0] for node in of_class(prompt, "SaveImage"))
    assert client.view(saved["filename"], saved["subfolder"], saved["type"]).startswith(b"\x89PNG")
    said = "\n".join(text for output in outputs.values() for text in output.get("text") or [])
    share = re.search(r"Moved by ([\d.]+) %", said)
    assert share and float(share[1]) > 1
    assert [words for words in DEMOS[name] if words not in said] == []
    assert run(client, prompt)[1] == set(), "nothing runs again"


def test_only_what_a_change_touches_runs_again(client):
    prompt = load("demo_style_only_sdxl")
    assert run(client, prompt)[2]["type"] == "execution_success"
    changed = copy.deepcopy(prompt)
    (inject,) = of_class(changed, "StyleLoomStyleBlockInjector")
    changed[inject]["inputs"]["weight"] = 0.55
    _, ran, end = run(client, changed)
    assert end["type"] == "execution_success"
    assert "StyleLoomStyleBlockInjector" in ran and "StyleLoomEncodeStyleImage" not in ran
    assert "StyleLoomLoadIPAdapter" not in ran


@pytest.mark.parametrize(
    ("demo", "node", "inputs", "words"),
    [
        ("demo_style_only_sdxl", "StyleLoomStyleBlockInjector", {"preset": "custom"}, "block_weights is empty"),
        ("demo_style_only_sdxl", "StyleLoomKitModel", {"architecture": "sd1.5"}, "model is SD1.5"),
        ("demo_content_subtract_sdxl", "StyleLoomContentSubtract", {"content": " "}, "content is empty"),
        ("demo_content_subtract_sdxl", "StyleLoomKitModel", {"architecture": "sd1.5"}, "text vectors of clip are 32"),
        ("demo_style_lora_blocks_sdxl", "StyleLoomLoRABlockFilter", {"inside": 0.0}, "nothing of the LoRA is left"),
    ],
)
def test_errors_arrive_in_three_parts(demo, node, inputs, words, client):
    prompt = load(demo)
    for found in of_class(prompt, node):
        prompt[found]["inputs"].update(inputs)
    _, _, end = run(client, prompt)
    assert end["type"] == "execution_error" and words in end["data"]["exception_message"]
    assert "Expected: " in end["data"]["exception_message"] and "What to do: " in end["data"]["exception_message"]


@pytest.mark.parametrize("value", ["../x.safetensors", "/etc/hostname", "kit/none.safetensors"])
def test_a_name_outside_the_folder_is_refused(value, client):
    prompt = load("demo_style_only_sdxl")
    (node,) = of_class(prompt, "StyleLoomLoadIPAdapter")
    prompt[node]["inputs"]["ipadapter_name"] = value
    for preview in of_class(prompt, "PreviewImage"):  # what does not need the adapter would run all the same
        del prompt[preview]
    with pytest.raises(RuntimeError) as refused:
        client.queue(prompt)
    errors = refused.value.body["node_errors"][node]["errors"]
    assert refused.value.status == 400
    assert [(e["type"], e["extra_info"]["input_name"]) for e in errors] == [("value_not_in_list", "ipadapter_name")]
