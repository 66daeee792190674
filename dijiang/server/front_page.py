"""The page at `/`: three files of the package, and what a browser may do with them."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).with_name("browser")
#: Address -> file and type. The files name each other without a slash, so a proxy may serve them under any path.
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
#: The page may load its own files and ask its own server. A mistake of ours cannot make HTML or a script of a text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


async def page(request: Request) -> Response:
    """One of the files. They are the same for everybody, so they need no key."""
    name, kind = FILES[request.scope["path"]]
    return Response((FOLDER / name).read_bytes(), headers=HEADERS, media_type=kind)
