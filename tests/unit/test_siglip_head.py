"""SigLIP's pooling head against transformers' own class."""

from __future__ import annotations

import pytest
import torch
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.ip_adapter.siglip_head import PREFIX, pooled, read_head
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

WIDTH = 144  # two heads of 72


@pytest.fixture(scope="module")
def theirs():
    config = SiglipVisionConfig(hidden_size=WIDTH, intermediate_size=200, num_attention_heads=2)
    head = SiglipMultiheadAttentionPoolingHead(config).eval()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return head


def test_it_is_transformers_head(theirs):
    file = {PREFIX + key: value for key, value in theirs.state_dict().items()} | {"vision_model.other": torch.zeros(1)}
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(4))
    made = pooled(read_head("x", file, WIDTH), x)
    with torch.no_grad():
        due = theirs.double()(x.double())
    theirs.float()
    assert made.shape == (3, WIDTH) and float((made - due).norm() / due.norm()) < 1e-6


@pytest.mark.parametrize("key", ["probe", "attention.in_proj_bias", "mlp.fc1.weight", "layernorm.weight"])
def test_a_file_without_it_is_refused(theirs, key):
    file = {PREFIX + name: value for name, value in theirs.state_dict().items()}
    with pytest.raises(StyleLoomError, match=f"siglip_head is x, and {PREFIX}"):
        read_head("x", {name: value for name, value in file.items() if name != PREFIX + key}, WIDTH)
    with pytest.raises(StyleLoomError, match="where"):
        read_head("x", file, WIDTH + 1)
