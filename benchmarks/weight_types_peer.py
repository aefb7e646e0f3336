#!/usr/bin/env python3
"""The presets "IPAdapter Plus: ..." against that pack's own code, on a small SD1.5 model.

    python benchmarks/weight_types_peer.py --peer FOLDER

FOLDER is a checkout of cubiq/ComfyUI_IPAdapter_plus; nothing of it is part of StyleLoom. Starts the real ComfyUI in this
process (STYLELOOM_HOST, or .host/ComfyUI) on the CPU in fp32, with the kit's seeded SD1.5 model, image encoder and base
adapter. For every weight type, way of combining and scaling: one call of the UNet with both sides, and how far the two
packs' changes of it are from each other, as a share of the change. Ours once as it is, and once with the middle block left
out, which that pack never reaches. One JSON line each.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import torch
from _host import start
from _pack import ROOT, machine

TYPES = ("linear", "ease in", "ease out", "ease in-out", "reverse in-out", "weak input", "weak output", "weak middle",
         "strong middle", "style transfer", "composition", "strong style transfer", "style and composition",
         "style transfer precise", "composition precise")  # fmt: skip
PRESETS = {"style transfer": "style", "composition": "layout", "style and composition": "style + layout"}
COMBINES = ("concat", "add", "subtract", "average", "norm average")
SCALINGS = {"V only": "V", "K+V": "K+V", "K+V w/ C penalty": "K+V, by width",
            "K+mean(V) w/ C penalty": "K+mean(V), by width"}  # fmt: skip
WEIGHT, WIDTH, CROSS = 0.8, 48, 32


def package(name: str, folder: Path):
    """A folder as a package of another name."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(model, text: torch.Tensor) -> torch.Tensor:
    """One call of the UNet as the sampler makes it: the negative side, then the positive one."""
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    given = {**model.model_options["transformer_options"], "cond_or_uncond": [1, 0]}
    given["wrappers"] = {kind: {key: list(w) for key, w in named.items()} for kind, named in model.wrappers.items()}
    return model.model.apply_model(x, torch.full((2,), 3.0), c_crossattn=text, transformer_options=given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of ComfyUI_IPAdapter_plus")
    options = parser.parse_args()
    torch.set_num_threads(1)
    nodes = start("cpu")
    torch.set_grad_enabled(False)
    package("styleloom_kit", ROOT / "tests" / "kit")
    kit = {name: importlib.import_module(f"styleloom_kit.{name}") for name in
           ("architectures", "vision", "ip_adapter_files")}  # fmt: skip
    theirs = package("peer", options.peer.resolve()).NODE_CLASS_MAPPINGS["IPAdapterAdvanced"]()
    model = kit["architectures"].make("sd1.5", 0)[0]
    vision = kit["vision"].clip_vision_small(0, WIDTH)
    parts = kit["ip_adapter_files"].ip_adapter_tensors("base", "sd1.5", 32, WIDTH, CROSS, seed=3, loud=2.0)
    inject, encode = nodes["StyleLoomStyleBlockInjector"], nodes["StyleLoomEncodeStyleImage"]
    ours = sys.modules[inject.__module__]
    adapter = ours.recognise("small", parts)
    draw = torch.Generator().manual_seed(5)
    image, negative = torch.rand(3, 224, 224, 3, generator=draw), torch.rand(1, 224, 224, 3, generator=draw)
    text = torch.randn(2, 11, CROSS, generator=draw)
    plain, choose = call(model, text), ours.presets.choose
    print(json.dumps({**machine(), "torch": torch.__version__}))
    cases = [(name, "concat", "V only", 1) for name in TYPES]
    cases += [("linear", way, "V only", 3) for way in COMBINES]
    cases += [("linear", "concat", scaling, 1) for scaling in SCALINGS if scaling != "V only"]
    for name, way, scaling, count in cases:
        patched = theirs.apply_ipadapter(
            model, {k: dict(v) for k, v in parts.items()}, weight=WEIGHT, weight_type=name, combine_embeds=way,
            image=image[:count], image_negative=negative, clip_vision=vision, embeds_scaling=scaling)[0]  # fmt: skip
        for replaced in patched.model_options["transformer_options"]["patches_replace"]["attn2"].values():
            for given in replaced.kwargs:  # made in inference mode; the call here is not
                given |= {key: given[key].clone() for key in ("cond", "uncond")}
        due = call(patched, text) - plain
        line = {"weight_type": name, "combine_embeds": way, "embeds_scaling": scaling, "references": count}
        for without in (False, True):
            def chosen(*args, **kwargs):
                found = choose(*args, **kwargs)
                return {layer: what for layer, what in found.items() if not (without and layer[0] == "middle")}

            ours.presets.choose = chosen
            style, other = (encode.execute(vision, pictures, "crop").args[0] for pictures in (image[:count], negative))
            made = inject.execute(
                model=model, ipadapter=adapter, style={"style0": style}, weight=WEIGHT, boost=WEIGHT, negative=other,
                preset="IPAdapter Plus: " + PRESETS.get(name, name), fusion=way,
                scaling=SCALINGS[scaling]).args[0]  # fmt: skip
            change = call(made, text) - plain
            key = "off_without_the_middle" if without else "off"
            line[key] = float(f"{float((due - change).norm() / change.norm()):.2g}")
        ours.presets.choose = choose
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
