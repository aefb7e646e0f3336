"""IP-Adapters: file formats, image projections, block tables, keys and values."""
