"""An image encoder under the host's memory management."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import attention_pytorch

from ....weights.errors import StyleLoomError
from ....weights.i2l.encoders import EncoderFile
from ....weights.i2l.towers import build_tower, compute_dtype, encode


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The host's SDPA, which is what was published: an embedding must not change with the attention that somebody
    chose for sampling (sage, sub-quadratic), and at 576 tokens there is nothing to save."""
    return attention_pytorch(q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True)


class TowerRun:
    """One run of an encoder over some pictures. Use as a context manager; call with pixels.

    The tower is made for the run and dropped after it: a reference set is encoded once and then remembered, while a
    tower left behind would be moved from the GPU to RAM as an anonymous copy of up to 13 GB. Its tensors lie in the
    memory-mapped file, so making it anew costs milliseconds.
    """

    def __init__(self, file: EncoderFile):
        self.file = file

    def __enter__(self) -> TowerRun:
        device = comfy.model_management.get_torch_device()
        offload = comfy.model_management.text_encoder_offload_device()
        weights = comfy.utils.load_torch_file(str(self.file.header.path), safe_load=True)
        tower = build_tower(weights, self.file.name, self.file.precision, comfy.ops.manual_cast, attention=_attention)
        self._patcher = comfy.model_patcher.CoreModelPatcher(tower, load_device=device, offload_device=offload)
        # One picture's activations; the towers are narrow beside their weights.
        comfy.model_management.load_models_gpu([self._patcher], memory_required=256 * 1024**2)
        return self

    def __exit__(self, *exc) -> None:
        on_cpu = comfy.model_management.is_device_cpu(self._patcher.load_device)
        self._patcher = None
        if not on_cpu:
            comfy.model_management.soft_empty_cache()

    def __call__(self, pixels: torch.Tensor, on_block) -> torch.Tensor:
        """(1, 3, side, side) → (1, hidden) bf16 on the CPU."""
        try:
            out = encode(
                self._patcher.model, pixels.to(self._patcher.load_device, compute_dtype(self.file.precision)), on_block
            )
        except StyleLoomError as error:
            raise StyleLoomError(f"{self.file.name}: {error.found}", error.expected, error.fix) from error
        return out.to("cpu", torch.bfloat16)
