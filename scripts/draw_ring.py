"""Draw the pipeline ring's schedule: see --help."""

import sys

try:
    from jaxwan.commands.draw_ring import main
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}: install it first, by `pip install -e .` in the clone")

if __name__ == "__main__":
    sys.exit(main())
