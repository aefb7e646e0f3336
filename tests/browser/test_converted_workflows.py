"""Workflows of IPAdapter Plus, converted, in the real frontend: nothing is lost, and its export is the API's conversion."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "tests" / "unit" / "workflows_of_ipadapter_plus"


@pytest.fixture(scope="module")
def convert():
    folder = ROOT / "workflows" / "convert"
    spec = importlib.util.spec_from_file_location("styleloom_convert", folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])  # fmt: skip
    sys.modules.setdefault("styleloom_convert", importlib.util.module_from_spec(spec))
    return importlib.import_module("styleloom_convert.command").convert


def seen(prompt):
    """What a prompt says, whatever the numbers of its nodes."""
    def value(v):
        return float(v) if isinstance(v, (int, float)) else v

    return sorted(json.dumps([entry["class_type"],
                              sorted((k, value(v)) for k, v in entry["inputs"].items() if not isinstance(v, list)),
                              sorted((k, prompt[v[0]]["class_type"], v[1]) for k, v in entry["inputs"].items()
                                     if isinstance(v, list))]) for entry in prompt.values())  # fmt: skip


@pytest.mark.parametrize("case", ["advanced", "embeds", "fade", "regions"])
def test_the_frontend_reads_it(case, convert, front):
    made = convert(json.loads((FILES / f"editor_{case}.json").read_text(encoding="utf-8")))[0]
    front.open(case, json.dumps(made))
    front.page.wait_for_timeout(300)
    graph = front.graph()
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in made["nodes"]:
        assert nodes[node["id"]].get("widgets_values", []) == node.get("widgets_values", []), node["type"]
    assert len(graph["links"]) == len(made["links"]) and front.complaints == []
    assert seen(front.export()) == seen(convert(json.loads((FILES / f"api_{case}.json").read_text("utf-8")))[0])
