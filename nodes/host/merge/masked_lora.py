"""Two LoRAs in the layers of a model, with one mask for each row of a batch: content, style and merged in one go.

The rows of a batch are the branches of the row engine (`weights/row_adapters`), the masks stand in the place of
strengths.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Sequence

import torch
from comfy.patcher_extension import WrappersMP

from ....weights.errors import StyleLoomError
from ....weights.lora.low_rank import LowRank
from ....weights.merge.two_loras import Prepared
from ....weights.row_adapters.forward import LayersWithTerms, ModelCall
from ....weights.row_adapters.layers import layer_of
from ....weights.row_adapters.layouts import layouts_of
from ....weights.row_adapters.masked import CONTENT, MERGED, STYLE, MaskedLowRank
from ..fused_layers import called
from ..lora_patches import find_module
from ..missing_keys import some
from ..prefix_cache import without_prefix_cache
from ..row_terms import carry, computed_in, parts_of
from ..versions import host_versions

KEY = "styleloom_masked_lora"

Watch = Callable[[int, torch.Tensor], None]


@dataclasses.dataclass(frozen=True)
class StackedRanks:
    """The ranks of both LoRAs for one target, content's first.

    Attributes:
        target: The host's, see `parts_of`.
        change: Both LoRAs as one; its `outputs`, `inputs` and rows are those of the weight.
        content: How many of the ranks are content's.
        index: The place among the shared layers of `Prepared`; -1 for a layer that only one LoRA has.
    """

    target: Hashable
    change: LowRank
    content: int
    index: int = -1

    @property
    def layer(self) -> str:
        return parts_of(self.target)[0].removesuffix(".weight")


def stacked_ranks(prepared: Prepared) -> list[StackedRanks]:
    """The layers of the diffusion model; text encoders are no part of it."""
    found = []
    for index, (target, gauge) in enumerate(zip(prepared.targets, prepared.gauges)):
        down, up = torch.cat((gauge.down_c, gauge.down_s)), torch.cat((gauge.up_c, gauge.up_s), 1)
        found.append(_stacked(target, LowRank(down, up), gauge.up_c.shape[1], index))
    for target, (role, adapter) in prepared.one_sided.items():
        found.append(_stacked(target, LowRank(adapter.down, adapter.up), adapter.rank if role == CONTENT else 0))
    return [ranks for ranks in found if ranks.layer.startswith("diffusion_model.")]


def _stacked(target: Hashable, change: LowRank, content: int, index: int = -1) -> StackedRanks:
    _, part, swap = parts_of(target)
    axis, cut = (None, None) if part is None else (part[0], tuple(part[1:]))
    change = dataclasses.replace(
        change,
        up=change.up if swap is None else swap(change.up),
        outputs=cut if axis == 0 else None,
        inputs=cut if axis == 1 else None,
    )
    return StackedRanks(target, change, content, index)


class MaskedLoRA:
    """`with MaskedLoRA(model, ranks) as lora:`, then `lora.use(rows, …)` before the model is run.

    Args:
        model: MODEL, a clone. The host moves the LoRAs with it while the block is open; afterwards it and its layers
            are as before.
        ranks: From `stacked_ranks`.

    Attributes:
        options: What `transformer_options` needs in every call of the model; the MODEL has it while the block is open.

    Raises:
        StyleLoomError: a layer that the model does not have, or of a kind that takes no LoRA.
    """

    def __init__(self, model, ranks: Sequence[StackedRanks]):
        self.model, self.ranks = model, list(ranks)
        self._call = ModelCall(layouts_of(model.model.diffusion_model))
        alone = [(each.content, each.change.rank - each.content) for each in self.ranks]
        self._alone = {CONTENT: tuple((0, content) for content, _ in alone), STYLE: tuple(alone)}
        self._terms: list[MaskedLowRank] = []
        self._layers: LayersWithTerms | None = None
        self._open = contextlib.ExitStack()
        self.options = without_prefix_cache(model.model.diffusion_model)

    def __enter__(self) -> MaskedLoRA:
        dtype, layers = computed_in(self.model), {}
        for place, each in enumerate(self.ranks):
            module = find_module(self.model.model, each.layer)
            layer = None if module is None else layer_of(module)
            if layer is None or layer.kind == "norm":
                raise StyleLoomError(
                    f"{each.layer} is not in this model, or no linear layer or convolution",
                    "LoRAs for this model",
                    "Connect the base model of both LoRAs.",
                )
            self._terms.append(MaskedLowRank(layer, place, each.change, dtype))
            layers.setdefault(each.layer, []).append(self._terms[-1])
        terms = {name: dict.fromkeys((CONTENT, STYLE, MERGED), made) for name, made in layers.items()}
        self._layers = LayersWithTerms(lambda name: find_module(self.model.model, name), terms, self._call)
        self.use([CONTENT])
        carry(self.model, KEY, torch.nn.ModuleList(self._terms))
        self._layers.put_in()
        self._open.enter_context(called(self._layers.wanted()))
        if self.options:
            before = self.model.model_options
            self._open.callback(setattr, self.model, "model_options", before)
            added = {**before.get("transformer_options", {}), **self.options}
            self.model.model_options = {**before, "transformer_options": added}
        self._call.active, self._call.called = True, set()
        return self

    def __exit__(self, *exc) -> None:
        self._call.active = False
        self._layers.take_out()
        self.model.remove_additional_models(KEY)
        self._terms, self._layers = [], None  # with them go the copies on the device
        self._open.__exit__(*exc)

    def use(self, rows: Sequence[int], masks: Sequence[torch.Tensor] | None = None) -> None:
        """What each row of the model's input is, from now on.

        Args:
            rows: CONTENT, STYLE or MERGED, one for each row; one entry, or equal ones, stand for any number of rows.
            masks: For MERGED: (rank,) for each shared layer. What only one LoRA has is merged as it is.
        """
        strengths = dict(self._alone)
        if masks is not None:
            strengths[MERGED] = tuple(
                masks[each.index] if each.index >= 0 else (0, each.change.rank) for each in self.ranks
            )
        self.back_to((tuple(rows), strengths))

    def state(self) -> tuple:
        """What `use` has set, for `back_to`."""
        return self._call.order, self._call.strengths

    def back_to(self, state: tuple) -> None:
        order, strengths = state
        self._call.set_rows(order, len(order), strengths, tuple(strengths))

    def watch(self, on_layer: Watch | None) -> None:
        """From now on, give V x (tokens, rank) of every shared layer to `on_layer`, with the layer's index."""
        for each, term in zip(self.ranks, self._terms, strict=True):
            if each.index >= 0:
                term.watch = None if on_layer is None else _at(on_layer, each.index)

    def check_called(self) -> None:
        """Once the model has run.

        Raises:
            StyleLoomError: layers of the LoRAs that the model computed without calling them. What they should have
                done is missing, in silence, from whatever the model made.
        """
        if self.model.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile"):
            return  # compiled layers do not note that they were called
        missing = sorted({each.layer for each in self.ranks} - self._call.called)
        if missing:
            raise StyleLoomError(
                f"{len(missing)} layers that the LoRAs change were not called by the model: {some(missing)} "
                f"({host_versions()})",
                "a model that calls every layer of the two LoRAs",
                "Another custom node may compute these layers by itself: leave it out of the chain of this model. Or "
                "load the model in another precision (fp8, fp16, bf16), or use the mode fast.",
            )


def _at(on_layer: Watch, index: int) -> Callable[[torch.Tensor], None]:
    return lambda hidden: on_layer(index, hidden)
