"""Two LoRAs on the activations of a model, with one mask for each row of a batch: content, style and merged in one go.

The low-rank path y = f(x) + U (z ∘ V x) costs R numbers a token, needs no weight (so the model may be quantised or
offloaded), and its gradient reaches the masks. It hangs on forward hooks, which come off when the block is left.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import comfy.utils
import torch
import torch.nn.functional as F

from ....weights.errors import StyleLoomError
from ....weights.merge.two_loras import Prepared

CONTENT, STYLE, MERGED = 0, 1, 2


@dataclass
class Path:
    """One layer's low-rank path: down (R, in·kernel…), up (out, R), kernel, where content's ranks end; `index` in the
    shared layers, -1 for one that only one LoRA has."""

    target: Hashable
    down: torch.Tensor
    up: torch.Tensor
    kernel: tuple[int, ...]
    content_ranks: int
    index: int = -1


def paths_of(prepared: Prepared) -> list[Path]:
    """The layers of the diffusion model: text encoders are not reached by hooks on it."""
    found = []
    for index, (target, gauge) in enumerate(zip(prepared.targets, prepared.gauges)):
        down, up = torch.cat((gauge.down_c, gauge.down_s)), torch.cat((gauge.up_c, gauge.up_s), 1)
        found.append(Path(target, down, up, prepared.kernels[index], gauge.up_c.shape[1], index))
    for target, (side, adapter) in prepared.one_sided.items():
        ranks = adapter.rank if side == CONTENT else 0
        found.append(Path(target, adapter.down, adapter.up, adapter.kernel, ranks))
    return [path for path in found if _key(path.target).startswith("diffusion_model.")]


def _key(target: Hashable) -> str:
    return target[0] if isinstance(target, tuple) else str(target)


class MaskedLoRA:
    """`with MaskedLoRA(model, paths) as lora:` then set `lora.rows` and `lora.masks` before each forward.

    rows: what each row of the batch is, a list of CONTENT, STYLE, MERGED; one entry stands for all rows.
    masks: for MERGED, (R,) by the index of a shared layer.
    watch: None, or a function (index, h) that is given V x (tokens, R) of every shared layer.
    """

    def __init__(self, model: torch.nn.Module, paths: Sequence[Path]):
        self.model, self.paths = model, paths
        self.rows: list[int] = [CONTENT]
        self.masks: list[torch.Tensor] = []
        self.watch = None
        self._handles: list = []

    def __enter__(self) -> MaskedLoRA:
        try:
            for path in self.paths:
                module = comfy.utils.get_attr(self.model, _key(path.target).removesuffix(".weight"))
                self._handles.append(module.register_forward_hook(self._hook(path)))
        except AttributeError as error:
            self.__exit__()
            raise StyleLoomError(
                f"{path.target} is not in this model", "LoRAs for this model", "Connect the base model of both LoRAs."
            ) from error
        return self

    def __exit__(self, *exc) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _mask(self, path: Path, batch: int, like: torch.Tensor) -> torch.Tensor:
        """(batch or 1, R): the row of each sample."""
        content = torch.zeros(path.down.shape[0], device=like.device)
        content[: path.content_ranks] = 1
        merged = torch.ones_like(content)
        if path.index >= 0 and MERGED in self.rows:
            merged = self.masks[path.index].to(like.device)
        rows = torch.stack([(content, 1 - content, merged)[row] for row in self.rows])
        if len(self.rows) == 1 or len(self.rows) == batch:
            return rows
        return rows.repeat_interleave(batch // len(self.rows), 0)

    def _hook(self, path: Path):
        kept: dict = {}

        def factors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            place = (x.device, x.dtype)
            if place not in kept:
                kept.clear()
                kept[place] = (path.down.to(*place), path.up.to(*place))
            return kept[place]

        def hook(module, args, output):
            x = args[0]
            cut = path.target[1] if isinstance(path.target, tuple) else None
            if cut is not None and cut[0] == 1:
                x = x.narrow(-1, cut[1], cut[2])
            down, up = factors(x)
            conv = len(path.kernel) if x.ndim > 2 and path.kernel else 0
            if conv:
                run = (F.conv1d, F.conv2d, F.conv3d)[conv - 1]
                places = {n: getattr(module, n) for n in ("stride", "padding", "dilation")}
                h = run(x, down.view(len(down), -1, *path.kernel), **places)
                flat = h.movedim(1, -1)
            else:
                h = flat = F.linear(x, down)
            if self.watch is not None and path.index >= 0:
                self.watch(path.index, flat.reshape(-1, flat.shape[-1]))
            mask = self._mask(path, x.shape[0], x)
            shape = (mask.shape[0], -1, *[1] * (h.ndim - 2)) if conv else (mask.shape[0], *[1] * (h.ndim - 2), -1)
            h = (h * mask.view(shape)).to(x.dtype)
            y = run(h, up.view(*up.shape, *[1] * conv)) if conv else F.linear(h, up)
            if cut is not None and cut[0] == 0:
                y = F.pad(y, (cut[1], output.shape[-1] - cut[1] - cut[2]))
            return output + y.to(output.dtype)

        return hook
