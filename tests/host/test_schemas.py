"""What the nodes promise: ids, inputs and outputs that are public, words for each of them, and a cheap, clear start.

`locales/en` is made from the schemas. After a change of words in a node, write it anew:

    STYLELOOM_UPDATE_LOCALES=1 python run.py test tests/host/test_schemas.py -k locales
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales" / "en"
HELP = ROOT / "web" / "docs"

# The public API. Once released, an entry is never changed; nodes and advanced inputs may be added.
# id: (display name, inputs in order (name, type, required), outputs (name, type))
REQUIRED, OPTIONAL = True, False
LORAS = "LORA_MODEL,STYLELOOM_LORA_STACK"
API = {
    "StyleLoomLoadPredictor": (
        "Load i2L Predictor",
        [("predictor_name", "COMBO", REQUIRED)],
        [("predictor", "I2L_PREDICTOR")],
    ),
    "StyleLoomLoadImageEncoders": (
        "Load i2L Image Encoders",
        [("siglip_name", "COMBO", REQUIRED), ("dino_name", "COMBO", REQUIRED), ("precision", "COMBO", REQUIRED)],
        [("encoders", "I2L_ENCODERS")],
    ),
    "StyleLoomEncodeReferences": (
        "Encode References",
        [("encoders", "I2L_ENCODERS", REQUIRED), ("images", "COMFY_AUTOGROW_V3", REQUIRED), ("clip", "CLIP", OPTIONAL)],
        [("references", "I2L_REFERENCES")],
    ),
    "StyleLoomSaveReferences": (
        "Save References",
        [("references", "I2L_REFERENCES", REQUIRED), ("filename_prefix", "STRING", REQUIRED)],
        [],
    ),
    "StyleLoomLoadReferences": (
        "Load References",
        [("references_name", "COMBO", REQUIRED)],
        [("references", "I2L_REFERENCES")],
    ),
    "StyleLoomGrayReferences": (
        "Gray References",
        [("images", "IMAGE", REQUIRED)],
        [("images", "IMAGE")],
    ),
    "StyleLoomImageToLoRA": (
        "Image-to-LoRA Predictor",
        [("predictor", "I2L_PREDICTOR", REQUIRED), ("references", "I2L_REFERENCES", REQUIRED),
         ("strength", "FLOAT", REQUIRED), ("predictor_fine", "I2L_PREDICTOR", OPTIONAL),
         ("image_weights", "STRING", OPTIONAL), ("max_rank", "INT", OPTIONAL)],
        [("lora", "LORA_MODEL"), ("report", "STRING")],
    ),
    "StyleLoomLoadLoRA": (
        "Load LoRA File",
        [("lora_name", "COMBO", REQUIRED)],
        [("lora", "LORA_MODEL"), ("trigger_words", "STRING"), ("base_model", "STRING"), ("report", "STRING")],
    ),
    "StyleLoomSaveLoRA": (
        "Save LoRA File",
        [("lora", "LORA_MODEL", REQUIRED), ("filename_prefix", "STRING", REQUIRED), ("precision", "COMBO", REQUIRED)],
        [("saved path", "STRING")],
    ),
    "StyleLoomApplyLoRA": (
        "Apply LoRA",
        [("model", "MODEL", REQUIRED), ("lora", "LORA_MODEL", REQUIRED), ("strength", "FLOAT", REQUIRED)],
        [("model", "MODEL"), ("clip", "CLIP"), ("report", "STRING")],
    ),
    "StyleLoomLoRAStack": (
        "LoRA Stack",
        [("lora", "LORA_MODEL", OPTIONAL), ("strength", "FLOAT", REQUIRED), ("stack", "STYLELOOM_LORA_STACK", OPTIONAL),
         ("lora_stack", "LORA_STACK", OPTIONAL), ("hooks", "HOOKS", OPTIONAL), ("mask", "MASK", OPTIONAL)],
        [("stack", "STYLELOOM_LORA_STACK"), ("lora_stack", "LORA_STACK"), ("report", "STRING")],
    ),
    "StyleLoomAsymmetricCFGGuider": (
        "Asymmetric CFG Guider",
        [("model", "MODEL", REQUIRED), ("positive", "CONDITIONING", REQUIRED), ("negative", "CONDITIONING", OPTIONAL),
         ("positive_lora", LORAS, OPTIONAL), ("negative_lora", LORAS, OPTIONAL), ("cfg", "FLOAT", REQUIRED),
         ("positive_strength", "FLOAT", OPTIONAL), ("negative_strength", "FLOAT", OPTIONAL),
         ("preset", "COMBO", OPTIONAL)],
        [("guider", "GUIDER"), ("report", "STRING")],
    ),
    "StyleLoomAsymmetricCFGSampler": (
        "Asymmetric CFG Sampler",
        [("model", "MODEL", REQUIRED), ("positive", "CONDITIONING", REQUIRED), ("negative", "CONDITIONING", OPTIONAL),
         ("latent_image", "LATENT", REQUIRED), ("positive_lora", LORAS, OPTIONAL), ("negative_lora", LORAS, OPTIONAL),
         ("seed", "INT", REQUIRED), ("steps", "INT", REQUIRED), ("cfg", "FLOAT", REQUIRED),
         ("sampler_name", "COMBO", REQUIRED), ("scheduler", "COMBO", REQUIRED), ("denoise", "FLOAT", REQUIRED),
         ("positive_strength", "FLOAT", OPTIONAL), ("negative_strength", "FLOAT", OPTIONAL),
         ("preset", "COMBO", OPTIONAL)],
        [("latent", "LATENT"), ("report", "STRING"), ("schedule", "IMAGE")],
    ),
    "StyleLoomLoadIPAdapter": (
        "Load IP-Adapter",
        [("ipadapter_name", "COMBO", REQUIRED)],
        [("ipadapter", "STYLELOOM_IPADAPTER")],
    ),
    "StyleLoomEncodeStyleImage": (
        "Encode Style Image",
        [("clip_vision", "CLIP_VISION", REQUIRED), ("image", "IMAGE", REQUIRED), ("fit", "COMBO", REQUIRED)],
        [("encoded", "CLIP_VISION_OUTPUT"), ("masks", "MASK")],
    ),
    "StyleLoomStyleBlockInjector": (
        "Style Block Injector",
        [("model", "MODEL", REQUIRED), ("ipadapter", "STYLELOOM_IPADAPTER", REQUIRED),
         ("style", "COMFY_AUTOGROW_V3", REQUIRED), ("preset", "COMBO", REQUIRED), ("weight", "FLOAT", REQUIRED),
         ("layout_weight", "FLOAT", OPTIONAL), ("layout", "CLIP_VISION_OUTPUT", OPTIONAL),
         ("negative", "CLIP_VISION_OUTPUT", OPTIONAL), ("mask", "MASK", OPTIONAL),
         ("start_percent", "FLOAT", OPTIONAL), ("end_percent", "FLOAT", OPTIONAL), ("scaling", "COMBO", OPTIONAL),
         ("fusion", "COMBO", OPTIONAL), ("block_weights", "STRING", OPTIONAL)],
        [("model", "MODEL"), ("report", "STRING")],
    ),
    "StyleLoomReduxBlocks": (
        "Redux by Blocks",
        [("model", "MODEL", REQUIRED), ("conditioning", "CONDITIONING", REQUIRED),
         ("style_model", "STYLE_MODEL", REQUIRED), ("clip_vision_output", "CLIP_VISION_OUTPUT", REQUIRED),
         ("strength", "FLOAT", REQUIRED), ("preset", "COMBO", REQUIRED), ("block_weights", "STRING", OPTIONAL)],
        [("model", "MODEL"), ("conditioning", "CONDITIONING"), ("report", "STRING")],
    ),
    "StyleLoomStyleWeights": (
        "Style Weights",
        [("weights", "STRING", REQUIRED), ("timing", "COMBO", REQUIRED), ("frames", "INT", REQUIRED)],
        [("weights", "STRING"), ("reversed", "STRING"), ("count", "INT"), ("curve", "IMAGE"), ("image_1", "IMAGE"),
         ("image_2", "IMAGE"), ("weights_2", "STRING")],
    ),
    "StyleLoomNoiseNegative": (
        "Noise Negative",
        [("kind", "COMBO", REQUIRED), ("strength", "FLOAT", REQUIRED), ("blur", "INT", REQUIRED),
         ("seed", "INT", REQUIRED), ("image", "IMAGE", OPTIONAL)],
        [("image", "IMAGE")],
    ),
    "StyleLoomSaveStyleEncoding": (
        "Save Style Encoding",
        [("encoded", "CLIP_VISION_OUTPUT", REQUIRED), ("filename_prefix", "STRING", REQUIRED)],
        [],
    ),
    "StyleLoomLoadStyleEncoding": (
        "Load Style Encoding",
        [("encoding_name", "COMBO", REQUIRED)],
        [("encoded", "CLIP_VISION_OUTPUT")],
    ),
    "StyleLoomContentSubtract": (
        "Content Subtract",
        [("style", "CLIP_VISION_OUTPUT", REQUIRED), ("clip", "CLIP", OPTIONAL), ("content", "STRING", REQUIRED),
         ("method", "COMBO", REQUIRED), ("strength", "FLOAT", REQUIRED), ("protect", "STRING", OPTIONAL),
         ("gap_correction", "BOOLEAN", OPTIONAL), ("one_sided", "BOOLEAN", OPTIONAL),
         ("renormalise", "BOOLEAN", OPTIONAL)],
        [("style", "CLIP_VISION_OUTPUT"), ("report", "STRING")],
    ),
    "StyleLoomLoRABlockFilter": (
        "LoRA Block Filter",
        [("lora", "LORA_MODEL", REQUIRED), ("preset", "COMBO", REQUIRED), ("inside", "FLOAT", REQUIRED),
         ("outside", "FLOAT", REQUIRED), ("patterns", "STRING", OPTIONAL)],
        [("lora", "LORA_MODEL"), ("report", "STRING")],
    ),
    "StyleLoomZipRankMerge": (
        "ZipRank Merge",
        [("content_lora", "LORA_MODEL", REQUIRED), ("style_lora", "LORA_MODEL", REQUIRED), ("mode", "COMBO", REQUIRED),
         ("separation", "FLOAT", REQUIRED), ("content_strength", "FLOAT", REQUIRED),
         ("style_strength", "FLOAT", REQUIRED), ("prior", "COMBO", REQUIRED), ("max_rank", "INT", REQUIRED),
         ("model", "MODEL", OPTIONAL), ("clip", "CLIP", OPTIONAL), ("content_prompt", "STRING", OPTIONAL),
         ("style_prompt", "STRING", OPTIONAL), ("steps", "INT", OPTIONAL), ("learning_rate", "FLOAT", OPTIONAL),
         ("content_latents", "LATENT", OPTIONAL), ("style_latents", "LATENT", OPTIONAL),
         ("cycle_weight", "FLOAT", OPTIONAL), ("seed", "INT", OPTIONAL)],
        [("lora", "LORA_MODEL"), ("report", "STRING"), ("masks", "IMAGE")],
    ),
    "StyleLoomMergeLoRAs": (
        "Merge LoRAs",
        [("loras", "COMFY_AUTOGROW_V3", REQUIRED), ("strengths", "STRING", REQUIRED), ("method", "COMBO", REQUIRED),
         ("max_rank", "INT", REQUIRED), ("energy", "FLOAT", REQUIRED), ("seed", "INT", REQUIRED),
         ("model", "MODEL", OPTIONAL), ("clip", "CLIP", OPTIONAL)],
        [("lora", "LORA_MODEL"), ("report", "STRING"), ("masks", "IMAGE")],
    ),
}


@pytest.fixture(scope="module")
def schemas(pack):
    async def listed():
        extension = await pack.comfy_entrypoint()
        return [node.GET_SCHEMA() for node in await extension.get_node_list()]

    return {schema.node_id: schema for schema in asyncio.run(listed())}


each_node = pytest.mark.parametrize("node_id", API)


def all_inputs(schema):
    """Every input that can get a socket or a widget, by the name that the frontend and the API use."""
    for given in schema.inputs:
        yield given.id, given
        if given.get_io_type() == "COMFY_AUTOGROW_V3":
            for name, made in given.template.cached_inputs.items():
                yield f"{given.id}.{name}", made


def name_of(output):
    return output.display_name or output.id


# --- the public table

def test_the_nodes_of_the_pack(pack, schemas, host):
    extension = asyncio.run(pack.comfy_entrypoint())
    first, second = (asyncio.run(extension.get_node_list()) for _ in range(2))
    assert first == second
    assert len(schemas) == len(first), "two nodes share an id"
    assert set(schemas) == set(API)
    assert all(host.nodes[node_id].GET_SCHEMA().node_id == node_id for node_id in API)


@each_node
def test_public_names_are_kept(node_id, schemas):
    name, inputs, outputs = API[node_id]
    schema = schemas[node_id]
    public = [(i.id, i.get_io_type(), not i.optional) for i in schema.inputs if not i.advanced]
    assert node_id.startswith("StyleLoom")
    assert schema.display_name == name
    assert public == inputs
    assert [(name_of(o), o.get_io_type()) for o in schema.outputs] == outputs
    assert schema.category.split("/")[0] == "StyleLoom"


@each_node
def test_advanced_inputs_can_be_left_out(node_id, schemas):
    public = {name for name, _, _ in API[node_id][1]}
    added = [i for i in schemas[node_id].inputs if i.id not in public]
    assert all(i.advanced and i.optional for i in added), [i.id for i in added]


@each_node
def test_the_host_can_tell_the_browser(node_id, host):
    node = host.nodes[node_id]
    info = json.loads(json.dumps(node.GET_NODE_INFO_V1(), allow_nan=False))
    assert info["name"] == node_id and info["display_name"] == API[node_id][0]
    assert info["python_module"] == "custom_nodes.StyleLoom"  # the panel looks for the help under this name
    assert len(info["output"]) == len(info["output_name"]) == len(info["output_tooltips"]) == len(API[node_id][2])
    assert json.loads(json.dumps(node.INPUT_TYPES(), allow_nan=False)) == info["input"]


# --- words

@each_node
def test_everything_has_words(node_id, schemas):
    schema = schemas[node_id]
    lacking = [name for name, given in all_inputs(schema) if not given.tooltip]
    lacking += [name_of(output) for output in schema.outputs if not output.tooltip]
    assert not lacking, f"no tooltip: {lacking}"
    assert schema.description
    assert len(schema.search_aliases) >= 2
    assert len(set(schema.search_aliases)) == len(schema.search_aliases)


@each_node
def test_sentences_end(node_id, schemas):
    schema = schemas[node_id]
    texts = [schema.description, *(i.tooltip for _, i in all_inputs(schema)), *(o.tooltip for o in schema.outputs)]
    assert [t for t in texts if not t.endswith((".", "…"))] == []
    assert [t for t in texts if t != " ".join(t.split())] == [], "two spaces, or one at an end: a lost line break"


@each_node
def test_the_frontend_takes_no_character_for_its_own(node_id, schemas):
    """It reads names and descriptions (not tooltips) as vue-i18n messages, where these have a meaning."""
    schema = schemas[node_id]
    texts = [schema.display_name, schema.description, *schema.category.split("/"),
             *(name for name, _ in all_inputs(schema)), *map(name_of, schema.outputs)]
    assert [text for text in texts if set(text) & set("{}@|")] == []


@each_node
def test_help_names_everything(node_id, schemas):
    text = (HELP / f"{node_id}.md").read_text(encoding="utf-8")
    schema = schemas[node_id]
    assert text.startswith(f"# {schema.display_name}\n")
    names = [i.id for i in schema.inputs] + [name_of(o) for o in schema.outputs]
    assert [name for name in names if f"`{name}`" not in text] == []
    for given in schema.inputs:
        if given.get_io_type() == "COMFY_AUTOGROW_V3":
            assert f'"{given.id}.{given.template.names[0]}"' in text, "the API form is not obvious"
    for given in schema.inputs:
        if given.get_io_type() == "COMBO" and given.id in ("precision", "arithmetic"):
            assert [option for option in given.options if option not in text] == []


# --- translations

def key(name: str) -> str:
    """The frontend looks a name up with its dots replaced, as dots separate the levels of its keys."""
    return name.replace(".", "_")


def locale_files(schemas) -> dict[str, dict]:
    """`locales/en` by file name, in the form that the host serves at /i18n and the frontend merges into its own.

    The sockets of a growing input have entries of their own: the frontend has no other source for their tooltips.
    """
    node_defs, categories = {}, set()
    for node_id, schema in sorted(schemas.items()):
        inputs = {key(name): {"name": given.display_name or given.id, "tooltip": given.tooltip}
                  for name, given in all_inputs(schema)}
        outputs = {str(index): {"name": name_of(output), "tooltip": output.tooltip}
                   for index, output in enumerate(schema.outputs)}
        node_defs[key(node_id)] = {"display_name": schema.display_name, "description": schema.description,
                                   "inputs": inputs, **({"outputs": outputs} if outputs else {})}
        categories |= set(schema.category.split("/"))
    return {"nodeDefs.json": node_defs, "main.json": {"nodeCategories": {name: name for name in sorted(categories)}}}


def test_locales_say_what_the_nodes_say(schemas):
    for name, content in locale_files(schemas).items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        path = LOCALES / name
        if os.environ.get("STYLELOOM_UPDATE_LOCALES"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        found = path.read_text(encoding="utf-8") if path.is_file() else ""
        assert found == text, f"{path.relative_to(ROOT)} is not what the nodes say: see the top of this file"


def test_the_host_serves_the_locales(schemas, host):
    from app.custom_node_manager import CustomNodeManager

    known = host.folder_paths.folder_names_and_paths["custom_nodes"]
    host.folder_paths.folder_names_and_paths["custom_nodes"] = ([str(host.base / "custom_nodes")], known[1])
    try:
        served = CustomNodeManager().build_translations()
    finally:
        host.folder_paths.folder_names_and_paths["custom_nodes"] = known
    assert set(API) <= set(served["en"]["nodeDefs"])
    assert served["en"]["nodeDefs"]["StyleLoomEncodeReferences"]["inputs"]["images_image0"]["tooltip"]


# --- the start

def run_python(script: str, *args: Path, path: Path, cwd: Path) -> str:
    """In a folder of its own: Python would find this repository's `nodes` before the host's in the current one."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *map(str, args)], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(path)}, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LOAD = """
    import asyncio, json, os, sys, time

    pack, other, base = sys.argv[1:]
    sys.argv = ["main.py", "--cpu", "--base-directory", base, "--disable-all-custom-nodes"]
    import comfy.options
    comfy.options.enable_args_parsing()
    import nodes
    import torch
    asyncio.run(nodes.load_custom_node(other, module_parent="custom_nodes"))  # what the host needs for any pack
    from torch.utils._python_dispatch import TorchDispatchMode

    scans, computed = [], []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            computed.append(str(func))
            return func(*args, **(kwargs or {}))

    def counted(name, original):
        def scan(path=".", *args, **kwargs):
            scans.append(f"{name} {path}")
            return original(path, *args, **kwargs)
        return scan

    before = set(sys.modules)
    for name in ("scandir", "listdir", "walk"):  # the import system has its own way to look into folders
        setattr(os, name, counted(name, getattr(os, name)))
    start = time.perf_counter()
    with Count():
        loaded = asyncio.run(nodes.load_custom_node(pack, module_parent="custom_nodes"))
    seconds = time.perf_counter() - start
    own = pack.replace(".", "_x_")
    found = [name for name in set(sys.modules) - before if name != own and not name.startswith(own + ".")]
    print(json.dumps({"loaded": loaded, "scans": scans, "computed": computed, "seconds": seconds,
                      "modules": sorted({name.split(".")[0] for name in found}),
                      "nodes": [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("StyleLoom")]}))
"""


@pytest.fixture(scope="module")
def start(host, tmp_path_factory):
    """How the host loads the pack, in a process of its own that has imported nothing else."""
    base = tmp_path_factory.mktemp("start")
    for name in ("models/i2l", "models/loras", "input", "output", "user", "temp", "custom_nodes"):
        (base / name).mkdir(parents=True)
    pack = base / "custom_nodes" / "StyleLoom"
    pack.symlink_to(ROOT, target_is_directory=True)
    other = base / "custom_nodes" / "other"
    other.mkdir()
    (other / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    report = json.loads(run_python(LOAD, pack, other, base, path=host.path, cwd=base).splitlines()[-1])
    assert report["loaded"] and set(report["nodes"]) == set(API)
    print(f"the pack was loaded in {report['seconds']:.3f} s")
    return report


def test_the_start_computes_nothing(start):
    assert start["computed"] == []


def test_the_start_looks_into_no_folder(start):
    """A folder of models may be large, and far away; what a drop-down offers is asked for with `as_dict`."""
    assert start["scans"] == []


def test_the_start_brings_no_further_library(start):
    known = set(sys.stdlib_module_names) | {"safetensors", "einops", "numpy", "PIL", "comfyui_version"}
    assert [name for name in start["modules"] if name not in known] == []


OLD = """
    import asyncio, importlib.util, sys

    root = sys.argv[1]
    spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
    pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    try:
        asyncio.run(pack.comfy_entrypoint())
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize("api", ["", "from types import SimpleNamespace as io\nclass ComfyExtension: pass"])
@pytest.mark.parametrize("version", ["0.3.40", None])
def test_a_host_that_is_too_old(api, version, tmp_path):
    from styleloom.nodes import OLDEST_HOST

    (tmp_path / "comfy_api").mkdir()
    (tmp_path / "comfy_api" / "__init__.py").write_text("")
    if api:  # a host that has the module, and not what is needed of it
        (tmp_path / "comfy_api" / "latest.py").write_text(api)
    if version:
        (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    (line,) = run_python(OLD, ROOT, path=tmp_path, cwd=tmp_path).splitlines()
    assert re.match(rf"StyleLoom needs ComfyUI {re.escape(OLDEST_HOST)} or newer", line), line
    assert (version or "unknown") in line
