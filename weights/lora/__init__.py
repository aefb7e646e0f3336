"""What a LoRA is: names, factors, algebra, files."""
