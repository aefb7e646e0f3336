"""LoHa: ΔW = alpha/rank · (w1_a w1_b) ∘ (w2_a w2_b), the product of two low-rank matrices entry by entry.

On convolutions LyCORIS may write each of the two in Tucker form: tᵢ (rank, rank, *kernel), wᵢ_a (rank, out), wᵢ_b
(rank, in).
"""

from __future__ import annotations

import torch

from ...row_adapters.terms import Term
from ..algebra import thin_svd
from ..low_rank import LowRank
from .base import ALPHA, AddedKind, Parts, Place, columns, multiplied_out, size, weight_only, wide

_MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


class LoHaKind(AddedKind):
    """w1_a, w2_a (out, rank); w1_b, w2_b (rank, in·kernel)."""

    name = "LoHa"
    endings = {name: rf"\.{name}" for name in (*_MATRICES, *_CORES)} | ALPHA
    needed = _MATRICES
    host_name = "loha"
    host_order = ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", *_CORES, "dora")

    def problem(self, parts: Parts) -> tuple[str, str] | None:
        cores = [parts[name] for name in _CORES if parts.get(name) is not None]
        a, b, c, d = (parts[name] for name in _MATRICES)
        if len(cores) == 1:
            return "only one half of it has a core", "hada_t1 and hada_t2, or none of them"
        if cores:
            (s, t), halves = cores, ((a, b), (c, d))
            fit = all(
                core.shape[:2] == (left.shape[0], right.shape[0])
                for core, (left, right) in zip(cores, halves)
            )
            fit = fit and a.shape[1] == c.shape[1] and b.shape[1] == d.shape[1] and s.shape[2:] == t.shape[2:]
        else:
            fit = a.shape[1] == b.shape[0] and c.shape[1] == d.shape[0]
            fit = fit and a.shape[0] == c.shape[0] and columns(b) == columns(d)
        if fit:
            return None
        return f"the parts of a LoHa do not fit together: {', '.join(size(t) for t in (a, b, c, d, *cores))}", (
            "two products of matrices, of one size"
        )

    def rank(self, parts: Parts) -> int:
        return parts["hada_w1_b"].shape[0]

    def shapes(self, parts: Parts) -> list[tuple[int, int | None]]:
        left, right, core = parts["hada_w1_a"], parts["hada_w1_b"], parts.get("hada_t1")
        if core is None:
            return [(left.shape[0], columns(right))]
        return [(left.shape[1], right.shape[1] * columns(core[0]))]

    def kernel(self, parts: Parts) -> tuple[int, ...]:
        core = parts.get("hada_t1")
        return tuple((parts["hada_w1_b"] if core is None else core).shape[2:])

    def _halves(self, parts: Parts) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each of the two matrices as (out, rank) times (rank, in·kernel)."""
        found = []
        for number in (1, 2):
            left, right = wide(parts[f"hada_w{number}_a"]), wide(parts[f"hada_w{number}_b"])
            core = parts.get(f"hada_t{number}")
            if core is not None:
                left, right = left.T, torch.einsum("ij...,jr->ir...", wide(core), right)
            found.append((left, right.flatten(1)))
        return found

    def change(self, parts: Parts) -> torch.Tensor:
        (a, b), (c, d) = self._halves(parts)
        return (a @ b) * (c @ d) * self.scale(parts)

    def low_rank(self, parts: Parts) -> LowRank:
        """The rows and columns of the two products multiply one by one: (a b) ∘ (c d) = up · down with up[:, (i, j)] =
        a[:, i] c[:, j] and down[(i, j), :] = b[i] d[j], of rank r₁·r₂ (face-splitting product)."""
        (a, b), (c, d) = self._halves(parts)
        if a.shape[1] * c.shape[1] < min(a.shape[0], b.shape[1]):
            up = (a[:, :, None] * c[:, None, :]).flatten(1)
            down = (b[:, None, :] * d[None, :, :]).flatten(0, 1)
        else:  # as many products as the matrix has rows or columns: the matrix itself is the smaller form
            up, down = (a @ b) * (c @ d), torch.eye(b.shape[1], dtype=b.dtype, device=b.device)
        return thin_svd(down, up * self.scale(parts)).low_rank(self.kernel(parts))

    def row_form(self, parts: Parts, place: Place) -> Term | LowRank:
        weight_only(self, place)
        return multiplied_out(self, parts, place)
