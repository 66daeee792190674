"""The page of web/ where a server, a network or a browser does less than it may: it runs, or says why not."""

import gzip

import pytest

from tests.firefox import PROGRAM as FIREFOX
from tests.firefox import Firefox
from tests.integrations.test_browser import PROMPTS, SCRIPT, ours, ready, write

pytestmark = pytest.mark.ecosystem
STATUS = "document.getElementById('status').textContent"
BUTTONS = "!document.getElementById('write').disabled"


def answering(answer):
    """A server that answers as `answer(path)` says: body, headers, bytes of it that are sent; None: as it does."""

    def wrap(handler):
        class Other(handler):
            def do_GET(self):
                found = answer(self.path)
                if found is None:
                    return super().do_GET()
                body, headers, sent = found
                self.send_response(200)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body[:sent])
                self.close_connection = True

        return Other

    return wrap


def test_the_page_works_below_any_path(serve, tab, exported):
    def below(handler):
        class Below(handler):
            def do_GET(self):
                if not self.path.startswith("/deep/er/"):
                    return self.send_error(404)
                self.path = self.path.removeprefix("/deep/er")
                return super().do_GET()

        return Below

    bundle = exported("tiny-python")
    address, server = serve(bundle, below)
    tab.goto(f"{address}deep/er/")
    write(tab)
    tab.until("navigator.serviceWorker.controller !== null")
    tab.reload()
    ready(tab)
    server.shutdown()
    server.server_close()
    tab.reload()
    write(tab)
    assert tab.text("#text") == PROMPTS[0] + ours(bundle, PROMPTS[0], 100)[1]


@pytest.mark.parametrize("encoding", ["gzip", None])
def test_progress_needs_no_length_and_survives_compression(serve, tab, exported, encoding):
    bundle = exported("tiny-python")
    weights = (bundle / "model.onnx.data").read_bytes()
    packed = gzip.compress(weights, 1)
    headers = {"Content-Encoding": "gzip", "Content-Length": str(len(packed))} if encoding else {}
    body = packed if encoding else weights
    answers = answering(lambda path: (body, headers, None) if path.endswith(".data") else None)
    tab.goto(serve(bundle, answers)[0])
    ready(tab)
    tab.run("caches.delete('dijiang')")
    done = tab.evaluate(SCRIPT, [PROMPTS[:1], 20, {}])
    assert done["progress"] == [len(weights)] * 2
    assert done["found"][0][0] == ours(bundle, PROMPTS[0], 20)[0]


def test_a_download_that_ends_early_is_said_and_taken_up_by_a_reload(serve, tab, exported):
    bundle = exported("tiny-python")
    weights = (bundle / "model.onnx.data").read_bytes()
    sent = [len(weights) // 2]
    headers = {"Content-Length": str(len(weights))}
    answers = answering(lambda path: (weights, headers, sent[0]) if path.endswith(".data") else None)
    address, _ = serve(bundle, answers)
    tab.goto(address)
    tab.until(f"{STATUS}.includes('ended after')")
    line = tab.text("#status")
    assert line.endswith(f"data: ended after {sent[0]} of {len(weights)} bytes; load the page again")
    sent[0] = None
    tab.reload()
    write(tab)


def test_what_is_no_manifest_is_said_and_not_kept(serve, tab, exported):
    """A network that wants a password first answers everything with its own page."""
    portal = [False]
    page = (b"<!DOCTYPE html>", {"Content-Type": "text/html"}, None)
    answers = answering(lambda path: page if portal[0] and path.endswith("dijiang.json") else None)
    address, server = serve(exported("tiny-python"), answers)
    tab.goto(address)
    ready(tab)
    portal[0] = True
    tab.reload()
    tab.until(f"{STATUS}.includes('dijiang.json: no manifest, expected a bundle')")
    server.shutdown()
    server.server_close()
    tab.reload()
    ready(tab)
    assert tab.text("#status").startswith("cpu")


def test_of_two_tabs_the_second_to_keep_a_text_is_told(serve, tab, exported):
    bundle = exported("tiny-python")
    address, _ = serve(bundle)
    tab.goto(address)
    ready(tab)
    tab.run("document.body.append(Object.assign(document.createElement('iframe'), { src: location.href }))")
    other = "document.querySelector('iframe').contentDocument"
    tab.until(f"{other}.getElementById('write')?.disabled === false")
    write(tab)
    tab.run(f"{other}.getElementById('write').click()")
    tab.until(f"{other}.getElementById('status').textContent.includes('not kept')")
    line = tab.run(f"{other}.getElementById('status').textContent")
    assert line.endswith("the text is not kept: another tab has gone on with it; load the page again to see how")
    write(tab)  # the one whose text is kept goes on
    expected = PROMPTS[0] + ours(bundle, PROMPTS[0], 100)[1]
    assert tab.text("#text") == expected
    tab.reload()
    ready(tab)
    assert tab.text("#text") == expected


def works_and_keeps_nothing(tab, address, bundle):
    """Text is written, twice; why it is not kept is said, and the buttons come back."""
    tab.goto(address)
    tab.until(f"{BUTTONS} || {STATUS} !== 'Loading the bundle'")
    for count in (50, 100):
        write(tab)
        assert tab.text("#text") == PROMPTS[0] + ours(bundle, PROMPTS[0], count)[1]
        assert "; the text is not kept: " in tab.text("#status")
        assert "\n" not in tab.text("#status")


@pytest.mark.parametrize("browser", ["chromium"], indirect=True)
def test_chromium_without_room_says_that_the_text_is_not_kept(serve, tab, exported):
    bundle = exported("tiny-python")
    address, _ = serve(bundle)
    tab.call("Storage.overrideQuotaForOrigin", origin=address.rstrip("/"), quotaSize=1)
    works_and_keeps_nothing(tab, address, bundle)


@pytest.mark.skipif(FIREFOX is None, reason="no Firefox here; .ci/run installs one")
@pytest.mark.parametrize(
    "preferences",
    [{"network.cookie.cookieBehavior": 2}, {"dom.quotaManager.temporaryStorage.fixedLimit": 300}],
    ids=["storage refused", "no room"],
)
def test_firefox_without_storage_says_that_the_text_is_not_kept(serve, exported, tmp_path, preferences):
    bundle = exported("tiny-python")
    firefox = Firefox(tmp_path, preferences)
    with firefox.tab() as tab:
        works_and_keeps_nothing(tab, serve(bundle)[0], bundle)
    firefox.close()


@pytest.mark.skipif(FIREFOX is None, reason="no Firefox here; .ci/run installs one")
def test_a_private_window_and_a_tab_in_the_background(serve, exported, tmp_path):
    bundle = exported("tiny-python")
    firefox = Firefox(tmp_path, {"browser.privatebrowsing.autostart": True})
    with firefox.tab() as tab:
        tab.goto(serve(bundle)[0])
        with firefox.tab():
            tab.until("document.hidden")
            write(tab)
        assert tab.text("#text") == PROMPTS[0] + ours(bundle, PROMPTS[0], 50)[1]
        tab.reload()
        ready(tab)
        assert tab.text("#text") == PROMPTS[0] + ours(bundle, PROMPTS[0], 50)[1]
    firefox.close()
