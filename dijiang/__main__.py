"""`python -m dijiang`."""

from .cli import main

main(prog_name="dijiang")
