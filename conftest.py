"""Processes that tests start import this clone too, as the tests do by `pythonpath` in pyproject.toml."""

import os
from pathlib import Path

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
