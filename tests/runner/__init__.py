"""What `run.py` is made of; no import of the pack or the host.

`run.py` loads this folder as the package `styleloom_runner`, by path, so that the repository's root never
has to be on `sys.path` (it holds a folder `nodes`, and that name belongs to the host). What `run.py` itself imports
is standard library only, for Python 3.10 or later: `common`, `host`, `environment`, `browser` and `parts`. The others
run in the Python that these have prepared, where the host's own packages are: `client`, `server`, `demo` and
`sharing`.
"""
