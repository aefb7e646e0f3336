"""Each node's help page, in the side panel."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"


def test_every_node_has_a_help_page_in_the_side_panel(client, front):
    ours = sorted(name for name, node in client.get("/object_info").items()
                  if node["python_module"] == "custom_nodes.StyleLoom")
    # There are pages that belong to no node as well: test_house.py names them.
    assert set(ours) <= {path.stem for path in DOCS.glob("*.md")}
    ids = front.add(ours)
    for name, node in zip(ours, ids):
        # Without a page of ours the panel shows the description alone, and no file comes.
        with front.page.expect_response(f"**/extensions/StyleLoom/docs/{name}.md") as answer:
            front.look_at(node)
            if node == ids[0]:
                front.page.get_by_test_id("info-button").click()
        assert answer.value.status == 200
        lines = (DOCS / f"{name}.md").read_text("utf-8").splitlines()
        heading = next(line for line in lines if line.startswith("#"))
        level, text = heading.split(" ", 1)
        panel = front.page.locator(".node-help-content")
        panel.locator(f"h{len(level)}", has_text=text).first.wait_for()
