"""Sampling with one LoRA state on each side of guidance."""
