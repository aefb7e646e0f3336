"""The pack's own types on a wire. A LoRA travels as the host's LORA_MODEL."""

from __future__ import annotations

from comfy_api.latest import io

Predictor = io.Custom("I2L_PREDICTOR")
Encoders = io.Custom("I2L_ENCODERS")
References = io.Custom("I2L_REFERENCES")
LoRA = io.Custom("LORA_MODEL")
LoRAStack = io.Custom("STYLELOOM_LORA_STACK")
PackLoRAStack = io.Custom("LORA_STACK")  # of other packs: a list of (file name, strength, strength)
IPAdapter = io.Custom("STYLELOOM_IPADAPTER")

CATEGORY = "StyleLoom/image to LoRA"
CATEGORY_LORA = "StyleLoom/LoRA"
CATEGORY_GUIDANCE = "StyleLoom/guidance"
CATEGORY_STYLE = "StyleLoom/style"
