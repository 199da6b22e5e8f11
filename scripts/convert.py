"""Convert checkpoints, say what they are, and compare them: see --help."""

import sys

try:
    import jaxwan
    from jaxwan.commands.convert import main
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}: install it first, by `pip install -e .` in the clone")

if __name__ == "__main__":
    jaxwan.end_on_signals()
    sys.exit(main())
