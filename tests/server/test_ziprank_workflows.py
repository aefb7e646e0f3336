"""The demo workflows of the merges, queued in a real server."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

API = Path(__file__).resolve().parents[2] / "workflows" / "api"
DEMOS = ["demo_ziprank_fast", "demo_ziprank_compare", "demo_ziprank_calibrated", "demo_ziprank_train"]


def prompt_of(name: str) -> dict:
    """The file, with fewer steps: what is tested is the way through the nodes, and not the picture."""
    prompt = json.loads((API / f"{name}.json").read_text("utf-8"))
    fewer = {"KSampler": {"steps": 2}, "StyleLoomZipRankMerge": {"steps": 3, "calibration_steps": 1}}
    for entry in prompt.values():
        entry["inputs"].update(fewer.get(entry["class_type"], {}))
    return prompt


def find(prompt: dict, kind: str) -> str:
    (node,) = [node for node, entry in prompt.items() if entry["class_type"] == kind]
    return node


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_makes_its_pictures_and_remembers(name, server, client):
    prompt = prompt_of(name)
    prompt_id = client.queue(prompt)
    end = client.follow(prompt_id, timeout=300)[-1]
    assert end["type"] == "execution_success", end
    outputs = client.history(prompt_id)["outputs"]
    for node, entry in prompt.items():
        if entry["class_type"] == "SaveImage":
            (image,) = outputs[node]["images"]
            png = client.view(image["filename"], image["subfolder"], image["type"])
            assert png.startswith(b"\x89PNG") and min(struct.unpack("!II", png[16:24])) >= 190
    (report,) = outputs[find(prompt, "PreviewAny")]["text"]
    assert "700 layers (700 shared" in report and "own-input loss" in report
    events = client.follow(client.queue(prompt), timeout=60)
    assert events[-1]["type"] == "execution_success"
    assert not [e for e in events if e["type"] == "executing" and e["data"]["node"]], "nothing changed, nothing runs"


def test_the_saved_lora_has_what_other_tools_read(server, client):
    prompt = prompt_of("demo_ziprank_fast")
    save = find(prompt, "StyleLoomSaveLoRA")
    prompt[save]["inputs"]["filename_prefix"] = "loras/other_tools"
    prompt_id = client.queue(prompt)
    assert client.follow(prompt_id, timeout=300)[-1]["type"] == "execution_success"
    (said,) = client.history(prompt_id)["outputs"][save]["text"]
    raw = (server.base / "output" / said.removeprefix("LoRA saved as ")).read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    meta = header.pop("__metadata__")
    assert meta["ss_network_module"] == "networks.lora" and meta["ss_base_model_version"] == "sdxl_base_v1-0"
    recipe = json.loads(meta["styleloom.recipe"])
    assert [lora["file"] for lora in recipe["loras"]] == ["kit/sdxl_content.safetensors", "kit/sdxl_style.safetensors"]
    assert len(header) == 3 * 700
    for name, entry in header.items():
        if name.endswith(".lora_down.weight"):
            alpha = header[name.replace(".lora_down.weight", ".alpha")]
            assert alpha["shape"] == [] and entry["shape"][0] == header[name.replace("down", "up", 1)]["shape"][1]


def test_cancel_while_training_keeps_the_masks_and_the_workflow_goes_on(client):
    prompt = prompt_of("demo_ziprank_train")
    node = find(prompt, "StyleLoomZipRankMerge")
    for name in [name for name, entry in prompt.items() if entry["class_type"] in ("SaveImage", "StyleLoomSaveLoRA")]:
        del prompt[name]  # the report alone is asked for: nothing is sampled with the result
    prompt[node]["inputs"].update(steps=5000, seed=77)
    pressed = []

    def interrupt(event):
        data = event["data"]
        if event["type"] == "progress" and data["node"] == node and not pressed:
            trained = data["value"] - (data["max"] - 5000)  # the calibration comes first
            if data["max"] >= 5000 and trained > 2:
                pressed.append(data["value"])
                client.interrupt()

    prompt_id = client.queue(prompt)
    end = client.follow(prompt_id, interrupt, timeout=300)[-1]
    assert pressed and end["type"] == "execution_success", end
    (report,) = client.history(prompt_id)["outputs"][find(prompt, "PreviewAny")]["text"]
    assert "Stopped at step" in report and "of 5000: the best masks so far are kept" in report
