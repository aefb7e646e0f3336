"""Diffusion transformers: what their blocks are for."""
