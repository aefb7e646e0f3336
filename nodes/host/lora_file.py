"""Reading a LoRA file, and what it says of itself."""

from __future__ import annotations

import comfy.utils

from ...weights.lora.diffusers_keys import kohya_names
from ...weights.lora.files import check_lora
from ...weights.lora.lora_model import LoRAModel
from ...weights.lora.made_for import made_for
from ...weights.lora.metadata import facts_of
from ...weights.tensor_file import read_header
from . import folders


def load_lora_file(name: str) -> LoRAModel:
    """The LoRA of a listed file, which remembers its metadata and its name. Names that the host does not look for are
    put into those that it does.

    Raises:
        StyleLoomError: not listed, damaged, or no LoRA.
    """
    path = folders.find(folders.LORAS, name)
    if path.endswith((".safetensors", ".sft")):
        read_header(path)  # says what is wrong with a damaged file in better words than the library
    tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    check_lora(tensors, name)
    made = kohya_names(tensors)
    # The host knows diffusers' older names, those with `.processor.`.
    renamed = any(".processor." not in key for key in tensors.keys() - made.keys())
    return LoRAModel(made, metadata, name, renamed=renamed)


def said_of_itself(lora: LoRAModel) -> tuple[str, str, str]:
    """(trigger words with commas between them, base model, a report of both)."""
    facts, by_layers = facts_of(lora.metadata), made_for(lora)
    words = ", ".join(facts.trigger_words)
    base = facts.base_model or by_layers
    lines = [f"{lora.source}: {len(lora)} tensors"]
    if words:
        how = "the most frequent tags of its captions, as the file names no trigger words" if facts.guessed else ""
        lines.append(f"trigger words: {words}" + (f" ({how})" if how else ""))
    else:
        lines.append("trigger words: the file names none")
    told = [f"{facts.base_model} (in the file)"] if facts.base_model else []
    told += [f"{by_layers} (by its layers)"] if by_layers else []
    lines.append("base model: " + (", ".join(told) or "the file does not say, and its layers are of no known kind"))
    if facts.checkpoint:
        lines.append(f"trained on: {facts.checkpoint}")
    return words, base, "\n".join(lines)
