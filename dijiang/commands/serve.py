"""dijiang serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..environment import API_KEY, SEAL_KEY, value_of
from ..runtime.options import Loading
from ..server.settings import Serving
from . import flag_of, model_folder, options_of, refuse_given, say, taken


@click.command()
@model_folder("bundles", nargs=-1, required=True)
@options_of(Serving, Loading)
@click.option("--json-logs", is_flag=True, help="One line of JSON an answer on stderr.")
def serve(bundles: tuple[Path, ...], json_logs: bool, **options: Any) -> None:
    """Serve BUNDLES by OpenAI's API: each under its folder's name, or as ORG/NAME.

    DIJIANG_API_KEY: the key that clients send. DIJIANG_SEAL_KEY: seals states, 32 characters or more.
    """
    from ..server.process import serve as run

    for folder, disk in (("prefix_folder", "prefix_disk"), ("conversation_folder", "conversation_disk")):
        if options[folder] is None:
            refuse_given((disk,), f"without {flag_of(folder)}")
    loading = taken(Loading, options)
    run(
        bundles,
        Serving.of(options),
        loading,
        api_key=value_of(API_KEY),
        seal_key=value_of(SEAL_KEY),
        say=say,
        logs=json_logs,
    )
