"""Lay this environment over another one: what is not installed here comes from there, and `dijiang` runs here.

.ecosystem/NAME/bin/python tests/integrations/layer.py .venv/bin/python
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

CODE = "import sysconfig; print(sysconfig.get_path('purelib'))"

if __name__ == "__main__":
    below = subprocess.run([sys.argv[1], "-c", CODE], capture_output=True, text=True, check=True).stdout.strip()
    file = Path(sysconfig.get_path("purelib"), "_below.pth")
    file.write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
    script = Path(sysconfig.get_path("scripts"), "dijiang")
    script.write_text(f"#!{sys.executable}\nfrom dijiang.cli import main\n\nmain()\n", encoding="utf-8")
    script.chmod(0o755)
