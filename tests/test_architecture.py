"""The house rules that a reader of the tree may count on."""

import ast
from collections import Counter
from dataclasses import fields
from pathlib import Path

import grimp
import pytest

from dijiang.cli import main
from dijiang.models.load import FAMILIES
from dijiang.recipe import GRAPHS, PRECISIONS, PROVIDERS, SCHEMES, TARGETS
from dijiang.runtime.options import Generation, Loading
from dijiang.server.fields import CHAT, COMPLETION, STREAM_OPTIONS, TOKENIZE

PACKAGE = Path(__file__).parent.parent / "dijiang"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {*PRECISIONS, *GRAPHS, *PROVIDERS, *SCHEMES, *TARGETS, *FAMILIES}
#: The tables, and the functions that resolve them.
TABLES = {*PACKAGE.glob("recipe/*.py"), PACKAGE / "runtime" / "sessions" / "providers.py"}


def strings(node):
    """String constants of an operand, those of a literal collection included."""
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return set().union(*map(strings, node.elts))
    if isinstance(node, ast.Dict):
        return set().union(*(strings(key) for key in node.keys if key is not None))
    if isinstance(node, ast.Call):  # frozenset({...})
        return set().union(*map(strings, node.args))
    return set()


def comparisons(tree):
    """Every string that is compared with: ==, !=, in, not in, match, startswith, endswith."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for operand in (node.left, *node.comparators):
                yield from ((node.lineno, found) for found in strings(operand))
        elif isinstance(node, ast.MatchValue):
            yield from ((node.value.lineno, found) for found in strings(node.value))
        elif getattr(getattr(node, "func", None), "attr", None) in ("startswith", "endswith"):
            yield from ((node.lineno, found) for arg in node.args for found in strings(arg))


def test_names_are_compared_in_the_tables_only():
    found = [
        f"{file.relative_to(PACKAGE)}:{line} {name}"
        for file in FILES
        if file not in TABLES
        for line, name in comparisons(ast.parse(file.read_text(encoding="utf-8")))
        if name in NAMES and not (name in FAMILIES and "models" in file.parts)
    ]
    assert found == []


@pytest.mark.parametrize("code", ["x == 'fp32'", "x in ('a', 'cuda')", "x.startswith('tensorrt')", "x in {'ort'}"])
def test_the_rule_sees_what_it_forbids(code):
    assert [name for _, name in comparisons(ast.parse(code)) if name in NAMES]


def test_there_are_no_import_cycles_not_even_of_types():
    graph = grimp.build_graph("dijiang", exclude_type_checking_imports=False)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    state: dict[str, int] = {}

    def visit(module, path):
        if state.get(module) == 2:
            return []
        if state.get(module) == 1:
            return [*path[path.index(module) :], module]
        state[module] = 1
        for other in sorted(imported[module]):
            cycle = visit(other, [*path, module])
            if cycle:
                return cycle
        state[module] = 2
        return []

    cycles = [cycle for module in sorted(graph.modules) if (cycle := visit(module, []))]
    assert cycles == []


def test_no_two_files_have_the_same_name():
    names = Counter(file.name for file in FILES if file.name != "__init__.py" and file.parent.name != "commands")
    assert [name for name, count in names.items() if count > 1] == []


def test_every_verb_is_a_file_of_its_own():
    verbs = {file.stem for file in (PACKAGE / "commands").glob("[a-z]*.py")}
    assert set(main.commands) == verbs


def places(word, folders):
    """Files where a name is a parameter, a keyword, a field or read from the options."""
    found = set()
    for file in FILES:
        if file.relative_to(PACKAGE).parts[0] not in folders:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            declared = getattr(node, "arg", None) == word
            field = isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == word
            owner = getattr(getattr(node, "value", None), "id", None)
            read = getattr(node, "attr", None) == word and owner in ("self", "options")
            if declared or field or read:
                found.add(file.relative_to(PACKAGE).as_posix())
    return found


@pytest.mark.parametrize("name", [one.name for one in fields(Generation)])
def test_a_flag_of_run_is_in_two_places(name):
    """Where it is declared, which makes the flag, and where it is used."""
    assert len(places(name, ("runtime", "commands"))) <= 2


@pytest.mark.parametrize(
    "name",
    [
        "target",
        "head_precision",
        "block_size",
        "calibration_tokens",
        "budget",
        "decay",
        "repair_decay",
        "verify",
        "force",
    ],
)
def test_a_flag_of_export_is_in_three_places(name):
    """The flag, the function, and the recipe or what else uses it."""
    assert len(places(name, ("exporter", "commands", "recipe")) | {"commands/export.py"}) <= 3


@pytest.mark.parametrize("one", [*fields(Generation), *fields(Loading)], ids=lambda one: one.name)
def test_every_option_is_a_flag_of_run(one):
    known = {name for option in main.commands["run"].params for name in (option.name, *option.opts)}
    assert one.name in known


def test_integrations_use_the_public_api_only():
    import dijiang

    for file in (PACKAGE / "integrations").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module != "recipe":
                assert node.module is None, file.name
                assert {name.name for name in node.names} <= set(dijiang.__all__), file.name


def test_nothing_but_a_verb_imports_an_integration():
    graph = grimp.build_graph("dijiang", exclude_type_checking_imports=False)
    for module in graph.find_descendants("dijiang.integrations"):
        importers = graph.find_modules_that_directly_import(module)
        allowed = ("dijiang.commands.", "dijiang.integrations.")
        assert all(name.startswith(allowed) for name in importers), importers


def test_every_field_of_a_request_is_read():
    """One that is only declared would be taken, and change nothing."""
    named = set()
    for file in (PACKAGE / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                named.add(node.args[0].value)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                named.add(node.slice.value)
    assert (COMPLETION | CHAT | TOKENIZE | STREAM_OPTIONS).keys() <= named
