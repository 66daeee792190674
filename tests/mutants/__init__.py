"""Random mutants of our code by cosmic-ray's operators: do the tests notice?

    python -m tests.mutants record tests/runtime      # once: which test runs which line, and how long it takes
    python -m tests.mutants run --first 0 --count 20  # of 300 that a seed draws
    python -m tests.mutants report --output benchmarks/results/mutants.json

A mutant changes one place of one module. Only the tests that run the changed line are asked, the quickest first,
until one fails. The file on the disk stays as it is: `site/` gives Python the other text at import.
"""
