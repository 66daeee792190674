"""Serve this folder on this machine, with a bundle as bundle/, so that WebAssembly may use threads.

python web/serve.py BUNDLE [PORT]
"""

import argparse
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parent
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
#: Threads share memory: a browser gives it only to pages that are isolated.
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


def handler_for(bundle: Path) -> type[SimpleHTTPRequestHandler]:
    """What answers for the page and a bundle."""

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = SimpleHTTPRequestHandler.extensions_map | {
            ".mjs": "text/javascript",
            ".wasm": "application/wasm",
        }

        def translate_path(self, path: str) -> str:
            rest = path.split("?")[0].removeprefix("/bundle/")
            self.directory = str(PAGE if rest == path.split("?")[0] else bundle)
            return super().translate_path(path if self.directory == str(PAGE) else f"/{rest}")

        def end_headers(self) -> None:
            for name, value in HEADERS.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("port", type=int, nargs="?", default=8000)
    args = parser.parse_args()
    if not (args.bundle / "dijiang.json").is_file():
        sys.exit(f"{args.bundle}: no dijiang.json, so not a bundle; run dijiang export first")
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), handler_for(args.bundle))
    except (OSError, OverflowError) as error:
        sys.exit(f"port {args.port} cannot be listened on ({error}); choose another port")
    with server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
