"""The parts of `benchmarks/mutate.py`: mutants, the map of covered lines, and the judge that runs the tests."""
