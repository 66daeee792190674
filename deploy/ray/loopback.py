"""Replicas on this machine alone, for tests and measurements."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built

HERE = Path(__file__).parent


@contextmanager
def on_loopback(seal_key: str, **arguments: object) -> Iterator[str]:
    """Ray and its proxy on 127.0.0.1, reporting to nobody; the address of the API. See `replicas.Arguments`."""
    given = {"DIJIANG_SEAL_KEY": seal_key, "RAY_USAGE_STATS_ENABLED": "0"}
    given["PYTHONPATH"] = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    before = dict(os.environ)
    os.environ.update(given)
    sys.path.insert(0, str(HERE))
    from replicas import application

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        # As `serve run` calls it, with texts.
        serve.run(built(application, {name: str(value) for name, value in arguments.items()}))
        yield f"http://127.0.0.1:{port}/v1"
        serve.shutdown()
    finally:
        ray.shutdown()
        sys.path.remove(str(HERE))
        os.environ.clear()
        os.environ.update(before)
