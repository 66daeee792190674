"""Pages of other ports: those of this machine may ask and read, in a browser; others get nothing."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import dijiang
from tests.chromium import PROGRAM, Chromium
from tests.server.serving import running

#: Asks as clients in JavaScript do: JSON, and a key. What comes back, or what the browser says.
ASK = """async ([url, key, stream]) => {
  const headers = {"Content-Type": "application/json", "Authorization": `Bearer ${key}`, "X-Stainless-Lang": "js"};
  const body = JSON.stringify({model: "tiny", prompt: "def ", max_tokens: 3, stream});
  try {
    const answer = await fetch(`${url}/completions`, {method: "POST", headers, body});
    return [answer.status, await answer.text()];
  } catch (error) { return [0, String(error)]; }
}"""


@pytest.fixture(scope="module")
def models(chatty):
    return {"tiny": dijiang.load(chatty, threads=1)}


@pytest.fixture(scope="module")
def other():
    """Port of a server of empty pages."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; .ci/run installs one")
@pytest.mark.parametrize("key", [None, "secret"])
def test_page_of_another_port_of_this_machine_asks_in_a_browser(tmp_path, models, other, key):
    browser = Chromium(tmp_path)
    try:
        with running(models, api_key=key, slots=1) as server, browser.tab() as tab:
            tab.goto(f"http://localhost:{other}/")
            for stream in (False, True):
                status, text = tab.evaluate(ASK, [server.url, "secret", stream])
                assert status == 200
                assert ("[DONE]" in text) == stream
            if key is not None:
                assert tab.evaluate(ASK, [server.url, "wrong", False])[0] == 401  # and the page may read why
    finally:
        browser.close()


def test_page_of_another_site_may_not_ask(models):
    asked = ["Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type"]
    with running(models, api_key="secret", slots=1) as server:
        for origin, status in (("https://example.org", 400), ("http://localhost:5173", 200), ("null", 400)):
            headers = [f"Origin: {origin}", *asked]
            found = server.ask("/v1/completions", method="OPTIONS", headers=headers)
            assert found[0] == status
            assert found[1].get("access-control-allow-origin") == (origin if status == 200 else None)
            key = [f"Origin: {origin}", "Authorization: Bearer secret"]
            assert ("access-control-allow-origin" in server.ask("/v1/models", headers=key)[1]) == (status == 200)
