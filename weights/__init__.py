"""What StyleLoom knows about tensors. Nothing in here imports the host."""
