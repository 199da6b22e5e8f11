"""The child process of a benchmark: measures one item and writes its rows, a JSON object a line, to stdout.

python -m jaxwan.bench.child KIND PRESET FORM RUNS

The first line is the environment. A line that begins with neither word is noise of a library.
"""

import json
import sys
from dataclasses import asdict

from jaxwan.bench.items import Item, measure
from jaxwan.bench.measure import environment
from jaxwan.bench.presets import PRESETS

ENVIRONMENT, ROW = "ENVIRONMENT ", "ROW "


def main(kind: str, preset: str, form: str, runs: str) -> None:
    """Measure; `kind` "environment" writes the first line only."""
    print(ENVIRONMENT + json.dumps(environment()), flush=True)
    if kind != "environment":
        for row in measure(Item(kind, PRESETS[preset], form), int(runs)):
            print(ROW + json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
