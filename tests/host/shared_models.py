"""Models, encoded pictures and adapters that the tests of this folder share: each is made once per session.

conftest.py takes the fixtures from here, so that every test file has them by name. A test leaves them as they were;
`left_as_they_were` looks at that after each test.
"""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from safetensors.torch import save_file

# Relative, in the norm of the picture. Both sides of a comparison are float32 and add the same numbers in another
# order: some hundred layers, each with a rounding of 6e-8 times the root of its sums' lengths (about ten), make some
# 1e-5.
BOUND = 1e-4
ONE = {"steps": 1}
# The strengths of the LoRAs of both sides in `loras`.
SIDES = {"positive_strength": 0.8, "negative_strength": 0.5}


# Whoever uses one of the shared models has it, directly or not, from one of these fixtures.
SOURCES = {"benches", "models"}


class _Shared:
    """The shared MODELs, and for each its modules and what its weights sum up to."""

    def __init__(self):
        self.models: dict[str, tuple[object, list, tuple]] = {}
        self.loaded: set[int] = set()  # ids of the nets that the host has loaded since the weights were looked at

    def add(self, name: str, model) -> None:
        self.models[name] = (model, list(model.model.named_modules()), _sums(model))


def _sums(model) -> tuple:
    """For each weight the sum of its bits as integers: a change of one bit is seen."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tuple((key, int(value.detach().view(whole[value.element_size()]).sum()))
                 for key, value in model.model.state_dict().items())


def _traces(model, modules) -> list[str]:
    """What a run or a node has left on a MODEL that had nothing on it, or on its layers."""
    left = [name for name in ("patches", "object_patches", "wrappers", "callbacks", "injections", "attachments",
                              "additional_models", "hook_patches") if getattr(model, name)]
    options = dict(model.model_options)
    left += [f"model_options[{name!r}]" for name, value in options.items() if name != "transformer_options" or value]
    for name, module in modules:
        own = module.__dict__
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            left.append(f"the layer {name}")
    return left


def _clear_dead_models() -> set[int]:
    """The ids of the nets on the host's list of loaded models, from which those with a dead MODEL are then taken.

    A MODEL that is gone while its net lives on in another one is taken for a leak: as long as it is on the list, the
    host collects garbage through the whole process before it loads any model. That is right for a host that runs out of
    memory, and takes longer than most tests in a process that holds this many.
    """
    management = sys.modules.get("comfy.model_management")
    if management is None:
        return set()
    entries = management.current_loaded_models
    nets = {id(entry.real_model()) for entry in entries}
    entries[:] = [entry for entry in entries if not entry.is_dead()]
    return nets


@pytest.fixture(scope="session")
def shared_models():
    return _Shared()


@pytest.fixture(autouse=True)
def left_as_they_were(request, shared_models):
    """Fails the test that leaves something on a shared model."""
    _clear_dead_models()
    yield
    shared_models.loaded |= _clear_dead_models()
    if SOURCES.isdisjoint(request.fixturenames):
        return
    left = {name: _traces(model, modules) for name, (model, modules, _) in shared_models.models.items()}
    left = {name: traces for name, traces in left.items() if traces}
    for name in left:
        del shared_models.models[name]  # one test is told, not all that follow
    assert not left


@pytest.fixture(scope="module", autouse=True)
def weights_as_they_were(shared_models):
    """The same for the weights, after each file: the host keeps a clone's patches until it loads another clone."""
    yield
    used = [name for name, (model, _, _) in shared_models.models.items() if id(model.model) in shared_models.loaded]
    shared_models.loaded.clear()
    if used:
        import comfy.model_management

        comfy.model_management.unload_all_models()
        changed = []
        for name in used:
            model, modules, sums = shared_models.models[name]
            if _sums(model) != sums or list(model.model.named_modules()) != modules:
                changed.append(name)
        for name in changed:
            del shared_models.models[name]
        assert not changed, "the weights or layers of these shared models changed"
    # What outlives a file lives to the end: no later collection has to look at it again.
    gc.collect()
    gc.freeze()


# --- guidance


@pytest.fixture(scope="session")
def benches(run_node, kit, shared_models):
    """(architecture, short=True) → its `kit.two_passes.Bench`."""
    made = {}

    def get(name: str, short: bool = True):
        if (name, short) not in made:
            bench = made[name, short] = kit.two_passes.Bench(run_node, kit, name, short)
            shared_models.add(f"{name}, {'few blocks' if short else 'all blocks'}", bench.model)
        return made[name, short]

    return get


@pytest.fixture(scope="session")
def bench(benches):
    return benches("sd1.5")


@pytest.fixture(scope="session")
def distance(kit):
    return kit.two_passes.distance


@pytest.fixture(scope="session")
def loras(benches):
    """name → the LoRAs of both sides, as inputs of our node and as what the truth merges."""
    made = {}

    def get(name="sd1.5"):
        if name not in made:
            made[name] = benches(name).lora(1), benches(name).lora(2, rank=3, alpha=None)
        style, gray = made[name]
        return {"positive_lora": style, "negative_lora": gray, **SIDES}, ([(style, 0.8)], [(gray, 0.5)])

    return get


# --- style


@pytest.fixture(scope="session")
def models(run_node, shared_models):
    """name → (MODEL, CLIP, VAE) of all blocks, which an adapter's file counts."""
    made = {name: run_node("StyleLoomKitModel", architecture=name, seed=0) for name in ("sdxl", "sd1.5")}
    for name, (model, _, _) in made.items():
        shared_models.add(f"{name} for style", model)
    return made


@pytest.fixture(scope="session")
def vision(run_node):
    return run_node("StyleLoomKitVision", seed=0)[0]


@pytest.fixture(scope="session")
def encode(run_node, vision):
    """Encode Style Image on random pictures; the same seed gives the same output object."""
    made = {}

    def encoded(seed, count=1, **options):
        key = (seed, count, *options.items())
        if key not in made:
            image = torch.rand(count, 40, 64, 3, generator=torch.Generator().manual_seed(seed))
            made[key] = run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image, **options)[0]
        return made[key]

    return encoded


@pytest.fixture(scope="session")
def adapters(host, kit, run_node):
    """(kind, model) → (what Load IP-Adapter gives, the file's two dicts)."""
    made = {}
    folder = host.base / "models" / "ipadapter" / "made"
    folder.mkdir(parents=True, exist_ok=True)

    def adapter(kind, model):
        if (kind, model) not in made:
            cross, width = {"sdxl": 80, "sd1.5": 32}[model], 48 if kind == "base" else 64
            parts = kit.ip_adapter_files.ip_adapter_tensors(kind, model, 32, width, cross, seed=3, loud=2.0)
            flat = {f"{part}.{key}": value for part, tensors in parts.items() for key, value in tensors.items()}
            save_file(flat, str(folder / f"{kind}_{model}.safetensors"))
            name = f"made/{kind}_{model}.safetensors"
            made[kind, model] = run_node("StyleLoomLoadIPAdapter", ipadapter_name=name)[0], parts
        return made[kind, model]

    return adapter


@pytest.fixture(scope="session")
def texts():
    """Text for both sides of guidance, as a UNet takes it."""
    g = torch.Generator().manual_seed(5)
    return {"sdxl": torch.randn(2, 1, 11, 80, generator=g), "sd1.5": torch.randn(2, 1, 11, 32, generator=g)}
