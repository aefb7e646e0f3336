"""Every file in workflows/ in the real frontend. A new workflow is tested by lying there."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from workflow_files import FOLDER, STEMS, api_of, placeholders, text_of


@pytest.fixture(scope="module")
def whole(server, open_frontend):
    """A Frontend whose host has all that the workflows name."""
    with placeholders(server.base, [json.loads(text_of(stem)) for stem in STEMS]), open_frontend() as front:
        yield front


@pytest.fixture(scope="module", params=STEMS)
def opened(request, whole):
    """(name, its file's content, the Frontend that has it open)."""
    whole.open(request.param, text_of(request.param))
    whole.page.wait_for_timeout(250)  # for what the frontend does of its own after it has opened a file
    yield request.param, json.loads(text_of(request.param)), whole
    late, whole.complaints[:] = list(whole.complaints), []
    assert late == [], "complaints about this one, not about the next"


def test_nothing_is_missing_and_nothing_complains(opened):
    _, workflow, front = opened
    nodes = front.nodes()
    assert len(nodes) == len(workflow["nodes"])
    assert [n["type"] for n in nodes if not n["known"]] == []
    assert [n["title"] for n in nodes if n["wrong"]] == []
    assert front.page.get_by_role("button", name="View details").count() == 0, "the frontend found errors"
    assert front.complaints == []


def test_links_and_widgets_are_as_in_the_file(opened):
    _, workflow, front = opened
    graph = front.graph()
    assert sorted(graph["links"]) == sorted(workflow["links"])
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in workflow["nodes"]:
        assert nodes[node["id"]].get("widgets_values", []) == node.get("widgets_values", []), node["type"]
    for link, source, output, target, slot, _ in graph["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link


def test_the_api_form_is_the_frontends_own_export(opened):
    name, _, front = opened
    exported = front.export()
    assert {node: {**entry, "_meta": None} for node, entry in exported.items()} == {
        node: {**entry, "_meta": None} for node, entry in api_of(name).items()}
    assert all(entry["_meta"]["title"] for entry in api_of(name).values())


def test_the_host_accepts_it(opened, client):
    name, _, _ = opened
    answer = client.post("/prompt", {"prompt": api_of(name), "client_id": client.id})
    client.post("/queue", {"delete": [answer["prompt_id"]]})
    end = time.monotonic() + 60
    while (queue := client.get("/queue"))["queue_running"] or queue["queue_pending"]:  # it was begun already
        client.interrupt()
        assert time.monotonic() < end
        time.sleep(0.2)
    assert answer["node_errors"] == {}


def test_it_is_tidy(opened):
    """No node lies on another or over the edge of a group, and none is too small for what is on it."""
    _, _, front = opened
    nodes = front.nodes()
    small = [n["title"] for n in nodes if n["size"][0] < n["least"][0] - 1 or n["size"][1] < n["least"][1] - 1]
    assert small == []
    overlaps = [(a["title"], b["title"]) for a, b in itertools.combinations(nodes, 2)
                if a["left"] < b["right"] and b["left"] < a["right"]
                and a["top"] < b["bottom"] and b["top"] < a["bottom"]]
    assert overlaps == []
    over = []
    for group in front.graph()["groups"]:
        left, top, width, height = group["bounding"]
        right, bottom = left + width, top + height
        over += [(n["title"], group["title"]) for n in nodes
                 if n["left"] < right and left < n["right"] and n["top"] < bottom and top < n["bottom"]
                 and not (left <= n["left"] and n["right"] <= right and top <= n["top"] and n["bottom"] <= bottom)]
    assert over == []


SEEN = """() => Array.from(document.querySelectorAll('[data-testid^="template-workflow-"]'))
    .filter(card => Array.from(card.querySelectorAll('img')).some(img => img.naturalWidth > 0))
    .map(card => card.dataset.testid.slice('template-workflow-'.length))"""


def test_the_template_dialog_shows_them_all(client, front):
    assert sorted(client.get("/workflow_templates")["StyleLoom"]) == STEMS
    for stem in STEMS:
        assert (FOLDER / f"{stem}.jpg").stat().st_size < 60_000
    page, size = front.page, front.page.viewport_size
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_role("dialog").get_by_text("StyleLoom", exact=True).last.click()
    page.get_by_test_id("template-workflow-demo_image_to_lora").wait_for()
    # The dialog fills itself with what is in sight: a high window, and then as it is scrolled.
    page.set_viewport_size({"width": size["width"], "height": 4 * size["height"]})
    page.mouse.move(800, 600)
    unseen = set(STEMS)
    for _ in range(150):
        unseen -= set(page.evaluate(SEEN))
        if not unseen:
            break
        page.mouse.wheel(0, 200)
        page.wait_for_timeout(200)
    assert unseen == set()
    page.set_viewport_size(size)
    page.mouse.wheel(0, -100_000)
    page.get_by_test_id("template-workflow-demo_image_to_lora").click()
    page.wait_for_function("n => app.graph.nodes.length === n",
                           arg=len(json.loads(text_of("demo_image_to_lora"))["nodes"]))
    assert front.complaints == []


# What nodes have got since 0.3.0, behind what they had: how many widgets, and which sockets.
NEWER = {
    "StyleLoomApplyLoRA": (1, set()),
    "StyleLoomAsymmetricCFGSampler": (2, {"positive_mask", "negative_mask"}),
    "StyleLoomContentSubtract": (0, {"content_pictures", "neutral_pictures"}),
    "StyleLoomEncodeStyleImage": (2, {"mask"}),
    "StyleLoomLoadIPAdapter": (1, set()),
    "StyleLoomStyleBlockInjector": (3, set()),
}


def as_saved_before(workflow: dict) -> dict:
    """The workflow as if its nodes had nothing newer: sockets, and the values of widgets, which a file lists in order."""
    links = {link[0]: link for link in workflow["links"]}
    for node in workflow["nodes"]:
        widgets, sockets = NEWER.get(node["type"], (0, set()))
        assert all(entry["link"] is None for entry in node.get("inputs", []) if entry["name"] in sockets)
        node["inputs"] = [entry for entry in node.get("inputs", []) if entry["name"] not in sockets]
        if widgets:
            node["widgets_values"] = node["widgets_values"][:-widgets]
        for slot, entry in enumerate(node["inputs"]):
            if entry["link"] is not None:
                links[entry["link"]][4] = slot
    return workflow


@pytest.mark.parametrize("stem", ["asymmetric_cfg_compare", "content_subtract_sdxl", "style_and_layout_sdxl"])
def test_a_workflow_saved_before_the_newer_inputs_opens_with_its_values(stem, whole):
    before = as_saved_before(json.loads(text_of(stem)))
    assert any(node["type"] in NEWER for node in before["nodes"])
    whole.open(stem, json.dumps(before))
    exported, meant = whole.export(), api_of(stem)
    assert {node: entry["inputs"] for node, entry in exported.items()} == {
        node: entry["inputs"] for node, entry in meant.items()}
    assert whole.complaints == []
