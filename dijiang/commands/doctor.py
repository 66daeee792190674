"""dijiang doctor."""

from __future__ import annotations

import click

from . import JSON, print_json


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Show what is installed, what will really be used, and what to do about the rest."""
    from ..doctor.diagnose import diagnose

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis)
        return
    for finding in diagnosis["findings"]:
        click.echo("{status:8} {name:27} {found}".format(**finding))
        if finding["next"]:
            click.echo(f"{'':36} -> {finding['next']}")
