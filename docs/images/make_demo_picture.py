"""Draw demo.png, the picture in the README: what was taught, and how the loss of three runs fell.

It reads pictures from examples/subjects/ and metrics.jsonl of three runs, and invents nothing:

    disttrain train configs/lora.yaml
    disttrain train configs/textual_inversion.yaml
    disttrain train configs/dreambooth.yaml
    python docs/images/make_demo_picture.py

Run it from the repository root. Every dot is one step; the line is the mean of the last 30 steps.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent.parent
OUTPUT = Path(__file__).parent / "demo.png"
WINDOW = 30
TICK = 0.5
FINE = 2  # everything is drawn twice as large and then halved, which smooths lines and letters
WIDTH, MARGIN, GAP = 1200, 30, 8
INK, FAINT, GRID = (40, 40, 40), (110, 110, 110), (225, 225, 225)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Panel:
    """One loss curve."""

    title: str
    subtitle: str
    metrics: Path
    line: tuple[int, int, int]
    dot: tuple[int, int, int]


ROWS = (
    ("fox", "Ten pictures of a fox: taught by LoRA and by DreamBooth"),
    ("penguin", "Ten pictures of a penguin: taught by textual inversion"),
)
PANELS = (
    Panel(
        "LoRA",
        "fox: small additions to the attention layers learn",
        Path("runs/fox-lora/metrics.jsonl"),
        (196, 78, 18),
        (243, 205, 180),
    ),
    Panel(
        "Textual inversion",
        "penguin: only four new word vectors learn",
        Path("runs/penguin-ti/metrics.jsonl"),
        (31, 95, 168),
        (186, 208, 234),
    ),
    Panel(
        "DreamBooth",
        "fox and other animals: the whole network learns",
        Path("runs/fox-dreambooth/metrics.jsonl"),
        (42, 120, 66),
        (186, 221, 196),
    ),
)


def read_losses(path: Path) -> list[float]:
    """The loss of every step of a run with one subject."""
    if not path.is_file():
        sys.exit(f"{path} does not exist; run the three commands at the top of this script")
    return [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]


def running_mean(values: list[float]) -> list[float]:
    """Mean of the last WINDOW values at each place, fewer at the start."""
    recent = [values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in recent]


class Canvas:
    """A white picture drawn at FINE times its size; all places are given in final pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * FINE, height * FINE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self,
        place: tuple[float, float],
        text: str,
        size: int,
        colour: tuple[int, int, int] = INK,
        anchor: str = "la",
    ) -> None:
        """A line of text; `anchor` says which of its points lies at `place`, as Pillow names it."""
        font = ImageFont.load_default(size * FINE)
        at = (place[0] * FINE, place[1] * FINE)
        self.draw.text(at, text, font=font, fill=colour, anchor=anchor)

    def line(
        self, points: list[tuple[float, float]], colour: tuple[int, int, int], width: float
    ) -> None:
        """A line through points."""
        scaled = [(x * FINE, y * FINE) for x, y in points]
        self.draw.line(scaled, fill=colour, width=round(width * FINE), joint="curve")

    def dot(self, x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
        """A filled circle."""
        edges = ((x - radius) * FINE, (y - radius) * FINE, (x + radius) * FINE, (y + radius) * FINE)
        self.draw.ellipse(edges, fill=colour)

    def picture(self, path: Path, x: int, y: int, side: int) -> None:
        """A picture file as a square thumbnail."""
        with Image.open(path) as found:
            small = found.convert("RGB").resize(
                (side * FINE, side * FINE), Image.Resampling.LANCZOS
            )
        self.image.paste(small, (x * FINE, y * FINE))

    def finished(self) -> Image.Image:
        """The picture at its final size, in 256 colours to keep the file small."""
        size = (self.image.width // FINE, self.image.height // FINE)
        return self.image.resize(size, Image.Resampling.LANCZOS).quantize(256)


def draw_subject(canvas: Canvas, subject: str, caption: str, top: int) -> int:
    """A caption and the subject's pictures in a row; returns where the row ends."""
    paths = sorted((ROOT / "examples/subjects" / subject).glob("*.jpg"))
    side = (WIDTH - 2 * MARGIN - (len(paths) - 1) * GAP) // len(paths)
    canvas.text((MARGIN, top), caption, 17)
    for i, path in enumerate(paths):
        canvas.picture(path, MARGIN + i * (side + GAP), top + 28, side)
    return top + 28 + side


def draw_panel(canvas: Canvas, panel: Panel, box: Box, low: float, high: float) -> None:
    """One loss curve inside `box`; all panels share the loss axis."""
    left, top, right, bottom = box
    losses = read_losses(ROOT / panel.metrics)
    steps = len(losses)

    def place(step: int, loss: float) -> tuple[float, float]:
        across = left + (right - left) * step / steps
        return across, bottom - (bottom - top) * (loss - low) / (high - low)

    canvas.text((left, top - 52), panel.title, 20, panel.line)
    canvas.text((left, top - 26), panel.subtitle, 14, FAINT)
    for tick in range(round((high - low) / TICK) + 1):
        level = low + TICK * tick
        _, y = place(0, level)
        canvas.line([(left, y), (right, y)], GRID, 1)
        canvas.text((left - 6, y), f"{level:.1f}", 13, FAINT, "rm")
    for step in range(0, steps + 1, 100):
        x, _ = place(step, low)
        canvas.text((x, bottom + 6), str(step), 13, FAINT, "ma")
    for i, loss in enumerate(losses):
        canvas.dot(*place(i + 1, loss), 1.7, panel.dot)
    means = running_mean(losses)
    canvas.line([place(i + 1, mean) for i, mean in enumerate(means)], panel.line, 2.5)
    note = f"first {WINDOW} steps {means[WINDOW - 1]:.2f}, last {WINDOW} steps {means[-1]:.2f}"
    canvas.text((right, top + 4), note, 14, panel.line, "ra")
    canvas.text((left, bottom + 24), "training step", 13, FAINT)


def main() -> None:
    """Draw the picture."""
    height = 740
    canvas = Canvas(WIDTH, height)
    top = MARGIN - 8
    for subject, caption in ROWS:
        top = draw_subject(canvas, subject, caption, top) + 18
    losses = [loss for panel in PANELS for loss in read_losses(ROOT / panel.metrics)]
    high = TICK * (int(max(losses) / TICK) + 1)
    top += 112
    canvas.text(
        (MARGIN, top - 108),
        f"How the loss falls: a dot for each step, a line for the mean of the last {WINDOW}",
        17,
    )
    canvas.text(
        (MARGIN, top - 84),
        "The built-in practice model starts from random weights: its loss falls, but it cannot draw"
        " an animal. Use a real base model for pictures.",
        14,
        FAINT,
    )
    width = (WIDTH - 2 * MARGIN) // len(PANELS)
    for i, panel in enumerate(PANELS):
        left = MARGIN + i * width + 34
        draw_panel(canvas, panel, (left, top, left + width - 60, height - 56), 0.0, high)
    canvas.finished().save(OUTPUT, optimize=True)
    print(f"{OUTPUT.relative_to(ROOT)}: {OUTPUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
