"""The command `convert-workflow`: reads a file, converts, writes another one, and says what was done."""

from __future__ import annotations

import json
from pathlib import Path

from . import their_nodes as theirs
from .check import faults
from .graph import Graph, Unreadable
from .rules import Conversion


def convert(data: dict, base: str | None = None) -> tuple[dict, str, int]:
    """(the workflow with StyleLoom's nodes, what was done and what is left in words, how many nodes are left).

    Args:
        data: a workflow in the editor's form or that of the API; it stays as it is.
        base: "sdxl" or "sd1.5"; None: from the workflow.

    Raises:
        Unreadable: no workflow.
    """
    if not isinstance(data, dict) or not data or ("nodes" in data and not isinstance(data["nodes"], list)):
        raise Unreadable(
            "this is no workflow\nExpected: a .json saved by ComfyUI with Save or Export (API)\nWhat to do: save the "
            "workflow again and convert that file."
        )
    if isinstance(data.get("prompt"), dict) and "nodes" not in data:
        data = data["prompt"]  # what is posted to /prompt
    fault = next(faults(data), None)
    if fault is not None:
        raise Unreadable(
            f"{fault}\nExpected: a workflow, saved by ComfyUI with Save or Export (API)\nWhat to do: save the workflow "
            "again and convert that file."
        )
    graph = Graph(data, theirs.NAMES)
    known = {*theirs.WIDGETS, *theirs.NONE}
    inner = sorted({n.get("type") for g in data.get("definitions", {}).get("subgraphs", []) for n in g.get("nodes", [])}
                   & known) if not graph.is_api else []  # fmt: skip
    lines = []
    if not any(node.type in known for node in graph.nodes.values()) and not inner:
        return data, "No node of IPAdapter Plus is in this workflow; nothing was changed.", 0
    why = "as told"
    if base is None:
        base, why = theirs.base_of(*_hints(graph))
    work = Conversion(graph, base)
    work.run()
    work.left += [f"{kind}, inside a subgraph: unpack the subgraph and convert again" for kind in inner]
    if any("preset" in node.values and node.type == "StyleLoomStyleBlockInjector" for node in graph.nodes.values()):
        lines.append(f"Files of adapters are those for {'SDXL' if base == theirs.SDXL else 'SD1.5'}, {why} "
                     "(--base sdxl or --base sd1.5 says otherwise).")  # fmt: skip
    for title, found in (("Converted", work.done), ("To know", work.notes), ("Has no counterpart", work.left)):
        if found:
            lines += [f"{title}:", *(f"  {line}" for line in found)]
    return graph.written(), "\n".join(lines), len(work.left)


def _hints(graph: Graph) -> tuple[list[str], list[int]]:
    names, sizes = [], []
    for node in graph.nodes.values():
        values = list(node.values.values())
        if "Checkpoint" in node.type or "UNETLoader" in node.type or "Kolors" in node.type:
            names += [value for value in values if isinstance(value, str)] + [node.type] * ("Kolors" in node.type)
        if node.type == "EmptyLatentImage":
            sizes += [value for value in values[:2] if isinstance(value, int)]
    return names, sizes


def main(path: Path, out: Path | None, base: str | None) -> str:
    """Converts a file; returns what to say. `out`: by default beside it, with `_styleloom` in its name.

    Raises:
        Unreadable: no file, no JSON, no workflow, or an `out` that is the file itself.
    """
    out = out or path.with_name(f"{path.stem}_styleloom.json")
    if out.resolve() == path.resolve():
        raise Unreadable(f"--out is {path} itself\nExpected: another file\nWhat to do: name another one.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({error.strerror})\nExpected: a workflow (.json)\nWhat to do: look at "
                         "the name.") from error  # fmt: skip
    except ValueError as error:
        raise Unreadable(f"{path} is no JSON ({error})\nExpected: a workflow, saved by ComfyUI with Save or Export "
                         "(API)\nWhat to do: save the workflow again.") from error  # fmt: skip
    try:
        made, words, left = convert(data, base)
    except Unreadable as error:
        raise Unreadable(f"{path}: {error}") from error
    out.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tail = f"Written to {out}." + (f" {left} nodes are as they were and need IPAdapter Plus." if left else "")
    return f"{words}\n{tail}"
