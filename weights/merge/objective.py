"""What training the masks minimises, apart from the diffusion model: the layer prior, and the bookkeeping of masks.

After DuoLoRA (arXiv 2504.13206), with what its paper intends where its released code does something else: the nuclear
norm of a diagonal mask is Σ|m|, the *minor* LoRA of a block is the one that is penalised, and each mask is its own
parameter.
"""

from __future__ import annotations

import torch

from .two_loras import Prepared, prior_columns
from .ziprank import Masks

MAX_MASK = 1.5
_SHRINK = 0.1  # weight of the minor mask itself beside the hinge


class MaskVector:
    """The masks of all shared layers as one vector, content's before style's in each layer. Where a prior leaves one of
    the LoRAs out, the masks of that layer stay as they start."""

    def __init__(self, prepared: Prepared, masks: Masks):
        self.sizes = [(gauge.up_c.shape[1], gauge.up_s.shape[1]) for gauge in prepared.gauges]
        parts = [torch.cat(prepared.layer_masks(masks, i)[:2]) for i in range(len(self.sizes))]
        self.start = torch.cat(parts).float()
        m = prepared.moments
        powers = [torch.cat((m.alpha[i, :a], m.beta[i, :b])).sqrt() for i, (a, b) in enumerate(self.sizes)]
        self.weights = torch.cat(powers).float()
        layer = [torch.full((a + b,), i) for i, (a, b) in enumerate(self.sizes)]
        side = [torch.cat((torch.zeros(a), torch.ones(b))) for a, b in self.sizes]
        self.cell = (2 * torch.cat(layer) + torch.cat(side)).long()
        held = (torch.cat(prior_columns(prepared, prepared.prior), 1) == 0).any(1)
        self.held = held[torch.cat(layer)]

    def layers(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """(r_c + r_s,) of each layer."""
        held, start = self.held.to(vector.device), self.start.to(vector)
        return list(torch.where(held, start, vector).split([a + b for a, b in self.sizes]))

    def shares(self, vector: torch.Tensor) -> torch.Tensor:
        """s = Σ σᵢ |mᵢ| / Σ σᵢ of content and style in each layer, (layers, 2)."""
        vector = torch.cat(self.layers(vector))
        weights, cell = self.weights.to(vector), self.cell.to(vector.device)
        total = weights.new_zeros(2 * len(self.sizes))
        kept = total.index_add(0, cell, weights * vector.abs())
        return (kept / total.index_add(0, cell, weights).clamp_min(1e-12)).view(-1, 2)

    def masks(self, vector: torch.Tensor, like: Masks) -> Masks:
        """Back in the filled-up form of `like`."""
        content, style = like.content.clone(), like.style.clone()
        for i, ((a, b), part) in enumerate(zip(self.sizes, self.layers(vector.detach().double().cpu()))):
            content[i, :a], style[i, :b] = part[:a], part[a:]
        return Masks(content, style)


def prior_loss(shares: torch.Tensor, p_c: torch.Tensor, p_s: torch.Tensor) -> torch.Tensor:
    """Mean over the layers that the prior speaks of: max(0, s_minor − s_major) + 0.1 s_minor.

    Args:
        shares: (layers, 2) of content and style. p_c, p_s: (layers, 1).
    """
    p_c, p_s = p_c.flatten().to(shares), p_s.flatten().to(shares)
    spoken = p_c != p_s
    if not bool(spoken.any()):
        return shares.sum() * 0
    content_major = p_c > p_s
    minor = torch.where(content_major, shares[:, 1], shares[:, 0])
    major = torch.where(content_major, shares[:, 0], shares[:, 1])
    return ((minor - major).clamp_min(0) + _SHRINK * minor)[spoken].mean()


class Best:
    """The masks with the lowest mean loss over the last `window` steps; before there are so many, the latest."""

    def __init__(self, start: torch.Tensor, window: int):
        self.vector, self.window, self.step = start.clone(), window, 0
        self.losses: list[float] = []
        self._lowest = float("inf")

    def add(self, loss: float, vector: torch.Tensor) -> None:
        """`vector`: the masks that had this loss."""
        self.losses.append(loss)
        mean = sum(self.losses[-self.window :]) / min(len(self.losses), self.window)
        if len(self.losses) < self.window or mean < self._lowest:
            self.vector, self.step = vector.detach().clone(), len(self.losses)
            self._lowest = mean if len(self.losses) >= self.window else float("inf")
