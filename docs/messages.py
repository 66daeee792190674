"""The page of all messages, from the `raise` lines of the package."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from dijiang import environment, errors

PACKAGE = Path(errors.__file__).parent
#: Sources of the compiled operators, and what they say.
NATIVE, FAILED = PACKAGE.parent / "native", re.compile(r'api\.fail\("([^"]+)"\)')
CLASSES = {name: found for name, found in vars(errors).items() if inspect.isclass(found)}
#: Names that a message writes out, as those of variables of the environment.
NAMES = {name: value for name, value in vars(environment).items() if name.isupper() and isinstance(value, str)}
ERRORS = """# Messages

This page is made from the code by `make docs`. Do not edit it.

Each error is one line: the fact, found against expected, and what to do next. A command ends with exit status 1,
or with 2 where the command line by itself shows it, as an option that does not exist. In Python it is an
exception of the class that is named here. `{...}` stands for what differs from case to case.

"""


def template(node: ast.expr) -> str | None:
    """A message with what differs as `{...}`; None where the line only passes on a text from elsewhere."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.FormattedValue(value=ast.Name(id=name)) if name in NAMES:
            return NAMES[name]
        case ast.JoinedStr(values=parts):
            return "".join("{...}" if (text := template(part)) is None else text for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return f"{template(left) or '{...}'}{template(right) or '{...}'}"
        case ast.Call(args=[first, *_]):
            return template(first)
        case _:
            return None


def raised(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(class, message) of each line that makes an error of ours."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in CLASSES:
                text = template(first)
                if text and any(letter.isalpha() for letter in text.replace("{...}", "")):
                    yield name, " ".join(text.split())


def of_operators() -> str:
    """What the compiled operators say of a graph or a step."""
    sources = [file.read_text(encoding="utf-8") for file in sorted(NATIVE.glob("*.[ch]*"))]
    return "\n".join(sorted({text for source in sources for text in FAILED.findall(source)}))


def messages() -> str:
    """Every message, by its class and the room that says it."""
    found: dict[str, dict[str, set[str]]] = {name: {} for name in CLASSES}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name, text in raised(ast.parse(file.read_text(encoding="utf-8"))):
            found[name].setdefault(room, set()).add(text)
    parts = [ERRORS]
    for name, rooms in found.items():
        if rooms:
            parts.append(f"## {name}\n\n{inspect.getdoc(CLASSES[name])}\n")
        for room, texts in sorted(rooms.items()):
            lines = "\n".join(sorted(texts, key=str.casefold))
            parts.append(f"In `dijiang.{room}`:\n\n```text\n{lines}\n```\n")
    advice = "A `SessionError` says them; where there is no advice, export the bundle again."
    parts.append(f"## Of the compiled operators\n\n{advice}\n\n```text\n{of_operators()}\n```\n")
    return "\n".join(parts)
