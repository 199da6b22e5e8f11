"""Train the bundled model from nothing, stage by stage, on a CPU or a GPU.

    python scripts/train_tiny.py vae
    python scripts/train_tiny.py vae --minutes 8     # train a while, save and stop; the same command goes on

States are saved every 10 minutes, on SIGTERM and on Ctrl-C. A stage that was stopped goes on where it was; without a
saved state it goes on from the weights in --output, if there are any.
"""

import argparse
import sys
from pathlib import Path

from jaxwan.tiny.train_vae import train_vae
from jaxwan.tiny.training import state_folder

STAGES = ("vae",)


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 1 after bad input was explained in a sentence."""
    args = parse(argv)
    try:
        train(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train(args: argparse.Namespace) -> None:
    """Run the stage."""
    for name in ("minutes", "scale"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value:g} must be positive")
    states = state_folder() if args.states is None else Path(args.states)
    train_vae(states, Path(args.output) / "vae", scale=args.scale, minutes=args.minutes, seed=args.seed)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES, help="what to train")
    parser.add_argument("--minutes", type=float, help="stop after so many, the stage done or not; default: when done")
    parser.add_argument("--scale", type=float, default=1.0, help="times the planned steps; default %(default)s")
    parser.add_argument(
        "--output", metavar="DIR", default="outputs/tiny", help="the model's folder; default %(default)s"
    )
    parser.add_argument("--states", metavar="DIR", help="folder of the saved states; default: in the user's cache")
    parser.add_argument("--seed", type=int, default=0, help="of a training that starts afresh; default %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
