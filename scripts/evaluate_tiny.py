"""Measure whether a checkpoint's clips show what their captions say: the bundled model's test.

    python scripts/evaluate_tiny.py
    python scripts/evaluate_tiny.py --captions 100 --guidance-scale 6 --output outputs/guidance-6
    python scripts/evaluate_tiny.py --sweep --captions 100     # guidance, steps and samplers, one at a time

It generates captions of one coloured shape, half of them with pairs of attributes that training never saw, reads
colour, shape, motion and background off the frames, and writes results.json, results.md and contact_sheet.png.
The settings are the checkpoint's unless given. First it checks the reader on clips whose truth is known. A sweep
changes one setting at a time and writes sweep.json and sweep.md.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxwan import BUNDLED_MODEL, WanPipeline
from jaxwan.pipelines.media import save_image
from jaxwan.schedulers.table import SAMPLERS
from jaxwan.tiny.attributes import names
from jaxwan.tiny.reader import Reading, read
from jaxwan.tiny.scoring import (
    COLUMNS,
    RECONSTRUCTED,
    Case,
    Share,
    check_reader,
    make_cases,
    marks_of,
    score,
    score_controls,
)

SETTINGS = ("num_inference_steps", "guidance_scale", "guidance_scale_2", "sampler", "flow_shift")
SWEEP: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (1.0, 2.0, 4.0, 7.0),  # alone, of both experts
    "guidance_scale_2": (5.0,),
    "num_inference_steps": (4, 8, 12, 40),
    "sampler": ("euler", "dpm++2m"),
}
STRIP = 5  # frames a clip on the contact sheet
GREEN, RED = (0, 150, 60), (210, 30, 30)


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 1 after bad input or a failed check was explained in a sentence."""
    args = parse(argv)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(args: argparse.Namespace) -> None:
    """Check the reader, generate, read, score and write."""
    cases = make_cases(args.captions)
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch} must be at least 1")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    checks = {"rendered": check_reader(1000 if args.check_reader else 300)}
    print("reader on rendered clips:", _line(checks["rendered"]))
    model = args.model or BUNDLED_MODEL
    pipe = WanPipeline.from_pretrained(model, args.mesh, args.dtype, progress=False)
    if args.check_reader:
        checks["reconstructed"] = check_reader(200, RECONSTRUCTED, through=lambda clip: reconstruct(pipe, clip))
        print("reader on clips through the VAE:", _line(checks["reconstructed"]))
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if args.sweep:
        sweep(pipe, cases, args.batch, settings, folder)
        return
    clips = generate(pipe, cases, args.batch, settings)
    readings = [read(clip) for clip in clips]
    results = {
        "model": str(args.model or "bundled"),
        "settings": settings,
        "reader": checks,
        "score": score(cases, readings),
        "controls": score_controls(cases, readings),
    }
    print(text := to_markdown(results))
    (folder / "results.md").write_text(text, encoding="utf-8")
    (folder / "results.json").write_text(to_json(results, cases, readings), encoding="utf-8")
    shown = slice(0, args.sheet)
    save_image(contact_sheet(clips[shown], cases[shown], readings[shown]), folder / "contact_sheet.png")
    print(f"written to {folder}: results.json, results.md, contact_sheet.png")


def sweep(pipe: Any, cases: Sequence[Case], batch: int, settings: dict[str, Any], folder: Path) -> None:
    """Score the settings, then every cell of SWEEP in their place; the files are whole after every cell."""
    cells = [{}] + [{name: value} for name, values in SWEEP.items() for value in values]
    rows: list[dict[str, Any]] = []
    for cell in cells:
        clips = generate(pipe, cases, batch, settings | cell)
        rows.append({"settings": settings | cell, "score": score(cases, [read(clip) for clip in clips])["all"]})
        lines = [f"| settings | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
        lines += [f"| {_said(row['settings'])} | {' | '.join(map(str, row['score'].values()))} |" for row in rows]
        (folder / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "sweep.json").write_text(json.dumps([_plain(row) for row in rows], indent=1) + "\n", encoding="utf-8")
        print(lines[-1])


def generate(pipe: Any, cases: Sequence[Case], batch: int, settings: dict[str, Any]) -> list[np.ndarray]:
    """Frames (F, H, W, 3) of every case. The last batch is filled up, so that all have one compiled size."""
    from tqdm import tqdm

    clips: list[np.ndarray] = []
    for start in tqdm(range(0, len(cases), batch), desc="batches"):
        part = list(cases[start : start + batch])
        full = part + part[-1:] * (batch - len(part))
        made = pipe(prompt=[c.caption for c in full], seed=[c.seed for c in full], **settings)
        clips += list(made.frames[: len(part)])
    return clips


def reconstruct(pipe: Any, clip: np.ndarray) -> np.ndarray:
    """A clip through the checkpoint's VAE."""
    return pipe.decode(pipe.encode(clip[None]))[0]


# Output


def to_markdown(results: dict[str, Any]) -> str:
    """The score and its controls as one table of per cent, with 95 % intervals."""
    score, controls = results["score"], results["controls"]
    rows = [(f"{part} ({shares['colour'].total})", shares) for part, shares in score.items()]
    rows += [("control: captions that differ in all four", controls["all differ"])]
    rows += [("control: random captions", controls["random"]), ("expected of random captions", controls["expected"])]
    lines = [f"Model: {results['model']}. Settings: {_said(results['settings'])}.", ""]
    lines += [f"| captions | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {name} | {' | '.join(_cell(shares[column]) for column in COLUMNS)} |" for name, shares in rows]
    lines += ["", *(f"Reader on {kind} clips: {_line(shares)}." for kind, shares in results["reader"].items())]
    return "\n".join(lines) + "\n"


def to_json(results: dict[str, Any], cases: Sequence[Case], readings: Sequence[Reading]) -> str:
    """Everything that was measured, down to each clip."""
    clips = [
        {
            "caption": case.caption, "seed": case.seed, "held_out": case.held_out, "wanted": names(case.row),
            "read": reading._asdict(),
        }
        for case, reading in zip(cases, readings, strict=True)
    ]  # fmt: skip
    return json.dumps({key: _plain(value) for key, value in results.items()} | {"clips": clips}, indent=1) + "\n"


def contact_sheet(clips: Sequence[np.ndarray], cases: Sequence[Case], readings: Sequence[Reading]) -> np.ndarray:
    """A page (H, W, 3) uint8 of strips in two columns: caption, what was read right (green) and wrong (red)."""
    from PIL import Image, ImageDraw

    height, width = clips[0].shape[1:3]
    cell_height, cell_width = height + 34, STRIP * (width + 2) + 10
    page = Image.new("RGB", (2 * cell_width, -(-len(clips) // 2) * cell_height), "white")
    draw = ImageDraw.Draw(page)
    for i, (clip, case, reading) in enumerate(zip(clips, cases, readings, strict=True)):
        left, top = i % 2 * cell_width, i // 2 * cell_height
        marks = marks_of(case, reading)
        draw.rectangle((left, top + 2, left + 4, top + cell_height - 4), fill=GREEN if all(marks.values()) else RED)
        caption = ("[held out] " if case.held_out else "") + case.caption
        draw.text((left + 8, top), textwrap.shorten(caption, cell_width // 5, placeholder="…"), fill="black")
        x = left + 8.0
        for name, right in marks.items():
            text = f"{name}: {getattr(reading, name) or 'unreadable'}"
            draw.text((x, top + 12), text, fill=GREEN if right else RED)
            x += draw.textlength(text) + 10
        for column, frame in enumerate(np.linspace(0, len(clip) - 1, STRIP).round().astype(int)):
            picture = Image.fromarray((clip[frame] * 255).round().astype(np.uint8))
            page.paste(picture, (left + 8 + column * (width + 2), top + 27))
    return np.asarray(page)


def _said(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "the checkpoint's"


def _cell(value: Share | float) -> str:
    return str(value) if isinstance(value, Share) else f"{100 * value:.1f} %"


def _line(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())


def _plain(value: Any) -> Any:
    """Shares as dictionaries, which keep their names in JSON."""
    if isinstance(value, Share):
        return value._asdict() | {"share": value.right / value.total}
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=400, help="half of them held out; default %(default)s")
    parser.add_argument("--model", help="Diffusers-layout folder or Hugging Face id; default: the bundled one")
    parser.add_argument("--guidance-scale", type=float, help="of the high-noise expert (of both, when given alone)")
    parser.add_argument("--guidance-scale-2", type=float, help="of the low-noise expert")
    parser.add_argument("--num-inference-steps", type=int, help="denoising steps")
    parser.add_argument("--sampler", help=", ".join(SAMPLERS))
    parser.add_argument("--flow-shift", type=float, help="moves the steps towards noise")
    parser.add_argument("--mesh", help="devices by axis, such as pp=4; default one device")
    parser.add_argument("--dtype", help="bfloat16 or float32, of DiT and text encoder")
    parser.add_argument("--batch", type=int, default=8, help="captions generated at a time; default %(default)s")
    parser.add_argument("--sheet", type=int, default=48, help="clips on the contact sheet; default %(default)s")
    parser.add_argument("--check-reader", action="store_true",
                        help="check the reader on 1000 clips, and on 200 that went through the VAE")  # fmt: skip
    parser.add_argument("--sweep", action="store_true", help="one setting at a time: guidance, steps, samplers")
    parser.add_argument("--output", metavar="DIR", default="outputs/evaluation", help="folder; default %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
