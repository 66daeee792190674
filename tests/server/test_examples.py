"""What docs/serve.md tells to type is taken."""

import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

from dijiang.runtime.chat_template import ChatTemplate

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_request_from_a_shell_is_answered(served):
    program, url, header, kind, data, body = shlex.split(block("sh").replace("BUNDLE", "tiny").replace("\\\n", ""))
    assert (program, header, data) == ("curl", "-H", "-d")
    status, _, found = served.ask(urlsplit(url).path, body.encode(), headers=[kind])
    assert status == 200
    assert found["usage"]["completion_tokens"] == 32


def test_template_writes_messages_as_comments_and_begins_the_answer():
    messages = [{"role": "user", "content": "hi"}]
    assert ChatTemplate(block("jinja"), {}).render(messages) == "# user: hi\n# assistant: "
    assert ChatTemplate(block("jinja"), {}).render(messages, answer=False) == "# user: hi\n"


def test_every_figure_stands_in_the_table(served):
    served.ask("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1})
    served.raw(b"nonsense\r\n\r\n")
    text = served.ask("/metrics")[2]
    told = dict(re.findall(r"^# TYPE (dijiang_\w+) (\w+)$", text, re.MULTILINE))
    found = {name: kind for name, kind in told.items() if not name.endswith("_created")}
    rows = re.findall(r"^\| `(dijiang_\w+)` \| (\w+) \| (.*?) ?\| .* \|$", PAGE, re.MULTILINE)
    assert {name: kind for name, kind, _ in rows} == found
    for name, _, labels in rows:
        (sample,) = re.findall(rf"^{name}(?:_sum)?(?:{{(.*)}})? .*$", text, re.MULTILINE)[:1]
        assert re.findall(r"(\w+)=", sample) == re.findall(r"`(\w+)`", labels), name
