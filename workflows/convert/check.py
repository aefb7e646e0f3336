"""Whether a file has the shape of a workflow: everything that `graph.py` looks at is of the kind that it has to be."""

from __future__ import annotations

from collections.abc import Iterator

_NUMBER = (int, float)
_ID = (int, str)


def faults(data: dict) -> Iterator[str]:
    """What is wrong with a workflow in the editor's form or that of the API, in words."""
    yield from _editor(data) if "nodes" in data else _api(data)


def _api(data: dict) -> Iterator[str]:
    for key, raw in data.items():
        if not isinstance(raw, dict) or not isinstance(raw.get("class_type"), str):
            yield f"entry {key!r} is no node"
        elif not isinstance(raw.get("inputs", {}), dict) or not isinstance(raw.get("_meta", {}), dict):
            yield f"node {key!r} has inputs or a title that cannot be read"
        elif not isinstance(raw.get("_meta", {}).get("title", ""), str):
            yield f"node {key!r} has a title that is no text"


def _editor(data: dict) -> Iterator[str]:
    for place, raw in enumerate(_list(data, "nodes")):
        if not isinstance(raw, dict) or not isinstance(raw.get("id"), _ID) or not isinstance(raw.get("type"), str):
            yield f"entry {place} of nodes is no node"
        elif not _pos(raw.get("pos", (0, 0))):
            yield f"node {raw['id']!r} has no position"
        elif not isinstance(raw.get("mode", 0), int) or not isinstance(raw.get("title"), str | None):
            yield f"node {raw['id']!r} has a mode or a title that cannot be read"
        elif not isinstance(raw.get("widgets_values") or [], (list, dict)):
            yield f"node {raw['id']!r} has values that are no list"
        elif not all(_input(one) for one in _list(raw, "inputs")):
            yield f"node {raw['id']!r} has an input that cannot be read"
        elif not all(_output(one) for one in _list(raw, "outputs")):
            yield f"node {raw['id']!r} has an output that cannot be read"
    if not isinstance(data.get("links") or [], list):
        yield "links is no list"
    for place, link in enumerate(_list(data, "links")):
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
        ends = [link.get(name) for name in names] if isinstance(link, dict) else link
        if link not in (None, []) and not _link(ends):
            yield f"entry {place} of links is no connection"
    for name in ("last_node_id", "last_link_id"):
        if not str(data.get(name) or 0).lstrip("-").isdigit():
            yield f"{name} is no number"
    definitions = data.get("definitions", {})
    for inner in _list(definitions, "subgraphs") if isinstance(definitions, dict) else [None]:
        if not isinstance(inner, dict) or not all(map(_inner_node, _list(inner, "nodes"))):
            yield "definitions has a subgraph that cannot be read"


def _list(holder: dict, name: str) -> list:
    """An entry that may be missing; what is no list is one entry of nothing."""
    found = holder.get(name) or []
    return found if isinstance(found, list) else [None]


def _pos(pos) -> bool:
    both = [pos.get("0"), pos.get("1")] if isinstance(pos, dict) else pos
    return isinstance(both, (list, tuple)) and len(both) >= 2 and all(isinstance(one, _NUMBER) for one in both[:2])


def _link(ends) -> bool:
    """Its number, where from (node, output), where to (node, input)."""
    kinds = int, _ID, int, _ID, int
    return isinstance(ends, list) and len(ends) >= 5 and all(map(isinstance, ends, kinds))


def _inner_node(node) -> bool:
    return isinstance(node, dict) and isinstance(node.get("type"), str | None)


def _input(one) -> bool:
    named = isinstance(one, dict) and isinstance(one.get("name"), str)
    return named and isinstance(one.get("link"), (*_ID, type(None)))


def _output(one) -> bool:
    return isinstance(one, dict)
