"""IPAdapter Plus -> StyleLoom, node by node. What cannot be carried over stays as it is, and is listed."""

from __future__ import annotations

from . import our_nodes as ours
from . import their_nodes as theirs
from .graph import Graph, Node, Place


class Left(Exception):
    """Why a node stays as it is."""


class Conversion:
    """One workflow. `done`, `notes` and `left` are lines for the reader.

    Args:
        graph: read with `their_nodes.NAMES`. base: "sdxl" or "sd1.5", for the files of Unified Loader.
    """

    def __init__(self, graph: Graph, base: str):
        self.graph, self.base = graph, base
        self.done: list[str] = []
        self.notes: list[str] = []
        self.left: list[str] = []
        self._made: dict = {}
        self._dropped: set = set()  # nodes that a converted one has taken over

    def run(self) -> None:
        self._check_values()
        for kind, rule in (
            *((kind, self._noise) for kind in ("IPAdapterNoise",)),
            *((kind, self._apply) for kind in _APPLY),
            ("IPAdapterFromParams", self._params),
            ("IPAdapterTiled", self._tiled),
            *((kind, self._embeds) for kind in ("IPAdapterEmbeds", "IPAdapterEmbedsBatch")),
            ("IPAdapterSaveEmbeds", self._save),
        ):
            for node in [n for n in self.graph.nodes.values() if n.type == kind]:
                before = self._state()
                try:
                    words = rule(node)
                except Left as why:
                    self._restore(before)
                    self._leave(node, str(why))
                else:
                    self.done.append(f"{_name(node)} -> {words}")
        self._clear()
        for node in self.graph.nodes.values():
            if node.type in theirs.NONE:
                self._leave(node, theirs.NONE[node.type])
            elif node.type in theirs.WIDGETS and node.type in _HELPERS:
                self._leave(node, "something that stays needs it, or an output of it has no counterpart")

    def _state(self) -> tuple:
        nodes = [(node, dict(node.links), dict(node.values), node.pos) for node in self.graph.nodes.values()]
        return nodes, dict(self._made), set(self._dropped), list(self.notes)

    def _restore(self, state: tuple) -> None:
        """A node that stays leaves no new ones behind."""
        nodes, self._made, self._dropped, self.notes = state
        self.graph.nodes = {node.id: node for node, *_ in nodes}
        for node, node.links, node.values, node.pos in nodes:
            pass

    # --- words

    def _leave(self, node: Node, why: str) -> None:
        line = f"{_name(node)}: {why}"
        if not any(known.startswith(f"{_name(node)}: ") for known in self.left):
            self.left.append(line)

    def _note(self, words: str) -> None:
        if words not in self.notes:
            self.notes.append(words)

    def _check_values(self) -> None:
        for node in self.graph.nodes.values():
            for name, default in theirs.WIDGETS.get(node.type, ()):
                value = node.values.setdefault(name, default)
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if (isinstance(default, str) and not isinstance(value, str)) or (
                    isinstance(default, (int, float)) and not isinstance(default, bool) and not number
                ):
                    self._note(f"{_name(node)}: {name} is {value!r}, which this setting cannot have; {default!r} was taken")
                    node.values[name] = default

    # --- what a node is connected to

    def _node(self, place: Place | None) -> tuple[Node | None, int]:
        place = self.graph.origin(place)
        return (None, 0) if place is None else (self.graph.nodes[place[0]], place[1])

    def _once(self, key, make) -> Node:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _adapter(self, node: Node) -> tuple[Place, Place]:
        """(adapter, image encoder) for a node with the inputs ipadapter and clip_vision."""
        loader, _ = self._node(node.links.get("ipadapter"))
        if loader is None:
            raise Left("ipadapter is not connected")
        given = node.links.get("clip_vision")
        if loader.type in ("IPAdapterUnifiedLoader", "IPAdapterUnifiedLoaderCommunity"):
            file, encoder = theirs.files_of(loader.values["preset"], self.base)
            if file is None:
                raise Left(f"no file is known for the preset {loader.values['preset']!r} on {self.base}")
            place = self._load(loader, file)
            if given is None:
                made = self._once(
                    ("clip", loader.id), lambda: self.graph.add(ours.CLIP, {"clip_name": encoder}, {}, loader, (0, 110))
                )
                given = (made.id, 0)
            return place, given
        if loader.type == "IPAdapterModelLoader":
            file = loader.values["ipadapter_file"]
            if any(word in file.lower() for word in ("faceid", "portrait", "instantid")):
                raise Left(f"{file}: {theirs.NONE['IPAdapterFaceID']}")
            if given is None:
                raise Left("clip_vision is not connected")
            return self._load(loader, file), given
        raise Left(f"its adapter comes from {_name(loader)}")

    def _load(self, loader: Node, file: str) -> Place:
        made = self._once(
            ("load", loader.id),
            lambda: self.graph.add(ours.LOAD, {"ipadapter_name": file, "siglip_head": "none"}, {}, loader),
        )
        self._dropped.add(loader.id)
        return made.id, 0

    def _encode(self, image: Place | None, clip: Place, near: Node, fit="crop", weight=1.0, mask=None, row=0) -> Node:
        if image is None:
            raise Left("a picture is not connected")
        image, (fit, position) = self._cropped(image, fit)
        if image is None:
            raise Left("a picture is not connected")
        values = {"fit": fit, "position": position, "weight": weight}
        links = {"clip_vision": clip, "image": image, "mask": mask}
        key = ("encode", *values.values(), clip, image, mask, near.mode)
        return self._once(key, lambda: self.graph.add(ours.ENCODE, values, links, near, (-360, 190 * row)))

    def _cropped(self, image: Place | None, fit: str) -> tuple[Place | None, tuple[str, str]]:
        """(picture, (fit, position)): what Prep Image For ClipVision did is done where the picture is used."""
        source, _ = self._node(image)
        if source is None or source.type != "PrepImageForClipVision" or fit != "crop":
            return image, (fit, "middle")
        crop = source.values["crop_position"]
        if source.values["sharpening"]:
            self._note(f"{_name(source)}: sharpening is left out")
        if crop == "pad":
            self._note(f"{_name(source)}: the borders have the encoder's mean colour and are not black")
        self._dropped.add(source.id)
        return source.links.get("image"), theirs.CROPS.get(crop, ("crop", "middle"))

    # --- one injection

    def _inject(self, near: Node, model: Place | None, adapter: Place, styles: list[Place], values: dict, links: dict):
        """A Style Block Injector in the place of `near`."""
        given = {name: default for name, _, default in ours.SHAPES[ours.INJECT].widgets} | values
        sockets = {"model": model, "ipadapter": adapter} | {f"style.style{i}": s for i, s in enumerate(styles)} | links
        if given["preset"] not in theirs.WITHOUT_MIDDLE and not given["block_weights"]:
            self._note(
                "the middle block sees the picture where the weight type means it to; in IPAdapter Plus it never does. "
                "For the same as there: preset custom, with every block but the middle"
            )
        return self.graph.add(ours.INJECT, given, sockets, near, title=near.title)

    def _common(self, node: Node, combine: str | None = None) -> tuple[dict, dict]:
        """Settings that most of their nodes have: (values, links) for ours."""
        v = node.values
        scaling = theirs.SCALINGS.get(v.get("embeds_scaling", "V only"))
        fusion = combine or v.get("combine_embeds", "concat")
        if scaling is None or fusion not in (*theirs.COMBINES, "one per picture", "one per mask"):
            raise Left(f"its setting {v.get('embeds_scaling') if scaling is None else fusion!r} is not known")
        values = {
            "start_percent": v.get("start_at", 0.0),
            "end_percent": v.get("end_at", 1.0),
            "scaling": scaling,
            "fusion": fusion,
        }
        links = {"mask": node.links.get("attn_mask")}
        for name, mine in (("start_at", "start_percent"), ("end_at", "end_percent")):
            if name in node.links:
                links[mine] = node.links[name]
        for name in ("combine_embeds", "weight_type", "embeds_scaling"):
            if name in node.links:
                self._note(f"{_name(node)}: {name} was connected; it is now set to what the widget said")
        return values, links

    def _typed(self, node: Node, name: str, values: dict, links: dict) -> None:
        """weight and weight_type of `node` into `values` and `links`."""
        if name not in theirs.PRESETS:
            raise Left(f"its weight type {name!r} is not known")
        values |= {"preset": theirs.PRESETS[name], "weight": node.values.get("weight", 1.0)}
        values["boost"] = values["weight"]
        source, slot = self._node(node.links.get("weight"))
        if source is not None and source.type == "IPAdapterWeights":
            second = 1 if source.values["method"] == "full batch" else 6  # while fading, what the first leaves
            links["reference_weights"] = (self._weights(source).id, second if slot == 1 else 0)
            values |= {"weight": 1.0, "boost": 1.0}
        elif source is not None:
            links |= {"weight": node.links["weight"], "boost": node.links["weight"]}
        if "precise" not in name:
            values.pop("boost"), links.pop("boost", None)

    def _weights(self, node: Node) -> Node:
        if node.values["method"] not in theirs.METHODS:
            raise Left(f"its weights come from {_name(node)}, whose method {node.values['method']!r} is not known")

        def make() -> Node:
            v = {key: node.values[key] for key in theirs.NAMES["IPAdapterWeights"] if key != "timing"}
            v |= {"timing": theirs.TIMINGS.get(node.values["timing"], "linear"), "seed": 0}
            named = {key: place for key, place in node.links.items() if key in (*v, "image")}
            made = self.graph.add(ours.WEIGHTS, v, named, node)
            for slot, mine in ((2, 2), (3, 4), (4, 5)):
                self.graph.rewire((node.id, slot), (made.id, mine))
            self._dropped.add(node.id)
            return made

        return self._once(("weights", node.id), make)

    def _replace(self, node: Node, last: Node) -> None:
        self.graph.rewire((node.id, 0), (last.id, 0))
        for slot, what in ((1, "its second output"), (2, "its third output")):
            if self.graph.consumers((node.id, slot)):
                self._note(f"{_name(node)}: {what} has no counterpart, and is no longer connected")
                self.graph.rewire((node.id, slot), None)
        self.graph.remove(node)

    def _negative(self, node: Node, clip: Place) -> Place | None:
        if node.links.get("image_negative") is None:
            return None
        return self._encode(node.links["image_negative"], clip, node, row=2).id, 0

    # --- rules

    def _noise(self, node: Node) -> str:
        v = {"kind": node.values["type"], "strength": node.values["strength"], "blur": node.values["blur"], "seed": 0}
        image, (_, v["position"]) = self._cropped(node.links.get("image_optional"), "crop")
        links = {"image": image}
        links |= {key: place for key, place in node.links.items() if key in v}
        made = self.graph.add(ours.NOISE, v, links, node, title=node.title)
        self._note("Noise Negative draws its noise from its seed: the noise is of the same kind, not the same")
        self._replace(node, made)
        return "Noise Negative"

    def _apply(self, node: Node) -> str:
        adapter, clip = self._adapter(node)
        weights, _ = self._node(node.links.get("weight"))
        if weights is not None and weights.type == "IPAdapterWeights":
            self._weights(weights)  # its pictures come from ours from here on
        each = "one per picture" if node.type.endswith("Batch") else None
        values, links = self._common(node, each)
        v, kind = node.values, node.type.removesuffix("Batch")
        if kind == "IPAdapterStyleComposition":
            image, layout = node.links.get("image_style"), node.links.get("image_composition")
            expand = v["expand_style"]
            values |= {
                "preset": theirs.PRESETS["strong style and composition" if expand else "style and composition"],
                "weight": v["weight_style"],
                "layout_weight": v["weight_composition"],
            }
            for theirs_name, mine in (("weight_style", "weight"), ("weight_composition", "layout_weight")):
                if theirs_name in node.links:
                    links[mine] = node.links[theirs_name]
            if layout is not None:
                links["layout"] = (self._encode(layout, clip, node, row=1).id, 0)
        else:
            image = node.links.get("image")
            name = v.get("weight_type", "linear")
            if kind == "IPAdapter":
                name = theirs.SIMPLE.get(name, name)
            boosts = {
                "IPAdapterPreciseStyleTransfer": ("style transfer precise", "style_boost"),
                "IPAdapterPreciseComposition": ("composition precise", "composition_boost"),
            }
            boost = None
            if kind in boosts:
                name, boost = boosts[kind]
            self._typed(node, name, values, links)
            if boost:
                values["boost"] = v[boost]
                links.pop("boost", None)
                if boost in node.links:
                    links["boost"] = node.links[boost]
            if kind == "IPAdapterMS" and v["layer_weights"].strip():
                values["block_weights"] = v["layer_weights"]
                if "precise" not in name:
                    values["preset"] = "custom"
            if kind == "IPAdapterClipVisionEnhancer":
                self._note(f"{_name(node)}: the picture is encoded as a whole; enhance_tiles has no counterpart")
        style = self._encode(image, clip, node)
        links["negative"] = self._negative(node, clip)
        made = self._inject(node, node.links.get("model"), adapter, [(style.id, 0)], values, links)
        self._replace(node, made)
        return f"Style Block Injector, {values['preset']}"

    def _tiled(self, node: Node) -> str:
        adapter, clip = self._adapter(node)
        values, links = self._common(node, "one per mask")
        self._typed(node, node.values["weight_type"], values, links)
        style = self._encode(node.links.get("image"), clip, node, fit="tiled")
        if links["mask"] is not None:
            self._note(f"{_name(node)}: attn_mask is left out; each tile acts in its own place of the whole picture")
        if node.values["sharpening"]:
            self._note(f"{_name(node)}: sharpening is left out")
        links |= {"mask": (style.id, 1), "negative": self._negative(node, clip)}
        made = self._inject(node, node.links.get("model"), adapter, [(style.id, 0)], values, links)
        self._replace(node, made)
        return "Encode Style Image (tiled) and Style Block Injector (one per mask)"

    def _params(self, node: Node) -> str:
        adapter, clip = self._adapter(node)
        regions, model, last = self._regions(node.links.get("ipadapter_params")), node.links.get("model"), None
        negative = self._negative(node, clip)
        for row, region in enumerate(regions):
            if region.links.get("image") is None:
                continue
            values, links = self._common(node)
            v = region.values
            self._typed(region, v["weight_type"], values, links)
            values |= {"weight": v["image_weight"], "start_percent": v["start_at"], "end_percent": v["end_at"]}
            if "boost" in values:
                values["boost"] = v["image_weight"]
            for name, mine in (("image_weight", "weight"), ("start_at", "start_percent"), ("end_at", "end_percent")):
                if name in region.links:
                    links[mine] = region.links[name]
            style = self._encode(region.links["image"], clip, region)
            links |= {"mask": region.links.get("mask"), "negative": negative}
            last = self._inject(node, model, adapter, [(style.id, 0)], values, links)
            last.pos = (last.pos[0] + 360 * row, last.pos[1])
            model = (last.id, 0)
        if last is None:
            raise Left("no region has a picture")
        self._replace(node, last)
        return f"{len(regions)} Style Block Injectors, one after the other"

    def _regions(self, place: Place | None) -> list[Node]:
        node, _ = self._node(place)
        if node is None:
            return []
        if node.type == "IPAdapterCombineParams":
            found = [self._regions(node.links.get(f"params_{i}")) for i in range(1, 6)]
            self._dropped.add(node.id)
            return [region for part in found for region in part]
        if node.type != "IPAdapterRegionalConditioning":
            raise Left(f"its regions come from {_name(node)}")
        self._dropped.add(node.id)
        return [node]

    def _embeds(self, node: Node) -> str:
        adapter, _ = self._adapter_only(node)
        each = "one per picture" if node.type.endswith("Batch") else None
        styles, fusion = self._encoded(node.links.get("pos_embed"), node)
        if not styles:
            raise Left("pos_embed is an empty picture's encoding")
        if each and len(styles) > 1 and fusion != "concat":
            raise Left("references that are combined, and one per picture")
        values, links = self._common(node, each or fusion)
        self._typed(node, node.values["weight_type"], values, links)
        negative, _ = self._encoded(node.links.get("neg_embed"), node) if "neg_embed" in node.links else ([], "")
        if len(negative) > 1:
            self._note(f"{_name(node)}: only the first of {len(negative)} negative encodings is kept")
        links["negative"] = negative[0] if negative else None
        made = self._inject(node, node.links.get("model"), adapter, styles, values, links)
        self._replace(node, made)
        return f"Style Block Injector, {values['preset']}, {values['fusion']}"

    def _adapter_only(self, node: Node) -> tuple[Place, Place | None]:
        """As `_adapter`, where no image encoder is needed."""
        loader, _ = self._node(node.links.get("ipadapter"))
        if loader is not None and loader.type == "IPAdapterModelLoader" and "clip_vision" not in node.links:
            return self._load(loader, loader.values["ipadapter_file"]), None
        return self._adapter(node)

    def _encoded(self, place: Place | None, near: Node) -> tuple[list[Place], str]:
        """(encodings of ours, how they are combined) of EMBEDS; no encoding for that of an empty picture."""
        node, slot = self._node(place)
        if node is None:
            raise Left("embeds are not connected")
        if node.type == "IPAdapterEncoder":
            if slot == 1:
                self._dropped.add(node.id)
                return [], "concat"
            _, clip = self._adapter(node)
            weight = node.values["weight"]
            mask = node.links.get("mask")
            made = self._encode(node.links.get("image"), clip, node, weight=weight, mask=mask, row=0)
            made.pos = node.pos
            if "weight" in node.links:
                made.links["weight"] = node.links["weight"]
            self._dropped.add(node.id)
            return [(made.id, 0)], "concat"
        if node.type == "IPAdapterLoadEmbeds":
            name = node.values["embeds"].replace("\\", "/").split("/")[-1].split(" [")[0]
            self._note(f"{name}: put this file into models/style_encodings")
            made = self._once(("open", node.id), lambda: self.graph.add(ours.OPEN, {"encoding_name": name}, {}, node))
            self._dropped.add(node.id)
            return [(made.id, 0)], "concat"
        if node.type == "IPAdapterCombineEmbeds":
            found, method = [], node.values["method"]
            for i in range(1, 6):
                if node.links.get(f"embed{i}") is not None:
                    part, inner = self._encoded(node.links[f"embed{i}"], near)
                    if inner != "concat" or not part:
                        raise Left(f"{_name(node)} combines what is combined already, or an empty picture")
                    found += part
            self._dropped.add(node.id)
            return found, method
        raise Left(f"its embeds come from {_name(node)}")

    def _save(self, node: Node) -> str:
        encoded, fusion = self._encoded(node.links.get("embeds"), node)
        if len(encoded) != 1:
            raise Left("what it saves is combined, or the encoding of an empty picture")
        prefix = node.values["filename_prefix"]
        self.graph.add(ours.SAVE, {"filename_prefix": prefix}, {"encoded": encoded[0]}, node, title=node.title)
        self.graph.remove(node)
        return "Save Style Encoding"

    # --- what is over

    def _clear(self) -> None:
        """Their helper nodes, once nothing that stays needs them."""
        self._release_regions()
        changed = True
        while changed:
            changed = False
            for node in [n for n in self.graph.nodes.values() if n.id in self._dropped or self._leads_nowhere(n)]:
                if node.type == "IPAdapterUnifiedLoader" or node.type == "IPAdapterUnifiedLoaderCommunity":
                    if not self.graph.consumers((node.id, 1)):
                        self.graph.rewire((node.id, 0), node.links.get("model"))
                if not self.graph.is_used(node):
                    self.graph.remove(node)
                    changed = True

    def _leads_nowhere(self, node: Node) -> bool:
        """A reroute that is not used any more, from something that is dropped."""
        if node.type != "Reroute" or self.graph.is_used(node):
            return False
        source, _ = self._node(next(iter(node.links.values()), None))
        return source is not None and source.id in self._dropped

    def _release_regions(self) -> None:
        """The conditionings of Regional Conditioning through the host's own Set Mask."""
        for node in [n for n in self.graph.nodes.values() if n.type == "IPAdapterRegionalConditioning"]:
            if node.id not in self._dropped:
                continue
            for slot, name in ((1, "positive"), (2, "negative")):
                source, mask = node.links.get(name), node.links.get("mask")
                if not self.graph.consumers((node.id, slot)):
                    continue
                if source is not None and mask is not None:
                    values = {"strength": node.values["prompt_weight"], "set_cond_area": "default"}
                    links = {"conditioning": source, "mask": mask}
                    source = (self.graph.add(ours.SET_MASK, values, links, node, (0, 120 * slot)).id, 0)
                self.graph.rewire((node.id, slot), source)


_APPLY = (
    *("IPAdapter", "IPAdapterAdvanced", "IPAdapterBatch", "IPAdapterStyleComposition"),
    *("IPAdapterStyleCompositionBatch", "IPAdapterMS", "IPAdapterClipVisionEnhancer"),
    *("IPAdapterClipVisionEnhancerBatch", "IPAdapterPreciseStyleTransfer", "IPAdapterPreciseStyleTransferBatch"),
    *("IPAdapterPreciseComposition", "IPAdapterPreciseCompositionBatch"),
)
_HELPERS = (
    *("IPAdapterUnifiedLoader", "IPAdapterUnifiedLoaderCommunity", "IPAdapterModelLoader", "IPAdapterEncoder"),
    *("IPAdapterCombineEmbeds", "IPAdapterLoadEmbeds", "IPAdapterWeights", "PrepImageForClipVision"),
    *("IPAdapterRegionalConditioning", "IPAdapterCombineParams"),
)


def _name(node: Node) -> str:
    return f"{node.type} (node {node.id})"
