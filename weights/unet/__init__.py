"""The blocks of SDXL's and SD1.5's UNets."""
