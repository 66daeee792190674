"""Run the clients of others, as they are on the registries, against `dijiang serve`. `make clients`.

Each has an environment of its own under .clients/, and a script beside this one that asks and checks. Scripts are
named on the command line, or all are run. Prints rows of the table in docs/serve.md. Exit status 0: all work.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import dijiang
from tests.conftest import TOOLED, talkative

HERE, PLACE = Path(__file__).parent, Path(".clients")
#: Script -> what its registry installs. The first is the one whose version is told.
PYTHON = {
    "openai_now": ["openai"],
    "openai_first": ["openai==1.3.0", "httpx<0.28"],
    "openai_old": ["openai==0.28.1"],
    "litellm_chat": ["litellm"],
    "langchain_chat": ["langchain-openai"],
    "llama_index_chat": ["llama-index-llms-openai-like"],
    "instructor_modes": ["instructor"],
    "pydantic_ai_agent": ["pydantic-ai-slim[openai]"],
    "openai_agents": ["openai-agents"],
    "smolagents_agent": ["smolagents[openai]"],
    "outlines_json": ["outlines", "openai"],
    "llm_command": ["llm"],
}
NODE = {"node_openai": ["openai", "zod"], "vercel_ai": ["ai", "@ai-sdk/openai-compatible", "zod"]}


def served() -> Path:
    """The example in int8, with a template that knows tools."""
    bundle = PLACE / "tooled"
    if not bundle.exists():
        made = PLACE / "made"
        shutil.rmtree(made, ignore_errors=True)
        checkpoint = talkative(made).parent / "checkpoint"
        (checkpoint / "chat_template.jinja").write_text(TOOLED)
        dijiang.export(checkpoint, bundle, precision="int8", calibration_tokens=0, verify=False)
    return bundle


def asked(script: str, url: str) -> tuple[str, str, str]:
    """(client and version, what was run, result)."""
    folder, python = PLACE / script, script in PYTHON
    packages = (PYTHON | NODE)[script]
    folder.mkdir(exist_ok=True)
    env = os.environ | {"URL": url, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LLM_USER_PATH": str(folder.absolute())}
    if python:
        binary = folder / "bin" / "python"
        if not binary.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([binary, "-m", "pip", "install", "-q", *packages], check=True, stderr=subprocess.DEVNULL)
        name = re.split(r"[\[=<]", packages[0])[0]
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        version = subprocess.run([binary, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        source, ask = HERE / f"{script}.py", [binary.absolute(), HERE / f"{script}.py"]
    else:
        subprocess.run(["npm", "init", "-y"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["npm", "i", "--silent", "--no-audit", "--no-fund", *packages], cwd=folder, check=True)
        name = packages[0]
        version = json.loads((folder / "node_modules" / name / "package.json").read_text())["version"]
        source = HERE / f"{script}.mjs"
        ask = ["node", shutil.copy(source, folder)]  # Node looks for packages beside the script
    done = subprocess.run(ask, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-3000:], file=sys.stderr)
    what = re.search(r'^(?:"""|// )(.*?)(?:"""|$)', source.read_text(), re.MULTILINE)
    client = f"{name} {version}{'' if python else ' (npm)'}"
    return client, what[1] if what else "", "" if done.returncode else "works"


def main(wanted: list[str]) -> int:
    """The exit status: 0 if all work."""
    PLACE.mkdir(exist_ok=True)
    command = [Path(sys.executable).with_name("dijiang"), "serve", served(), "--port", "0"]
    log = PLACE / "server.log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as server:
        try:
            while not (found := re.search(r"listening on (http\S+/v1)", log.read_text())):
                if server.poll() is not None:
                    sys.exit(log.read_text())
                time.sleep(0.1)
            rows = [asked(script, found[1]) for script in wanted or [*PYTHON, *NODE]]
        finally:
            server.terminate()
    for row in rows:
        print("| " + " | ".join(part or "FAILED" for part in row) + " |")
    return int(not all(result for _, _, result in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
