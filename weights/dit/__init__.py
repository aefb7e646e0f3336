"""Diffusion transformers: what their blocks are for, and where the tokens of their layers stand."""
