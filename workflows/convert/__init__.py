"""Rewrites workflows of other packs to StyleLoom's nodes. Standard library only; imported by run.py, not by the host.

`graph` reads and writes both forms of a workflow, `their_nodes` and `our_nodes` are tables of nodes, `rules` is how one
becomes the other.
"""
