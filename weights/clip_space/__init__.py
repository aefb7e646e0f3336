"""The space that CLIP's pictures and texts share: which towers belong together, and taking a concept away."""
