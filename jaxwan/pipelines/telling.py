"""Warnings that show the line of whoever called jaxwan, and none of its own."""

import sys
import traceback
import warnings

OURS = {"jaxwan", "jaxtyping"}  # which calls our functions where shapes are checked at run time


def warn(message: str) -> None:
    """A UserWarning at the line that called into this package, however deep in it the reason was found.

    Python 3.12 has skip_file_prefixes for this.
    """
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_stack(sys._getframe())]
    ours = [level for level, name in enumerate(names, 1) if name.partition(".")[0] in OURS]
    warnings.warn(message, stacklevel=max(ours) + 1)
