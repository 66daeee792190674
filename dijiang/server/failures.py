"""What a request can be refused for, in the shape of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import DijiangError, InputError

#: Status -> what OpenAI calls the type of the error.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refused(DijiangError):
    """A request that is not served.

    status: of HTTP.  param: the field that is to blame.  code: for programs.  headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The answer."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal(error: DijiangError, folders: Mapping[str, str]) -> Refused:
    """What a client is told of an error: what it asked for was wrong, or a step failed.

    folders: of models -> what clients know instead.
    """
    known = (
        error
        if isinstance(error, Refused)
        else Refused(str(error), status=400 if isinstance(error, InputError) else 503)
    )
    told = str(known)
    for folder, name in folders.items():
        told = told.replace(folder, name)
    return Refused(told, status=known.status, param=known.param, code=known.code, headers=known.headers)
