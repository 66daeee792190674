"""Files and requests of strangers: one line or a whole output, soon, in little memory.

    python -m tests.fuzz --cases 10000 --output benchmarks/results/fuzz.json              # checkpoints
    python -m tests.fuzz states --cases 10000 --output benchmarks/results/fuzz-states.json

A case is data: what is changed, and edits that a grammar drew. So it can be kept: what was found and mended is in
tests/corpus, and ordinary tests run it again. Each class is a module with `draw_case` and `attempt`: bundles whose
hashes are right, saved states, reports, requests. Checkpoints are in `grammar` and `folders`.
"""
