"""`dijiang serve` as replicas of Ray Serve.

    export PYTHONPATH=$PWD/deploy/ray
    serve run replicas:application bundle=/models/NAME replicas=2 most=8

A conversation needs no replica of its own: its sealed state travels with the request. So every replica needs the
same DIJIANG_SEAL_KEY in its environment, and DIJIANG_API_KEY where others can reach Ray's proxy.
"""

import os
import socket
from pathlib import Path
from typing import Any

import pydantic
from ray import serve

from dijiang.errors import InputError
from dijiang.server.process import build, loaded
from dijiang.server.settings import Serving

#: Seconds between two looks at a replica, and until one that says nothing is replaced.
LOOK, PATIENCE = 2.0, 10.0


class Arguments(pydantic.BaseModel, extra="forbid"):
    """What `serve run` is told.

    bundle: a folder that every node has, or several with commas.  replicas, most: least and most of them; they
    are added where each has more than `slots` requests.  slots, queue: of a replica.  threads: cores of a replica.
    """

    bundle: str
    replicas: int = 2
    most: int | None = None
    slots: int = 16
    queue: int = 64
    threads: int = 1


@serve.ingress()
class Replica:
    """One server. Ray calls what stands below."""

    def __init__(self, given: Arguments) -> None:
        seal_key = os.environ.get("DIJIANG_SEAL_KEY")
        if not seal_key:
            raise InputError("DIJIANG_SEAL_KEY is not set: replicas could not take each other's states; set it")
        models = loaded([Path(path) for path in given.bundle.split(",")], {"threads": given.threads})
        settings = Serving.of({"slots": given.slots, "queue": given.queue})
        self.server = build(models, settings, api_key=os.environ.get("DIJIANG_API_KEY") or None, seal_key=seal_key)

    def __serve_build_asgi_app__(self) -> Any:
        return naming(self.server.app(), f"{socket.gethostname()}:{os.getpid()}")

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if dead := [name for name, hosted in self.server.models.items() if not hosted.alive]:
            raise RuntimeError(f"{', '.join(dead)} takes no steps")


def naming(app: Any, name: str) -> Any:
    """An ASGI application whose answers say in `X-Replica` who gave them."""

    async def named(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-replica", name.encode())]
            await send(message)

        await app(scope, receive, sent)

    return named


def application(given: Arguments) -> serve.Application:
    """For `serve run`."""
    scale = {"min_replicas": given.replicas, "max_replicas": given.most or given.replicas}
    deployment = serve.deployment(
        name="dijiang",
        ray_actor_options={"num_cpus": given.threads},
        max_ongoing_requests=given.slots + given.queue,
        autoscaling_config=scale | {"target_ongoing_requests": given.slots},
        health_check_period_s=LOOK,
        health_check_timeout_s=PATIENCE,
    )
    return deployment(Replica).bind(given)
