"""Where a layer's tokens stand in the picture."""

from __future__ import annotations

import sys

import pytest
from styleloom.weights.errors import StyleLoomError


@pytest.mark.parametrize(("tokens", "shapes", "due"), [
    (64, {"original_shape": (1, 4, 8, 8)}, (8, 8)),
    (9, {"original_shape": (1, 4, 5, 5)}, (3, 3)),  # a convolution with a stride of 2 rounds up
    (6, {"original_shape": (1, 4, 9, 5)}, (3, 2)),
    (4, {"original_shape": (1, 4, 1, 8)}, (1, 4)),
    (12, {"activations_shape": (1, 8, 3, 4), "original_shape": (1, 4, 64, 64)}, (3, 4)),
    (16, {"activations_shape": (1, 8, 3, 4), "original_shape": (1, 4, 8, 8)}, (4, 4)),
])  # fmt: skip
def test_the_grid_of_a_layer(pack, tokens, shapes, due):
    assert sys.modules[f"{pack.__name__}.nodes.host.style.mask_grid"].grid(tokens, shapes) == due


@pytest.mark.parametrize("shapes", [{"original_shape": (1, 4, 8, 8)}, {}])
def test_tokens_without_a_place(pack, shapes):
    with pytest.raises(Exception, match="a layer has 7 tokens for a latent of") as found:
        sys.modules[f"{pack.__name__}.nodes.host.style.mask_grid"].grid(7, shapes)
    assert type(found.value).__name__ == StyleLoomError.__name__
