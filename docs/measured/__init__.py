"""Pages from the reports of measurements, in benchmarks/results."""

from pathlib import Path

REPORTS = Path(__file__).parents[2] / "benchmarks" / "results"
