"""The demo, run by a click and shown, in both of the frontend's renderers.

One demo is enough here: test_workflows.py proves that the frontend sends every workflow as its API form says, and
tests/server runs the API forms. What is left is the click, and the pictures on the canvas.
"""

from __future__ import annotations

import io
import time

import pytest
from PIL import Image
from workflow_files import api_of, quick_text_of


NAME = "demo_image_to_lora"


@pytest.mark.parametrize("renderer", ["canvas", "vue"])
def test_the_demo_runs_at_a_click_and_shows_its_pictures(client, front, renderer):
    before = set(client.get("/history"))
    saves = {node for node, entry in api_of(NAME).items() if entry["class_type"] == "SaveImage"}
    front.set("Comfy.VueNodes.Enabled", renderer == "vue")
    front.open(NAME, quick_text_of(NAME))
    front.run()
    end = time.monotonic() + 300
    while not (new := set(client.get("/history")) - before):
        assert time.monotonic() < end, f"nothing came of the click: {client.get('/queue')}"
        time.sleep(0.3)
    (record,) = (client.history(prompt_id) for prompt_id in new)
    assert record["status"]["status_str"] == "success", record["status"]
    for node in saves:
        (image,) = record["outputs"][node]["images"]
        content = client.view(image["filename"], image["subfolder"], image["type"])
        size = list(Image.open(io.BytesIO(content)).size)
        front.look_at(node, 0.6)
        drawn = front.page.locator(f'[data-node-id="{node}"]')
        if renderer == "vue":
            picture = drawn.locator(f'img[src*="{image["filename"]}"]').first
            picture.wait_for()
            shown = "img => [img.naturalWidth, img.naturalHeight]"
            front.page.wait_for_function(f"img => ({shown})(img)[0] > 0", arg=picture.element_handle())
            assert picture.evaluate(shown) == size
        else:
            front.page.wait_for_function("id => app.graph.getNodeById(id).imgs?.[0]?.naturalWidth > 0", arg=int(node))
            assert front.page.evaluate("id => { const i = app.graph.getNodeById(id).imgs[0]; "
                                       "return [i.naturalWidth, i.naturalHeight] }", int(node)) == size
            assert drawn.count() == 0, "on the canvas a node is no element of the page"
    assert front.complaints == []
