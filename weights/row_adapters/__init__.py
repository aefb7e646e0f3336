"""Adding what a LoRA does to some rows of a batch only: the mathematics of asymmetric guidance."""
