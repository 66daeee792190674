"""Has every Python, also those that tests start, take the operator that DIJIANG_SANITIZED names."""

import os
from pathlib import Path

from dijiang.runtime import operators

NAME = operators.FILE
#: Tests rename the file to have none.
operators.find_library = lambda: Path(os.environ["DIJIANG_SANITIZED"]) if operators.FILE == NAME else None
