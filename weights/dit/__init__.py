"""Diffusion transformers: where the tokens of their layers stand."""
