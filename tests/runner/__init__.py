"""What `run.py` is made of: the standard library only, Python 3.10 or later, no import of the pack or the host.

`run.py` loads this folder as the package `styleloom_runner`, by path, so that the repository's root never
has to be on `sys.path` (it holds a folder `nodes`, and that name belongs to the host).
"""
