"""Fuzzed checkpoints through `export` and `convert`: one line or a whole output, soon, in little memory.

    python -m tests.fuzz --cases 10000 --output benchmarks/results/fuzz.json

A case is data: a family, a verb, a layout of files and edits that a grammar drew. So it can be kept: what
was found and mended is in tests/corpus, and ordinary tests run it again.
"""
