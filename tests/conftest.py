"""What every test's processes share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# One ninja for all: DeepSpeed compiles an operator at its first start, a minute or more, and another
# version's ninja would find it out of date and compile it anew.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
