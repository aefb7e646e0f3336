"""The files in workflows/, and stand-ins for what they name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
STEMS = sorted(path.stem for path in FOLDER.glob("*.json"))


def text_of(stem: str) -> str:
    return (FOLDER / f"{stem}.json").read_text("utf-8")


def api_of(stem: str) -> dict:
    return json.loads((FOLDER / "api" / f"{stem}.json").read_text("utf-8"))


def quick_text_of(stem: str) -> str:
    """The workflow with one step in each KSampler."""
    workflow = json.loads(text_of(stem))
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 1  # seed, control after generate, steps
    return json.dumps(workflow)


def models_of(workflow: dict) -> list[dict]:
    """What the nodes say of the model files that they name, in `properties.models`."""
    return [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]


@contextlib.contextmanager
def placeholders(base: Path, workflows: list[dict]):
    """Empty files under the names of their models, and small pictures under those of their pictures, while open."""
    made = []
    try:
        for workflow in workflows:
            for model in models_of(workflow):
                path = base / "models" / model["directory"] / model["name"]
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
                    made.append(path)
            for node in workflow["nodes"]:
                if node["type"] == "LoadImage":
                    path = base / "input" / node["widgets_values"][0]
                    if not path.exists():
                        Image.new("RGB", (48, 32), (90, 120, 150)).save(path)
                        made.append(path)
        yield
    finally:
        for path in made:
            path.unlink()
