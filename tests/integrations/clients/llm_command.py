"""a model of extra-openai-models.yaml: a chat that goes on, a completion, `--schema`, `--functions`"""

import json
import os
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ["LLM_USER_PATH"])
COMMON = f"  model_name: tooled\n  api_base: {os.environ['URL']}\n"
FUNCTION = "def weather(day: bool) -> str:\n    'Of a day.'\n    return 'sunny'\n"


def llm(*words: str) -> str:
    command = [Path(sys.executable).with_name("llm"), *words, "-o", "max_tokens", "60", "-o", "temperature", "0"]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()


(HOME / "extra-openai-models.yaml").write_text(
    f"- model_id: chat\n{COMMON}  supports_tools: true\n  supports_schema: true\n"
    f"- model_id: text\n{COMMON}  completion: true\n"
)
assert llm("-m", "chat", "x") == llm("-m", "chat", "--no-stream", "x")
assert llm("-c", "y")
assert llm("-m", "text", "def ")
schema = {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}}, "required": ["kind"]}
schema["additionalProperties"] = False
assert json.loads(llm("-m", "chat", "x", "--schema", json.dumps(schema)))["kind"] in ("cat", "dog")
llm("-m", "chat", "x", "--functions", FUNCTION)
