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

HERE = Path(__file__).parent


@contextmanager
def on_loopback(seal_key: str, **arguments: object) -> Iterator[str]:
    """Ray and its proxy on 127.0.0.1, reporting to nobody; the address of the API. See `replicas.Arguments`."""
    given = {"DIJIANG_SEAL_KEY": seal_key, "RAY_USAGE_STATS_ENABLED": "0"}
    given["PYTHONPATH"] = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    before = dict(os.environ)
    os.environ.update(given)
    sys.path.insert(0, str(HERE))
    from replicas import Arguments, application

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(Arguments.model_validate(arguments)))
        yield f"http://127.0.0.1:{port}/v1"
        serve.shutdown()
    finally:
        ray.shutdown()
        sys.path.remove(str(HERE))
        os.environ.clear()
        os.environ.update(before)
