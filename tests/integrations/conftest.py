"""Pages are run: every command block, in a folder where BUNDLE and CHECKPOINT are the shipped example."""

import os
import re
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import chromium, firefox
from tests.conftest import EXAMPLES

WEB = EXAMPLES.parent / "web"
PAGES = EXAMPLES.parent / "docs" / "integrations"
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
#: What a page says about installation is done by `make ecosystem`.
INSTALLS = re.compile(r"^pip install .*\n", re.MULTILINE)


@pytest.fixture
def page(exported, tmp_path):
    """page(name): run the blocks of docs/integrations/NAME.md in turn; what they printed."""

    def run(name: str) -> str:
        (tmp_path / "BUNDLE").symlink_to(exported("tiny-python"))
        (tmp_path / "CHECKPOINT").symlink_to(EXAMPLES / "tiny-python")
        programs = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
        blocks = BLOCK.findall((PAGES / f"{name}.md").read_text(encoding="utf-8"))
        assert blocks
        printed = []
        for language, code in blocks:
            command = [*programs[language], INSTALLS.sub("", code)]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
        return "".join(printed)

    return run


@pytest.fixture(scope="module")
def serve():
    """serve(bundle): the address of a server of the page and a bundle, and the server."""
    sys.path.insert(0, str(WEB))
    from serve import handler_for

    servers = []

    def start(bundle: Path, change=lambda handler: handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), change(handler_for(bundle)))
        hears = 0.02  # seconds until it hears of its end
        threading.Thread(target=server.serve_forever, args=[hears], daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/", server

    yield start
    sys.path.remove(str(WEB))
    for server in servers:
        server.shutdown()
        server.server_close()


#: A GPU in software, which a page sees as one.
ADAPTER = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
BROWSERS = {
    "chromium": (chromium.PROGRAM, lambda profile: chromium.Chromium(profile, *ADAPTER)),
    "firefox": (firefox.PROGRAM, firefox.Firefox),
}


@pytest.fixture(scope="session", params=BROWSERS)
def browser(request, tmp_path_factory):
    program, started = BROWSERS[request.param]
    if program is None:
        pytest.skip(f"no {request.param} here; .ci/run installs one")
    found = started(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def tab(browser):
    """A page of a browser that knows nothing yet; the test fails if the page raises."""
    with browser.tab() as found:
        yield found
        assert found.errors() == []
