"""Opened where its models are not, each workflow offers them for download: the frontend reads `properties.models`."""

from __future__ import annotations

import json

import pytest
from workflow_files import STEMS, models_of, text_of

MODEL_ENDINGS = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf")


@pytest.mark.parametrize("name", [stem for stem in STEMS if models_of(json.loads(text_of(stem)))])
def test_missing_models_are_offered_with_their_source(front, name):
    workflow = json.loads(text_of(name))
    named = {value for node in workflow["nodes"] for value in node.get("widgets_values") or []
             if isinstance(value, str) and value.endswith(MODEL_ENDINGS)}
    models = {model["name"]: model for model in models_of(workflow)}
    assert set(models) == named, "each model that a node names has an entry in properties.models"
    for model in models.values():
        assert model["url"].startswith("https://huggingface.co/") and "/resolve/" in model["url"]
        assert model["url"].endswith("/" + model["name"].split("/")[-1])
    front.open(name, text_of(name))
    front.page.get_by_role("button", name="View details").click()
    for model in models:
        front.page.get_by_role("button", name=f"Download {model}", exact=True).wait_for()
    offered = front.page.get_by_role("button").evaluate_all("all => all.map(b => b.getAttribute('aria-label') || '')")
    offered = {label.removeprefix("Download ") for label in offered if label.startswith("Download ")}
    assert offered - {"all"} == set(models), "these, and none of another workflow"
