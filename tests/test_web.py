"""The package of web/: what it holds, and its types."""

import json
import re
from pathlib import Path

WEB = Path(__file__).parent.parent / "web"


def test_package_has_the_files_and_types_of_what_is_exported():
    package = json.loads((WEB / "package.json").read_text())
    sources = {file.name for file in WEB.glob("*.js")} | {
        "core.wasm",
        "core-relaxed.wasm",
        "index.html",
        "dijiang.d.ts",
    }
    assert set(package["files"]) == sources
    pattern = r"^export (?:class|const|function|async function) (\w+)"
    typed = set(re.findall(r"^export class (\w+)", (WEB / "dijiang.d.ts").read_text(), re.MULTILINE))
    assert typed <= set(re.findall(pattern, (WEB / "dijiang.js").read_text(), re.MULTILINE))
    body = (WEB / "dijiang.js").read_text().partition("export class Model")[2].partition("\n}\n")[0]
    methods = set(re.findall(r"^  (?:static )?(?:async )?\*?(\w+)\(.*\) \{$", body, re.MULTILINE)) - {
        "constructor",
        "expectFit",
    }
    declared = (WEB / "dijiang.d.ts").read_text().partition("export class Model")[2]
    inner = {"constructor", "expectFit"}
    assert methods - inner == set(re.findall(r"^  (?:static )?(\w+)\(", declared, re.MULTILINE))
