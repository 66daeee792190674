"""Text at the edges of the command line: no traceback, and nothing lost."""

import json
import shutil

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models

import dijiang
from dijiang.cli import main
from dijiang.commands import printable
from tests.conftest import EXAMPLES, GOLDEN


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A bundle whose every token is a word that no 8-bit encoding has, and whose folder's name is none either."""
    folder = tmp_path_factory.mktemp("漢") / "checkpoint"
    shutil.copytree(GOLDEN["neox-base"], folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    vocab = {f"漢{number}\x1b": number for number in range(size)}
    Tokenizer(models.WordLevel(vocab, unk_token="漢0\x1b")).save(str(folder / "tokenizer.json"))
    return dijiang.export(folder, folder.parent / "bundle", verify=False, graph="primitive").path


def run(charset, *arguments, **options):
    return CliRunner(charset=charset).invoke(main, [str(a) for a in arguments], **options)


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_text_that_an_output_cannot_show_is_written_as_escapes(foreign, charset):
    model = dijiang.load(foreign)
    expected = "".join(record.text for record in model.generate("x", max_tokens=4))
    assert expected.count("漢") == 4
    found = run(charset, "run", foreign, "-p", "x", "-n", "4")
    assert found.exit_code == 0
    utf_8 = charset in ("utf-8", "ascii")  # click takes ASCII for a locale that was not set
    shown = found.stdout_bytes.decode("utf-8" if utf_8 else charset).removesuffix("\n")
    assert shown == (expected if utf_8 else expected.replace("漢", "\\u6f22"))
    assert run(charset, "inspect", foreign).exit_code == 0


@pytest.mark.parametrize("text", [b"caf\xe9", b"\xff\xfe", "lone \ud800".encode("utf-8", "surrogatepass")])
def test_input_that_is_not_utf_8_is_one_line(exported, text):
    found = run("utf-8", "run", exported("tiny-python"), input=text)
    assert found.exit_code == 1
    assert "is no Unicode; give text in UTF-8" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_prompt_that_is_not_utf_8_is_one_line(exported):
    """The system gives Python such an argument with lone surrogates."""
    found = run("utf-8", "run", exported("tiny-python"), "-p", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert found.exit_code == 1
    assert "character 3 of the text, '\\udce9', is no Unicode" in found.stderr


def test_names_in_a_file_cannot_command_the_terminal(edit_tensors, tmp_path):
    folder = edit_tensors(
        "neox-base", lambda tensors: tensors.update({"\x1b]0;x\x07": tensors["embed_out.weight"]})
    )
    found = run("utf-8", "export", folder, "-o", tmp_path / "b")
    assert found.exit_code == 1
    assert r"1 unexpected: \x1b]0;x\x07" in found.stderr
    assert printable("é漢\n\ud800") == "é漢\\n\\ud800"


def test_example_still_reads_standard_input(exported):
    text = (EXAMPLES / "tiny-python" / "held_out.txt").read_text()[:40]
    found = run("utf-8", "run", exported("tiny-python"), "-n", "3", "--json", input=text)
    assert json.loads(found.stdout)["generated"] == 3
