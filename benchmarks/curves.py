"""Loss curves of one run in ten layouts, drawn over each other: weights, data and evaluation depend on none of them.

    python benchmarks/curves.py --steps 100 --out docs/curves.svg

Every layout is a real ``shoestring train`` of preset tiny, in float32 if nothing is said, one after the other. Printed:
the largest difference of a step's loss from that of one process, for every ten steps. Routing and selection biases turn
a rounding into another choice of experts now and then, and training makes more of it; in float64 the same happens as
many digits later.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {
    "one process": "",
    "dp 2": "parallel.dp=2",
    "dp 4": "parallel.dp=4",
    "tp 2": "parallel.tp=2",
    "tp 4": "parallel.tp=4",
    "dp 2, ep 2": "parallel.dp=2 parallel.ep=2",
    "dp 4, ep 4": "parallel.dp=4 parallel.ep=4",
    "tp 2, dp 2, ep 2": "parallel.tp=2 parallel.dp=2 parallel.ep=2",
    "tp 2, dp 2, ep 4": "parallel.tp=2 parallel.dp=2 parallel.ep=4",
    "fsdp2, dp 2, ep 2": "parallel.engine=fsdp2 parallel.dp=2 parallel.ep=2",
}
WIDTH, HEIGHT, MARGIN = 760, 420, 48
HUES = range(0, 360, 36)


def train(overrides: str, steps: int, precision: str, folder: Path) -> tuple[list[float], float]:
    """The loss of every step, and the held-out loss."""
    words = [*overrides.split(), f"run.steps={steps}", f"precision={precision}", "run.eval_every=0"]
    words += ["run.compile=off", "run.threads=1", "verify=skip"]
    words += [f"run.folder={folder}/runs", "run.id=curve", f"data.folder={folder}/data", "run.sample.tokens=0"]
    command = [sys.executable, "-m", "launcher.train", *words, "checkpoint.save=false"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    run = folder / "runs" / "curve"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    run.rename(run.with_name(f"done-{len(list(run.parent.iterdir()))}"))
    return [row["loss"] for row in rows if row["kind"] == "step"], next(
        r["held_out"] for r in rows if r["kind"] == "end"
    )


def draw(curves: dict[str, list[float]]) -> str:
    """An SVG of all curves; each starts its dashes a little later, so that equal ones show as many colours in a row."""
    top, bottom = max(map(max, curves.values())), min(map(min, curves.values()))
    steps = max(map(len, curves.values()))

    def place(step: int, loss: float) -> str:
        x = MARGIN + step / max(1, steps - 1) * (WIDTH - 2 * MARGIN)
        return f"{x:.1f},{MARGIN + (top - loss) / (top - bottom) * (HEIGHT - 2 * MARGIN):.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="{HEIGHT - 12}">step 1 to {steps}</text>',
        f'<text x="8" y="{MARGIN - 8}">loss {top:.2f} nats a token</text>',
        f'<text x="8" y="{HEIGHT - MARGIN + 4}">{bottom:.2f}</text>',
    ]
    for number, ((name, losses), hue) in enumerate(zip(curves.items(), HUES, strict=False)):
        points = " ".join(place(step, loss) for step, loss in enumerate(losses))
        colour, shift = f"hsl({hue},80%,42%)", 8 * number
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="8 {8 * (len(curves) - 1)}" stroke-dashoffset="{-shift}"/>'
        )
        lines.append(f'<text x="{WIDTH - 200}" y="{MARGIN + 18 * number}" fill="{colour}">{name}</text>')
    return "\n".join([*lines, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--precision", choices=("bf16", "fp32", "fp64"), default="fp32")
    parser.add_argument("--layouts", type=int, default=len(LAYOUTS), help="the first so many")
    parser.add_argument("--out", type=Path, default=Path("curves.svg"))
    options = parser.parse_args()
    curves, held_out = {}, {}
    with tempfile.TemporaryDirectory() as name:
        for layout, overrides in list(LAYOUTS.items())[: options.layouts]:
            curves[layout], held_out[layout] = train(overrides, options.steps, options.precision, Path(name))
            first = curves["one process"]
            apart = [abs(a - b) for a, b in zip(first, curves[layout], strict=True)]
            parts = "  ".join(f"{max(apart[at : at + 10]):.0e}" for at in range(0, len(apart), 10))
            print(
                f"{layout:18s} last loss {curves[layout][-1]:.6f}  held-out {held_out[layout]:.6f}  largest difference "
                f"in ten steps each  {parts}",
                flush=True,
            )
    options.out.write_text(draw(curves))


if __name__ == "__main__":
    main()
