"""LoRAs in diffusers' dotted names, as B-LoRA writes them, against the same LoRA in kohya's names, which the host reads
by itself."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

NAMES = [f"up_blocks.0.attentions.{a}.transformer_blocks.{i}.attn{n}.to_{p}"
         for a in (0, 1) for i in (0, 9) for n in (1, 2) for p in ("q", "k", "v", "out.0")]  # fmt: skip


@pytest.fixture(scope="module")
def pair(host, run_node, models):
    """(B-LoRA's names, kohya's) as Load LoRA File gives them, and the file's own keys."""
    unet = models["sdxl"][0].model.diffusion_model
    folder = host.base / "models" / "loras" / "dotted"
    folder.mkdir(parents=True, exist_ok=True)
    g, made = torch.Generator().manual_seed(1), [{}, {}]
    for name in NAMES:
        own = name.replace("up_blocks.0.attentions.", "output_blocks.").replace(".transformer", ".1.transformer")
        out, wide = unet.get_parameter(f"{own}.weight").shape
        down, up = torch.randn(4, wide, generator=g), torch.randn(out, 4, generator=g)
        made[0] |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
        flat = "lora_unet_" + name.replace(".", "_")
        made[1] |= {f"{flat}.lora_down.weight": down.clone(), f"{flat}.lora_up.weight": up.clone()}
    loaded = []
    for file, tensors in zip(("b_lora.safetensors", "kohya.safetensors"), made):
        save_file(tensors, str(folder / file))
        loaded.append(run_node("StyleLoomLoadLoRA", lora_name=f"dotted/{file}")[0])
    return *loaded, made[0]


def patched(model):
    """Weight -> its patches, by their numbers."""
    return {key: [(s, *(t for t in a.weights if isinstance(t, torch.Tensor))) for s, a, *_ in patches]
            for key, patches in model.patches.items()}  # fmt: skip


def same(a, b):
    a, b = patched(a), patched(b)
    return a and a.keys() == b.keys() and all(
        len(x) == len(y) and all(torch.equal(torch.as_tensor(s), torch.as_tensor(t)) for s, t in zip(x, y))
        for key in a for x, y in zip(a[key], b[key], strict=True))  # fmt: skip


def test_loading_applying_and_core(pair, run_node, models):
    ours, kohya, raw = pair
    model = models["sdxl"][0]
    due = run_node("LoraModelLoader", model=model, lora=dict(kohya), strength_model=0.7)[0]
    assert len(due.patches) == len(NAMES)
    assert same(run_node("StyleLoomApplyLoRA", model=model, lora=ours, strength=0.7)[0], due)
    assert same(run_node("StyleLoomApplyLoRA", model=model, lora=dict(raw), strength=0.7)[0], due), "another loader's"
    assert same(run_node("LoraModelLoader", model=model, lora=ours, strength_model=0.7)[0], due)


def test_other_packs_are_not_given_what_they_would_lose(pair, run_node, models, host):
    """A LORA_STACK names the file, and ComfyUI's own loader finds nothing in it."""
    ours, kohya, raw = pair
    assert not run_node("LoraModelLoader", model=models["sdxl"][0], lora=dict(raw), strength_model=1.0)[0].patches
    made, tuples, report = run_node("StyleLoomLoRAStack", lora=ours, strength=0.7)
    assert made[0].lora is ours and type(tuples).__name__ == "ExecutionBlocker"
    assert "names of layers that ComfyUI's own loader does not know" in report
    assert run_node("StyleLoomLoRAStack", lora=kohya, strength=0.7)[1] == [(kohya.source, 0.7, 0.7)]
    # diffusers' older names, which the host knows.
    older = {key.replace(".to_", ".processor.to_").replace("to_out.0", "to_out").replace(".lora.", "_lora."): tensor
             for key, tensor in raw.items()}  # fmt: skip
    assert len(run_node("LoraModelLoader", model=models["sdxl"][0], lora=older, strength_model=1.0)[0].patches)
    save_file(older, str(host.base / "models" / "loras" / "dotted" / "older.safetensors"))
    loaded = run_node("StyleLoomLoadLoRA", lora_name="dotted/older.safetensors")[0]
    assert run_node("StyleLoomLoRAStack", lora=loaded, strength=0.7)[1] == [(loaded.source, 0.7, 0.7)]


@pytest.mark.parametrize("preset", ["style blocks", "content blocks"])
def test_the_filter_and_merges(preset, pair, run_node, models):
    ours, kohya, raw = pair
    model = models["sdxl"][0]
    parts = [run_node("StyleLoomLoRABlockFilter", lora=lora, preset=preset, inside=1.0, outside=0.0)[0]
             for lora in (ours, kohya, dict(raw))]  # fmt: skip
    applied = [run_node("StyleLoomApplyLoRA", model=model, lora=part, strength=1.0)[0] for part in parts]
    assert len(applied[0].patches) == len(NAMES) // 2
    assert same(applied[0], applied[1]) and same(applied[2], applied[1])


def test_merges_read_the_same(pair, host):
    import sys

    ours, kohya, raw = pair
    pack = host.nodes["StyleLoomLoadLoRA"].__module__.rpartition(".nodes.")[0]
    read = sys.modules[f"{pack}.weights.lora.reading"].read_lora
    due = read(kohya, "kohya")
    for lora in (ours, raw):
        found = read(lora, "B-LoRA")
        assert not found.unknown and found.family == "sdxl" and found.adapters.keys() == due.adapters.keys()
        assert all(torch.equal(found.adapters[k].up, due.adapters[k].up) for k in due.adapters)
        assert all(torch.equal(found.adapters[k].down, due.adapters[k].down) for k in due.adapters)
