"""The kit keeps its promises: true layer counts and names, real tokenizers, sampling that neither dies nor explodes."""

from __future__ import annotations

import pytest
import torch

PUBLISHED_HASHES = {  # i2L's own fact sheets: MD5 over names and shapes
    "qwen style": "0aad514690602ecaff932c701cb4b0bb",
    "qwen coarse": "a166c33455cdbd89c0888a3645ca5c0f",
    "qwen fine": "a5476e691767a4da6d3a6634a10f7408",
    "z-image 128": "9510cb8cd1dd34ee0e4f111c24905510",
    "z-image 64": "4f04fa4db33673882c675f426bf42602",
    "z-image 256": "cd7427f65cd4cc8092c00c373e2e0a23",
    "siglip2": "469c78b61e3e31bc9eec0d0af3d3f2f8",
    "dinov3": "5722b5c873720009de96422993b15682",
}


def test_key_lists_reproduce_the_published_hashes(kit):
    k = kit.key_lists
    found = {
        "qwen style": k.predictor_keys("qwen-image", compress=64),
        "qwen coarse": k.predictor_keys("qwen-image", compress=128, residual="coarse"),
        "qwen fine": k.predictor_keys("qwen-image", compress=128, residual="fine"),
        "z-image 128": k.predictor_keys("z-image", compress=128),
        "z-image 64": k.predictor_keys("z-image", compress=64),
        "z-image 256": k.predictor_keys("z-image", compress=256),
        "siglip2": k.siglip2_keys(),
        "dinov3": k.dinov3_keys(),
    }
    assert {name: k.key_hash(keys) for name, keys in found.items()} == PUBLISHED_HASHES
