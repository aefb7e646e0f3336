"""The signature that all methods share, and what several of them need."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ...lora.algebra import ThinSVD
from ...lora.low_rank import LowRank


@dataclass(frozen=True)
class Options:
    """What a method may need to know.

    count: LoRAs in the merge, with or without this layer; 0: as many as there are changes. rank: that a method which
    has to form the whole matrix may keep (others ignore it). density: share of entries that
    TIES and DARE keep. mu: NP-LoRA's strength of projection. ridge: of the router, relative. seed and target: decide
    what is random.
    """

    count: int = 0
    rank: int = 64
    density: float = 0.5
    mu: float = 0.5
    ridge: float = 0.1
    seed: int = 0
    target: str = ""

    def generator(self, purpose: str) -> torch.Generator:
        """Depends on the seed, the layer and the purpose, never on the order of the layers."""
        digest = hashlib.sha256(f"{self.seed}|{self.target}|{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stacked(changes: list[ThinSVD]) -> tuple[torch.Tensor, torch.Tensor]:
    """(down (R, in) with orthonormal rows in each block, up (out, R)) of all changes side by side."""
    return torch.cat([c.down for c in changes]), torch.cat([c.up * c.values for c in changes], 1)


def dense(change: ThinSVD) -> torch.Tensor:
    """The whole matrix. For methods that work on single entries only."""
    return (change.up * change.values) @ change.down


def best_factors(
    matrix: torch.Tensor, rank: int, generator: torch.Generator, rounds: int = 3
) -> tuple[LowRank, float]:
    """About the best approximation of a matrix of that rank, and the share of ‖matrix‖² that it keeps.

    A randomised range finder with power iterations (Halko, Martinsson and Tropp, 2011), or the SVD itself where the
    rank is not small.
    """
    out, inner = matrix.shape
    wide = rank + 16
    if 2 * wide >= min(out, inner):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        q = matrix @ torch.randn(inner, wide, generator=generator, dtype=matrix.dtype)
        for _ in range(rounds):
            q = torch.linalg.qr(q).Q
            q = matrix @ torch.linalg.qr(matrix.T @ q).Q
        q = torch.linalg.qr(q).Q
        u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        u = q @ u
    k = min(rank, int((s > 1e-6 * s[0]).sum())) if s.numel() and float(s[0]) > 0 else 0
    total = float(matrix.double().square().sum())
    energy = min(1.0, float(s[:k].double().square().sum()) / total) if total > 0 else 1.0
    return ThinSVD(vh[:k], s[:k], u[:, :k]).low_rank(), energy
