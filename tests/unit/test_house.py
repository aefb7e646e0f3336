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
PIL_ALLOWED_IN = "preprocess.py"

# Absolute, these names are other people's: `nodes` is the host's own file.
OWN_NAMES = {path.name for path in ROOT.iterdir() if path.is_dir()} | {"styleloom"}
NETWORK = {"aiohttp", "asyncore", "ftplib", "http", "httpx", "huggingface_hub", "modelscope", "requests", "smtplib",
           "socket", "socketserver", "ssl", "telnetlib", "urllib", "urllib3", "websocket", "websockets", "xmlrpc"}
UNSAFE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}

MAX_LINES, MAX_COLUMNS = 400, 120


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def absolute_imports(path: Path):
    """(line, top-level name) of what a file imports absolutely, inside functions too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module.split(".")[0]


def place(path: Path, line: int) -> str:
    """How a breach is reported: file, line."""
    return f"{path.relative_to(ROOT).as_posix()}:{line}"


def imports_of(paths, wrong) -> list[str]:
    """Every absolute import in `paths` for which `wrong(path, name)` is true, with its place."""
    return [f"{place(path, line)} imports {name}" for path in paths for line, name in absolute_imports(path)
            if wrong(path, name)]


def holds(breaches: list[str]) -> None:
    """Fails with every breach of a rule on a line of its own; pytest would shorten a list."""
    if breaches:
        pytest.fail("\n".join(breaches), pytrace=False)


def test_there_is_something_to_check():
    assert len(WEIGHTS) > 10 and len(NODES) > 5


# --- weights/ does not know the host

def test_weights_import_only_tensors():
    allowed = set(sys.stdlib_module_names) | ALLOWED_IN_WEIGHTS
    holds(imports_of(WEIGHTS, lambda path, name: name not in allowed
                     and not (name == "PIL" and path.name == PIL_ALLOWED_IN)))


def test_weights_import_nothing_above_them():
    holds([f"{place(path, node.lineno)} {ast.unparse(node)}" for path in WEIGHTS for node in ast.walk(parsed(path))
           if isinstance(node, ast.ImportFrom) and node.level > len(path.parent.relative_to(ROOT).parts)])


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
            assert top != "PIL" or asking.endswith(".preprocess"), f"{asking} imports {name}"
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

def test_imports_are_harmless():
    holds(imports_of(WEIGHTS + NODES, lambda path, name: name in NETWORK | UNSAFE))


def test_the_packs_own_modules_are_imported_relatively():
    holds(imports_of(WEIGHTS + NODES, lambda path, name: name in OWN_NAMES))


def harm_of(call: ast.Call) -> str | None:
    """Why a call is not allowed, None where it is."""
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"):
        return name
    if name.endswith("torch.load") and given.get("weights_only") != "True":
        return f"{name} without weights_only=True"
    if name.endswith("load_torch_file") and given.get("safe_load") != "True":
        return f"{name} without safe_load=True"
    if given.get("weights_only", "True") != "True" or given.get("safe_load", "True") != "True":
        return "unsafe loading"
    if given.get("trust_remote_code", "False") != "False":
        return "trust_remote_code"
    return None


@pytest.mark.parametrize(("code", "harm"), [
    ("torch.load(p)", "torch.load without weights_only=True"), ("torch.load(p, weights_only=True)", None),
    ("u.load_torch_file(p, safe_load=False)", "u.load_torch_file without safe_load=True"), ("exec(text)", "exec"),
    ("read(p, weights_only=False)", "unsafe loading"), ("m(trust_remote_code=True)", "trust_remote_code")])
def test_what_counts_as_a_harmful_call(code, harm):
    assert harm_of(ast.parse(code).body[0].value) == harm


def test_calls_are_harmless():
    holds([f"{place(path, node.lineno)} {harm_of(node)}" for path in WEIGHTS + NODES
           for node in ast.walk(parsed(path)) if isinstance(node, ast.Call) and harm_of(node)])


# --- files stay readable

def test_files_are_short():
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in WEIGHTS + NODES}
    holds([f"{place(path, len(text))} more than {MAX_LINES} lines" for path, text in lines.items()
           if len(text) > MAX_LINES]
          + [f"{place(path, i)} longer than {MAX_COLUMNS}" for path, text in lines.items()
             for i, line in enumerate(text, 1) if len(line) > MAX_COLUMNS])


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


# Pages of the help that belong to no node; the nodes' pages link to them.
PAGES = {"coming_from_ipadapter_plus"}
NODE_IDS = [found for path in NODES for found in re.findall(r'node_id="([^"]+)"', path.read_text(encoding="utf-8"))]


def test_every_node_has_help_and_no_help_is_left_over():
    assert len(NODE_IDS) == len(set(NODE_IDS)) > 5
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(NODE_IDS) | PAGES


def test_every_node_is_in_the_locales():
    assert set(json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))) == set(NODE_IDS)


def test_help_is_at_home_in_the_side_panel():
    """The panel opens a link as it is written, from the page of the browser: one to another help page leads nowhere."""
    wrong = []
    for path in sorted((ROOT / "web" / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        wrong += [f"{place(path, text.count(chr(10), 0, link.start()) + 1)} links to {link[1]}"
                  for link in re.finditer(r"\]\(([^)]*)\)", text) if not link[1].startswith("https://")]
        for i, line in enumerate(text.splitlines(), 1):
            if "![" in line or "<img" in line:
                wrong.append(f"{place(path, i)} a picture")
            if line.startswith("|") and not line.endswith("|"):
                wrong.append(f"{place(path, i)} a table row that does not end")
        if text.count("```") % 2:
            wrong.append(f"{place(path, 1)} a code block that does not end")
    holds(wrong)
