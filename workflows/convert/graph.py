"""A workflow as nodes and connections, read from the form of the editor or that of the API, and written back.

What is not touched stays as it was, position and title included.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from .our_nodes import SHAPES

Place = tuple  # (node id, number of its output)


class Unreadable(ValueError):
    """A file that is no workflow; the text says what was found, expected, and what to do."""


@dataclass
class Node:
    """One node. `values`: widgets by name, of nodes that a table knows; `links`: input name -> where it comes from."""

    id: object
    type: str
    values: dict = field(default_factory=dict)
    links: dict[str, Place] = field(default_factory=dict)
    raw: dict | None = None
    pos: tuple[float, float] = (0.0, 0.0)
    mode: int = 0
    title: str = ""


class Graph:
    """`nodes` by id, in the order of the file."""

    def __init__(self, data: dict, widgets: dict[str, tuple[str, ...]]):
        """`widgets`: node type -> names of its widgets in order, for nodes whose values are wanted."""
        self.data = data
        self.is_api = "nodes" not in data
        self.nodes: dict = {}
        if self.is_api:
            self._read_api()
        else:
            self._read_editor(widgets)

    def _read_api(self) -> None:
        for key, raw in self.data.items():
            node = Node(key, raw["class_type"], raw=raw, title=raw.get("_meta", {}).get("title", ""))
            for name, value in raw.get("inputs", {}).items():
                if _is_link(value, self.data):
                    node.links[name] = (str(value[0]), value[1])
                else:
                    node.values[name] = value
            self.nodes[key] = node

    def _read_editor(self, widgets: dict[str, tuple[str, ...]]) -> None:
        ends = {}
        for link in self.data.get("links") or []:
            if isinstance(link, dict):
                ends[link["id"]] = (link["origin_id"], link["origin_slot"])
            elif link:
                ends[link[0]] = (link[1], link[2])
        for raw in self.data["nodes"]:
            node = Node(raw["id"], raw["type"], raw=raw, mode=raw.get("mode", 0), title=raw.get("title") or "")
            pos = raw.get("pos", (0, 0))
            node.pos = (pos["0"], pos["1"]) if isinstance(pos, dict) else (pos[0], pos[1])
            given = raw.get("widgets_values") or []
            if isinstance(given, dict):
                node.values = dict(given)
            elif raw["type"] in widgets:
                node.values = dict(zip(widgets[raw["type"]], given))
            else:
                node.values = {str(i): value for i, value in enumerate(given)}
            for one in raw.get("inputs") or []:
                if one.get("link") in ends:
                    node.links[one["name"]] = ends[one["link"]]
            self.nodes[node.id] = node

    # --- looking

    def consumers(self, place: Place) -> list[tuple[Node, str]]:
        """(node, input) of everything that an output goes to."""
        return [(node, name) for node in self.nodes.values() for name, p in node.links.items() if p == place]

    def is_used(self, node: Node) -> bool:
        """Whether any output of a node goes anywhere."""
        return any(place[0] == node.id for other in self.nodes.values() for place in other.links.values())

    def origin(self, place: Place | None) -> Place | None:
        """Where a connection begins, through reroutes."""
        seen = set()
        while place is not None and place not in seen:
            seen.add(place)
            node = self.nodes.get(place[0])
            if node is None or node.type != "Reroute" or not node.links:
                return place if node is not None else None
            place = next(iter(node.links.values()))
        return place

    # --- changing

    def add(self, type: str, values: dict, links: dict, near: Node, shift=(0, 0), title: str = "") -> Node:
        """A new node; connections that are None are left out."""
        numbers = [int(key) for key in self.nodes if str(key).lstrip("-").isdigit()]
        number = max([*numbers, 0 if self.is_api else int(self.data.get("last_node_id", 0) or 0)]) + 1
        node = Node(str(number) if self.is_api else number, type, dict(values), mode=near.mode, title=title)
        node.links = {name: place for name, place in links.items() if place is not None}
        node.pos = (near.pos[0] + shift[0], near.pos[1] + shift[1])
        self.nodes[node.id] = node
        return node

    def rewire(self, old: Place, new: Place | None) -> None:
        """Everything that an output went to comes from another one, or from nothing."""
        for node, name in self.consumers(old):
            if new is None:
                del node.links[name]
            else:
                node.links[name] = new

    def remove(self, node: Node) -> None:
        del self.nodes[node.id]

    # --- writing

    def written(self) -> dict:
        """The workflow in the form that it came in."""
        return self._written_api() if self.is_api else self._written_editor()

    def _written_api(self) -> dict:
        made = {}
        for node in self.nodes.values():
            raw = copy.deepcopy(node.raw) if node.raw else {"inputs": {}, "class_type": node.type}
            if node.raw is None:
                raw["inputs"] = dict(node.values)
                raw["_meta"] = {"title": node.title or SHAPES[node.type].title}
            else:
                raw["inputs"] = {k: v for k, v in raw.get("inputs", {}).items() if not _is_link(v, self.data)}
            raw["inputs"] |= {name: [place[0], place[1]] for name, place in node.links.items()}
            made[node.id] = raw
        return made

    def _written_editor(self) -> dict:
        made = copy.deepcopy({key: value for key, value in self.data.items() if key not in ("nodes", "links")})
        raws = {node.id: copy.deepcopy(node.raw) if node.raw else _editor_node(node) for node in self.nodes.values()}
        as_dicts = any(isinstance(link, dict) for link in (self.data.get("links") or []))
        links, goes, known = [], {}, {}
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        for link in self.data.get("links") or []:
            if not link:
                continue
            ends = [link[name] for name in names[:5]] if as_dicts else link
            known[tuple(ends[1:5])] = ends[0]
        last = max([0, int(self.data.get("last_link_id", 0) or 0), *known.values()])
        for order, node in enumerate(self.nodes.values()):
            raw = raws[node.id]
            raw["order"] = order
            for slot, one in enumerate(raw.get("inputs") or []):
                one["link"] = None
                place = node.links.get(one["name"])
                if place is None or place[0] not in raws:
                    continue
                number = known.get((*place, node.id, slot))
                if number is None:
                    last = number = last + 1
                one["link"] = number
                ends = (number, *place, node.id, slot, _kind(raws[place[0]], place[1]))
                links.append(dict(zip(names, ends)) if as_dicts else list(ends))
                goes.setdefault(place, []).append(number)
        for key, raw in raws.items():
            for slot, one in enumerate(raw.get("outputs") or []):
                one["links"] = goes.get((key, slot)) or ([] if one.get("links") is not None else None)
        made |= {"nodes": list(raws.values()), "links": links, "last_link_id": last}
        made["last_node_id"] = max([int(made.get("last_node_id", 0) or 0), *(k for k in raws if isinstance(k, int))])
        return made


def _kind(raw: dict, slot) -> str:
    """The type of an output; "*" where a file has a connection from one that is not there."""
    outputs = raw.get("outputs") or []
    return outputs[slot].get("type", "*") if isinstance(slot, int) and 0 <= slot < len(outputs) else "*"


def _is_link(value, nodes: dict) -> bool:
    return isinstance(value, list) and len(value) == 2 and str(value[0]) in nodes and isinstance(value[1], int)


def _editor_node(node: Node) -> dict:
    """A new node as the editor saves it: sockets, widgets in order, connected widgets as sockets."""
    shape = SHAPES[node.type]
    inputs = []
    for name, kind, optional in shape.sockets:
        if kind == "GROWING":
            count = sum(other.startswith(f"{name}.") for other in node.links)
            grown = [f"{name}.{name}{i}" for i in range(count + 1)]
            inputs += [
                {"label": one.split(".")[1], "name": one, "type": shape.grows, "link": None}
                | ({"shape": 7} if i else {})
                for i, one in enumerate(grown)
            ]
        else:
            inputs.append({"name": name, "type": kind, "link": None} | ({"shape": 7} if optional else {}))
    for name, kind, _ in shape.widgets:
        if name in node.links:
            inputs.append({"name": name, "type": kind, "link": None, "widget": {"name": name}})
    return {
        "id": node.id,
        "type": node.type,
        "pos": list(node.pos),
        "size": [320, 40 + 22 * (len(inputs) + len(shape.widgets))],
        "flags": {},
        "order": 0,
        "mode": node.mode,
        "inputs": inputs,
        "outputs": [{"name": name, "type": kind, "links": []} for name, kind in shape.outputs],
        "properties": {"Node name for S&R": node.type},
        "widgets_values": [node.values.get(name, default) for name, _, default in shape.widgets],
    } | ({"title": node.title} if node.title else {})
