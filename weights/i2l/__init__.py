"""Image-to-LoRA (arXiv 2606.13809): reference images to LoRA weights in one forward pass."""
