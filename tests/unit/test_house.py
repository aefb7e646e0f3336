"""Laws of the house that a machine can check, without the host."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = sorted((ROOT / "weights").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))

ALLOWED_IN_WEIGHTS = {"torch", "safetensors", "einops", "numpy"}
# The published embeddings are of PIL's rounding, so preparing a picture takes PIL itself; every host brings it.
PIL_ALLOWED_IN = ROOT / "weights" / "i2l" / "preprocess.py"

# Absolute, these names are other people's: `nodes` is the host's own file.
OWN_NAMES = {path.name for path in ROOT.iterdir() if path.is_dir()} | {"styleloom"}
NETWORK = {"aiohttp", "asyncore", "ftplib", "http", "httpx", "huggingface_hub", "modelscope", "requests", "smtplib",
           "socket", "socketserver", "ssl", "telnetlib", "urllib", "urllib3", "websocket", "websockets", "xmlrpc"}
UNSAFE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}

MAX_LINES, MAX_COLUMNS = 400, 120


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.relative_to(ROOT).as_posix())


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def absolute_imports(path):
    """Top-level names of what a file imports absolutely, inside functions too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_there_is_something_to_check():
    assert len(WEIGHTS) > 10 and len(NODES) > 5


# --- weights/ does not know the host

@each(WEIGHTS)
def test_weights_import_only_tensors(path):
    allowed = set(sys.stdlib_module_names) | ALLOWED_IN_WEIGHTS | ({"PIL"} if path == PIL_ALLOWED_IN else set())
    assert sorted(set(absolute_imports(path)) - allowed) == []


@each(WEIGHTS)
def test_weights_import_nothing_above_them(path):
    depth = len(path.parent.relative_to(ROOT).parts)
    too_high = [ast.unparse(node) for node in ast.walk(parsed(path))
                if isinstance(node, ast.ImportFrom) and node.level > depth]
    assert too_high == []


IMPORT_ALL = """
    import builtins, importlib.util, sys
    from pathlib import Path

    import einops, numpy, safetensors.torch, torch  # all that there is

    CLOSED = {"comfy", "comfy_api", "comfy_extras", "execution", "folder_paths", "nodes", "server",
              "transformers", "diffusers", "torchvision", "huggingface_hub"}
    original = builtins.__import__

    def guarded(name, globals=None, locals=None, fromlist=(), level=0):
        asking = (globals or {}).get("__name__", "")
        if level == 0 and asking.startswith("styleloom"):
            top = name.split(".")[0]
            assert top not in CLOSED, f"{asking} imports {name}"
            assert top != "PIL" or asking == "styleloom.weights.i2l.preprocess", f"{asking} imports {name}"
        return original(name, globals, locals, fromlist, level)

    builtins.__import__ = guarded
    root = Path(sys.argv[1])
    spec = importlib.util.spec_from_file_location("styleloom", root / "__init__.py",
                                                  submodule_search_locations=[str(root)])
    pack = sys.modules["styleloom"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    for file in sorted((root / "weights").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        importlib.import_module(".".join(("styleloom", *parts)).removesuffix(".__init__"))
        print(*parts, sep=".")
    assert not set(sys.modules) & CLOSED, set(sys.modules) & CLOSED
"""


def test_weights_work_without_the_host(tmp_path):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(IMPORT_ALL), str(ROOT)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(WEIGHTS)


# --- nothing runs code out of a file or from the network

@each(WEIGHTS + NODES)
def test_imports_are_harmless(path):
    imported = set(absolute_imports(path))
    assert sorted(imported & NETWORK) == []
    assert sorted(imported & UNSAFE) == []
    assert sorted(imported & OWN_NAMES) == [], "import the pack's own modules relatively"


@each(WEIGHTS + NODES)
def test_calls_are_harmless(path):
    wrong = []
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"):
            wrong.append(f"line {node.lineno}: {name}")
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            wrong.append(f"line {node.lineno}: {name} without weights_only=True")
        if name.endswith("load_torch_file") and given.get("safe_load") != "True":
            wrong.append(f"line {node.lineno}: {name} without safe_load=True")
        if given.get("weights_only", "True") != "True" or given.get("safe_load", "True") != "True":
            wrong.append(f"line {node.lineno}: unsafe loading")
        if given.get("trust_remote_code", "False") != "False":
            wrong.append(f"line {node.lineno}: trust_remote_code")
    assert wrong == []


# --- files stay readable

@each(WEIGHTS + NODES)
def test_files_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES
    assert [f"line {i}" for i, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS] == []


# --- one version, one list of nodes

def project(key):
    (value,) = re.findall(rf'^{key} = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    return value


def test_the_changelog_knows_the_version():
    changelog = ROOT / "CHANGELOG.md"
    assert changelog.is_file(), "CHANGELOG.md is missing"
    versions = re.findall(r"^#+ \[?v?(\d+\.\d+\.\d+)", changelog.read_text(encoding="utf-8"), re.M)
    assert versions and versions[0] == project("version")


def test_one_oldest_host():
    from styleloom.nodes import OLDEST_HOST

    assert project("requires-comfyui") == f">={OLDEST_HOST}"


NODE_IDS = [found for path in NODES for found in re.findall(r'node_id="([^"]+)"', path.read_text(encoding="utf-8"))]


def test_every_node_has_help_and_no_help_is_left_over():
    assert len(NODE_IDS) == len(set(NODE_IDS)) > 5
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(NODE_IDS)


def test_every_node_is_in_the_locales():
    assert set(json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))) == set(NODE_IDS)


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_help_is_at_home_in_the_side_panel(node_id):
    """The panel opens a link as it is written, from the page of the browser: one to another help page leads nowhere."""
    text = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("https://")] == []
    assert "![" not in text and "<img" not in text
    assert text.count("```") % 2 == 0
    unescaped = [line for line in text.splitlines() if line.startswith("|") and not line.endswith("|")]
    assert unescaped == [], "a table row that does not end"
