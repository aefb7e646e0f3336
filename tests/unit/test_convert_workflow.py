"""Workflows of IPAdapter Plus become ours: what each setting turns into, in both forms, and what is left as it was.

The files in `workflows_of_ipadapter_plus` are made by hand, each in the editor's form and in that of the API.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys

import pytest
from run_module import ROOT, run

FILES = ROOT / "tests" / "unit" / "workflows_of_ipadapter_plus"
CASES = ("advanced", "composition", "embeds", "tiled", "batch", "fade", "regions", "mad")
INJECT, ENCODE = "StyleLoomStyleBlockInjector", "StyleLoomEncodeStyleImage"


@pytest.fixture(scope="module")
def command():
    run.load_convert()
    return importlib.import_module("styleloom_convert.command")


def read(name):
    return json.loads((FILES / f"{name}.json").read_text(encoding="utf-8"))


def plain(data):
    """Either form as {id: (type, {name: value}, {input: (id, output)})}; widgets of nodes of ours by name."""
    from styleloom_convert.our_nodes import SHAPES

    if "nodes" not in data:
        return {int(key): (entry["class_type"],
                           {k: v for k, v in entry["inputs"].items() if not isinstance(v, list)},
                           {k: (int(v[0]), v[1]) for k, v in entry["inputs"].items() if isinstance(v, list)})
                for key, entry in data.items()}  # fmt: skip
    ends = {link[0]: (link[1], link[2]) for link in data["links"]}
    made = {}
    for node in data["nodes"]:
        links = {one["name"]: ends[one["link"]] for one in node["inputs"] if one["link"] is not None}
        names = [name for name, *_ in SHAPES[node["type"]].widgets] if node["type"] in SHAPES else []
        made[node["id"]] = (node["type"], dict(zip(names, node["widgets_values"])), links)
    return made


def sources(graph, place, seen=()):
    """A connection as what lies behind it, so that graphs are compared whatever their numbers."""
    kind, values, links = graph[place[0]]
    if kind == "Reroute":
        return sources(graph, links[""])
    ours = values if kind.startswith("StyleLoom") or kind in ("CLIPVisionLoader", "ConditioningSetMask") else {}
    return (kind, place[1], tuple(sorted((k, repr(v)) for k, v in ours.items() if k not in links)),
            tuple((name, sources(graph, links[name])) for name in sorted(links)))  # fmt: skip


def whole(data):
    graph = plain(data)
    return sorted(sources(graph, (key, 0)) for key, (kind, *_) in graph.items()
                  if kind in ("SaveImage", "StyleLoomSaveStyleEncoding"))  # fmt: skip


def only(data, kind):
    return [entry for entry in plain(data).values() if entry[0] == kind]


@pytest.mark.parametrize("case", CASES)
def test_both_forms_become_the_same(case, command):
    api, editor = read(f"api_{case}"), read(f"editor_{case}")
    before = copy.deepcopy((api, editor))
    made = [command.convert(data) for data in (api, editor)]
    assert (api, editor) == before, "what is given stays as it was"
    assert whole(made[0][0]) == whole(made[1][0])
    for data, words, left in made:
        assert left == 0 and "no counterpart" not in words
        assert not any("IPAdapter" in kind and not kind.startswith("StyleLoom") for kind, *_ in plain(data).values())


@pytest.mark.parametrize("name", [f"editor_{case}" for case in (*CASES, "faces")])
def test_the_editors_form_is_sound(name, command):
    made = command.convert(read(name))[0]
    nodes = {node["id"]: node for node in made["nodes"]}
    assert len(nodes) == len(made["nodes"]) and made["last_node_id"] == max(nodes)
    numbers = [link[0] for link in made["links"]]
    assert len(set(numbers)) == len(numbers) and made["last_link_id"] >= max(numbers)
    for number, source, out, target, slot, kind in made["links"]:
        assert nodes[target]["inputs"][slot]["link"] == number
        assert number in nodes[source]["outputs"][out]["links"]
        assert kind == nodes[source]["outputs"][out]["type"]
        assert nodes[target]["inputs"][slot]["type"] in (kind, "*", "COMBO")
    linked = [one["link"] for node in made["nodes"] for one in node["inputs"] if one["link"] is not None]
    assert sorted(linked) == sorted(numbers)
    old = {link[0]: link for link in read(name)["links"]}
    same = [link for link in made["links"] if link[0] in old]
    assert all(link[1:5] == old[link[0]][1:5] for link in same), "a number that is kept means the same connection"
    known = {tuple(link[1:5]): link[0] for link in old.values()}
    kept = [link for link in made["links"] if tuple(link[1:5]) in known]
    assert len(kept) > 5 and all(link[0] == known[tuple(link[1:5])] for link in kept), "and keeps its number"


def test_settings(command):
    data = command.convert(read("api_advanced"))[0]
    ((_, values, links),) = only(data, INJECT)
    assert values == {
        "preset": "IPAdapter Plus: style transfer precise", "weight": 0.8, "boost": 0.8, "layout_weight": 1.0,
        "start_percent": 0.1, "end_percent": 0.9, "scaling": "K+V, by width", "fusion": "norm average",
        "block_weights": "", "reference_weights": "", "step_weights": ""}  # fmt: skip
    assert set(links) == {"model", "ipadapter", "style.style0", "negative", "mask"} and links["model"] == (1, 0)
    graph = plain(data)
    assert graph[5][2]["model"][0] in graph and graph[graph[5][2]["model"][0]][0] == INJECT
    ((_, noise, _),) = only(data, "StyleLoomNoiseNegative")
    assert (noise["kind"], noise["strength"], noise["blur"]) == ("shuffle", 0.4, 5)
    ((_, load, _),), ((_, clip, _),) = only(data, "StyleLoomLoadIPAdapter"), only(data, "CLIPVisionLoader")
    assert load["ipadapter_name"] == "ip-adapter-plus_sdxl_vit-h.safetensors" and "ViT-H" in clip["clip_name"]
    old = command.convert(read("api_advanced"), "sd1.5")[0]
    assert only(old, "StyleLoomLoadIPAdapter")[0][1]["ipadapter_name"] == "ip-adapter-plus_sd15.safetensors"


def test_two_pictures(command):
    ((_, values, links),) = only(command.convert(read("api_composition"))[0], INJECT)
    assert values["preset"] == "IPAdapter Plus: strong style and composition" and values["fusion"] == "average"
    assert (values["weight"], values["layout_weight"]) == (1.2, 0.7) and {"style.style0", "layout"} <= set(links)


def test_embeds(command):
    data = command.convert(read("api_embeds"))[0]
    first, second = only(data, INJECT)
    assert first[1]["fusion"] == "subtract" and {"style.style0", "style.style1"} <= set(first[2])
    assert first[1]["preset"] == "IPAdapter Plus: weak input" and "negative" not in first[2], "its own empty picture"
    graph = plain(data)
    encoders = [graph[first[2][f"style.style{i}"][0]] for i in (0, 1)]
    assert [e[1]["weight"] for e in encoders] == [1.5, 0.6] and "mask" in encoders[0][2]
    assert graph[second[2]["style.style0"][0]][1] == {"encoding_name": "fox_00001.ipadpt"}
    assert graph[second[2]["negative"][0]][1]["weight"] == 0.6
    ((_, saved, links),) = only(data, "StyleLoomSaveStyleEncoding")
    assert saved == {"filename_prefix": "IP_embeds"} and links["encoded"] == first[2]["style.style0"]


def test_tiles_and_prepared_pictures(command):
    data = command.convert(read("editor_tiled"))[0]
    graph = plain(data)
    tiled = next(entry for entry in only(data, INJECT) if entry[1]["fusion"] == "one per mask")
    encoder = graph[tiled[2]["style.style0"][0]]
    assert encoder[1]["fit"] == "tiled" and tiled[2]["mask"] == (tiled[2]["style.style0"][0], 1)
    other = next(entry for entry in only(data, INJECT) if entry is not tiled and entry[1]["fusion"] == "concat")
    encoder = graph[other[2]["style.style0"][0]]
    assert other[1]["preset"] == "IPAdapter Plus: ease out" and encoder[1]["position"] == "top"
    assert encoder[2]["image"] == (8, 0), "the picture as it was before it was prepared"


def test_a_list_of_weights(command):
    data = command.convert(read("api_batch"))[0]
    graph = plain(data)
    ((_, values, links),) = only(data, INJECT)
    assert values["fusion"] == "one per picture" and values["weight"] == 1.0
    weights = links["reference_weights"]
    assert graph[weights[0]][1]["timing"] == "ease in-out" and graph[weights[0]][1]["frames"] == 6 and weights[1] == 0
    assert graph[2][2]["batch_size"] == (weights[0], 2)


def test_fading_between_pictures(command):
    data = command.convert(read("editor_fade"))[0]
    graph = plain(data)
    first, second = sorted(only(data, INJECT), key=lambda entry: entry[2]["model"])
    ((weights, _),) = [(key, entry) for key, entry in graph.items() if entry[0] == "StyleLoomStyleWeights"]
    assert graph[weights][1]["method"] == "alternate batches" and graph[weights][2]["image"] == (9, 0)
    for entry, picture, list_ in ((first, 4, 0), (second, 5, 6)):
        assert entry[2]["reference_weights"] == (weights, list_) and entry[1]["fusion"] == "one per picture"
        assert graph[entry[2]["style.style0"][0]][2]["image"] == (weights, picture)
    assert graph[2][2]["batch_size"] == (weights, 2)


def test_regions(command):
    data = command.convert(read("editor_regions"))[0]
    graph = plain(data)
    first, second = sorted(only(data, INJECT), key=lambda entry: -entry[1]["weight"])
    assert second[2]["model"][0] == next(key for key, entry in graph.items() if entry is first or entry == first)
    assert [e[1]["weight"] for e in (first, second)] == [0.7, 0.6] and first[1]["fusion"] == "average"
    assert second[1]["preset"].endswith("strong style transfer") and second[1]["start_percent"] == 0.1
    assert sorted(e[1]["strength"] for e in only(data, "ConditioningSetMask")) == [1.0, 1.5]
    assert graph[graph[17][2]["conditioning_1"][0]][0] == "ConditioningSetMask"


def test_mad_scientist(command):
    entries = only(command.convert(read("api_mad"))[0], INJECT)
    made = [(e[1]["preset"].removeprefix("IPAdapter Plus: "), e[1]["weight"], e[1]["block_weights"]) for e in entries]
    assert made == [("composition precise", 1.0, "0:0, 3:0.8, 6:0.35"), ("custom", 0.5, "6:1.2"),
                    ("style transfer precise", 1.1, "")]  # fmt: skip
    assert entries[2][1]["boost"] == 2.0 and entries[0][1]["scaling"] == "K+mean(V), by width"


def test_faces_stay_as_they_were(command):
    given = read("editor_faces")
    made, words, left = command.convert(given)
    kept = {node["id"]: node for node in made["nodes"]}
    assert left == 3 and kept[14]["type"] == "IPAdapterFaceID" and "insightface" in words
    assert kept[14]["widgets_values"] == [0.8, 2.0, "linear", "concat", 0.0, 1.0, "V only"]
    assert [e[1]["preset"] for e in only(made, INJECT)] == ["IPAdapter Plus: style"]
    ends = {link[0]: tuple(link[1:3]) for link in made["links"]}
    model = next(one for one in kept[14]["inputs"] if one["name"] == "model")
    assert kept[ends[model["link"]][0]]["type"] == INJECT, "what is converted goes into what is not"


def broken(name, **inputs):
    data = read("api_advanced")
    data["14"]["inputs"] |= inputs
    for key in [key for key, value in inputs.items() if value is None]:
        del data["14"]["inputs"][key]
    return data


@pytest.mark.parametrize(("inputs", "words"), [
    ({"ipadapter": None}, "ipadapter is not connected"), ({"image": None}, "a picture is not connected"),
    ({"weight_type": "new type"}, "its weight type 'new type' is not known"),
    ({"combine_embeds": "product"}, "its setting 'product' is not known"),
    ({"ipadapter": ["8", 0]}, "its adapter comes from EmptyImage"),
])  # fmt: skip
def test_what_cannot_be_carried_over_leaves_nothing_behind(inputs, words, command):
    data = broken("api_advanced", **inputs)
    made, said, left = command.convert(data)
    made["14"]["inputs"].pop("image_negative"), data["14"]["inputs"].pop("image_negative")  # the noise is ours
    assert words in said and left >= 1 and made["14"] == data["14"]
    assert not only(made, INJECT) and not only(made, ENCODE) and not only(made, "StyleLoomLoadIPAdapter")


def test_values_that_are_none(command):
    data = read("editor_advanced")
    node = next(node for node in data["nodes"] if node["id"] == 14)
    node["widgets_values"] = [0.6, "linear", "concat", None, 1, "V only"]
    made, said, _ = command.convert(data)
    assert only(made, INJECT)[0][1]["start_percent"] == 0.0 and "start_at is None" in said
    node["widgets_values"] = [0.6, "linear", "concat", 0, 1]  # as older versions of the pack saved it
    assert only(command.convert(data)[0], INJECT)[0][1]["scaling"] == "V"


def test_the_command(tmp_path, capsys):
    given = tmp_path / "mine.json"
    given.write_text((FILES / "api_mad.json").read_text(encoding="utf-8"), encoding="utf-8")
    assert run.main(["convert-workflow", str(given)]) == 0
    made = json.loads((tmp_path / "mine_styleloom.json").read_text(encoding="utf-8"))
    assert len(only(made, INJECT)) == 3 and "Converted:" in capsys.readouterr().out
    assert run.main(["convert-workflow", str(given), "--out", str(tmp_path / "o.json"), "--base", "sd1.5"]) == 0
    for text in ("{", "[]", '{"a": 1}', '{"nodes": 3}'):
        given.write_text(text, encoding="utf-8")
        assert run.main(["convert-workflow", str(given)]) == 1
    assert run.main(["convert-workflow", str(given), "--out", str(given)]) == 1
    assert run.main(["convert-workflow", str(tmp_path / "none.json")]) == 1
    assert "What to do: " in capsys.readouterr().err


def test_a_workflow_without_the_pack_stays(command):
    data = read("api_advanced")
    del data["10"], data["11"], data["14"]
    made, words, left = command.convert(data)
    assert made == data and left == 0 and "nothing was changed" in words
    inner = {"nodes": [], "links": [], "definitions": {"subgraphs": [{"nodes": [{"type": "IPAdapterAdvanced"}]}]}}
    assert "inside a subgraph" in command.convert(inner)[1] and command.convert(inner)[2] == 1


JUNK = (None, 1, -1, "x", [], {}, [1], {"a": 1}, True)


def places_in(value, before=()):
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*before, key)
        yield from places_in(inner, (*before, key))


@pytest.mark.parametrize("name", ["api_advanced", "editor_advanced"])
def test_damaged_files_are_converted_or_refused_in_words(name, command):
    """Everything in a file in turn, left out or another thing."""
    whole_file = read(name)
    unreadable = sys.modules[command.__name__.replace(".command", ".graph")].Unreadable
    refused = 0
    for number, place in enumerate(places_in(whole_file)):
        data = copy.deepcopy(whole_file)
        holder = data
        for key in place[:-1]:
            holder = holder[key]
        if number % 3 == 0:
            del holder[place[-1]]
        else:
            holder[place[-1]] = copy.deepcopy(JUNK[number % len(JUNK)])
        try:
            command.convert(data)
        except unreadable as error:
            refused += 1
            assert "Expected: " in str(error) and "What to do: " in str(error)
    assert refused
