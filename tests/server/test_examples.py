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
