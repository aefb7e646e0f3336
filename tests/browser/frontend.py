"""ComfyUI's own frontend in a headless Chromium, for tests: open a workflow, look at it, run it, listen to complaints.

What counts as a complaint of ours. The host's frontend always has some errors of its own in the console (files of the
user that are not there yet; requests that a host without API nodes forbids). So until a workflow is opened, only what
names this pack counts; from then on everything does, except what the same page had said before it, and forbidden
requests to the outside (`Content Security Policy`: the host runs with --disable-api-nodes).
"""

from __future__ import annotations

import json
import re

# Names the pack or a file of it.
OURS = re.compile(r"style-?loom|i2l|/custom_nodes/", re.IGNORECASE)
FORBIDDEN = re.compile(r"Content Security Policy")
# Files of a user's folder that a fresh one does not have.
USERS = re.compile(r"/userdata[/?]|/user\.css")
READY = ("!!(window.app && app.graph && app.graph.nodes.length && window.LiteGraph "
         "&& LiteGraph.registered_node_types[%s])")
# Quiet, and the same in every test.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.RightSidePanel.IsOpen": False,
            "Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"}


# Milliseconds. Only for what never comes: no verdict may hang on how busy the machine is.
TIMEOUT = 120_000


class Frontend:
    """One page. `page` is Playwright's; `complaints` what was wrong so far, as lines."""

    def __init__(self, page, url: str):
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.opened = False
        self._clicks = self._opens = 0
        self._before: set[str] = set()
        page.set_default_timeout(TIMEOUT)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))

    def _console(self, message) -> None:
        if message.type not in ("error", "warning"):
            return
        line = f"{message.type}: {message.text} ({message.location.get('url', '')})"
        if FORBIDDEN.search(line) or USERS.search(line):
            return
        if self.opened:
            if line not in self._before and (message.type == "error" or OURS.search(line)):
                self.complaints.append(line)
        elif OURS.search(line):
            self.complaints.append(line)
        else:
            self._before.add(line)

    def load(self, node: str = "StyleLoomImageToLoRA") -> Frontend:
        """Opens the page and waits until it knows this node and shows its first graph."""
        self.page.goto(self.url)
        self.page.wait_for_function(READY % json.dumps(node))
        self.page.wait_for_load_state("networkidle")  # it still asks the host this and that
        return self

    def cleared(self) -> Frontend:
        """An empty graph in a tab of its own, and no complaints: for the next test on the same page."""
        self.set("Comfy.VueNodes.Enabled", SETTINGS["Comfy.VueNodes.Enabled"])
        self.page.keyboard.press("Escape")  # whatever dialog is open
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        self.page.wait_for_function("() => app.graph.nodes.length === 0")
        self.complaints.clear()
        return self

    def set(self, setting: str, value) -> None:
        """Changes one of the user's settings while the page is open."""
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value])

    def open(self, name: str, text: str) -> None:
        """Opens a workflow as if its file had been dropped on the canvas; waits until all of its nodes are there."""
        self.opened = True
        self._opens += 1
        name = f"{name}_{self._opens}"  # of two tabs of one name the frontend would rename the second
        self.page.evaluate("([name, text]) => app.handleFile(new File([text], name, {type: 'application/json'}))",
                           [f"{name}.json", text])
        self.page.wait_for_function(
            "([name, count]) => app.graph.nodes.length === count "
            "&& app.extensionManager.workflow.activeWorkflow?.path?.endsWith(name + '.json')",
            arg=[name, len(json.loads(text)["nodes"])])

    def add(self, types: list[str]) -> list[str]:
        """Puts new nodes of these types on the open graph, far apart; returns their ids."""
        return self.page.evaluate("""types => types.map((type, i) => {
            const n = LiteGraph.createNode(type); n.pos = [i * 3000, 5000]; app.graph.add(n); return String(n.id) })""", types)

    def graph(self) -> dict:
        """The open graph as the frontend would save it."""
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def export(self) -> dict:
        """The open graph in API form, as the frontend would queue it."""
        return json.loads(self.page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))

    def nodes(self) -> list[dict]:
        """Each node of the open graph: id, title, box, smallest size, whether the frontend marks an error on it."""
        return self.page.evaluate("""() => app.graph.nodes.map(n => ({
            id: String(n.id), type: n.type, title: n.title, known: !!LiteGraph.registered_node_types[n.type],
            wrong: !!n.has_errors, left: n.pos[0], top: n.pos[1] - LiteGraph.NODE_TITLE_HEIGHT,
            right: n.pos[0] + n.size[0], bottom: n.pos[1] + n.size[1],
            least: Array.from(n.computeSize()), size: Array.from(n.size)}))""")

    def look_at(self, node_id: str | int, scale: float = 1.0) -> None:
        """Moves the canvas so that a node is near its top left corner, and selects it by a click on its title."""
        left, top = self.page.evaluate("""([id, scale]) => {
            const n = app.graph.getNodeById(id), ds = app.canvas.ds; ds.scale = scale;
            ds.offset[0] = 300 / scale - n.pos[0]; ds.offset[1] = 250 / scale - n.pos[1];
            app.canvas.setDirty(true, true);
            const box = app.canvas.canvas.getBoundingClientRect(); return [box.left, box.top] }""",
                                       [int(node_id), scale])
        for _ in range(20):  # a click before the next frame is drawn still meets what was there
            self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            # Two within 18 pixels and 300 ms would be a double click, which begins to rename a node.
            self._clicks = (self._clicks + 1) % 3
            self.page.mouse.click(left + 300 + (30 + 40 * self._clicks) * scale, top + 250 - 15 * scale)
            if self.page.evaluate("id => app.canvas.selectedItems.has(app.graph.getNodeById(id))", int(node_id)):
                return
            self.page.wait_for_timeout(350)
        raise AssertionError(f"node {node_id} could not be selected by a click")

    def run(self) -> None:
        """Clicks Run."""
        self.page.get_by_test_id("queue-button").click()
