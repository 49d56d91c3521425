"""How fast pictures come: raw tars, decoding alone, the loader, cached latents, and other loaders.

    python benchmarks/data.py                      # about four minutes; prints a table
    python benchmarks/data.py --side 4032 --to 512 --pictures 60

Every figure is taken in a process of its own, all of them in turns, several rounds; what is printed
is the median and, against other loaders, the median of each round's ratio. The same pictures, the
same windows, uint8 batches at the end: only who brings them differs. "webdataset" and "folder"
resize with Pillow, as their users do; "webdataset_fit" calls our resizing from its pipeline.
Start-up is not counted: a clock starts when the first batches are there.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from disttrain.data import images
from disttrain.data.latents import LatentCache, Variants
from disttrain.data.loader import SampleLoader, Share
from disttrain.data.order import SampleOrder
from disttrain.data.shards import write_shards
from disttrain.data.source import open_source
from disttrain.data.stream import CachedLatents, DecodedPictures, Pictures, SampleStream
from disttrain.data.window import fit

WORKERS = (0, 1, 2)
Sizes = Generator[int, None, None]


def photo(side: int, seed: int) -> bytes:
    """A JPEG with the spectrum of a photograph (amplitude falling as 1 / frequency), 4:3."""
    height, width = side * 3 // 4, side
    draws = np.random.default_rng(seed)
    small = 512
    frequency = np.hypot(np.fft.fftfreq(small)[:, None], np.fft.rfftfreq(small)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = draws.standard_normal((small, small // 2 + 1)) / frequency
        plane = np.fft.irfft2(spectrum, (small, small))
        planes.append(plane / plane.std() * 50 + 128)
    colours = np.stack(planes, -1)
    pixels = np.clip(colours.mean(-1, keepdims=True) * 0.7 + colours * 0.3, 0, 255)
    image = Image.fromarray(pixels.astype(np.uint8)).resize((width, height))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Pictures, shards and a latent cache."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(options.pictures):
        data = photo(options.side, number % 50) + b""  # fifty motifs, each file of its own
        (pictures / f"{number:06d}.jpg").write_bytes(data + number.to_bytes(4, "big"))
    write_shards(pictures, folder / "shards", samples_per_shard=max(1, options.pictures // 8))
    cache_of(folder, options).prepare(fake_encoder)


def fake_encoder(pixels: torch.Tensor) -> torch.Tensor:
    """Moments of the size Stable Diffusion's autoencoder gives; encoding itself is not timed."""
    small = torch.nn.functional.avg_pool2d(pixels, 8)
    return torch.cat([small, small, small[:, :2]], dim=1)


def cache_of(folder: Path, options: argparse.Namespace, **limits: Any) -> LatentCache:
    source = open_source(folder / "shards")
    return LatentCache(
        source,
        folder / "latents",
        variants=Variants(),
        resolution=options.to,
        vae_digest="0" * 64,
        precision="float16",
        **limits,
    )


def batches_of_ours(folder: Path, options: argparse.Namespace, kind: str) -> Sizes:
    """Sizes of the batches of our loader, without end."""
    source = open_source(folder / "shards")
    name, _, workers = kind.partition("-")
    size = (options.to, options.to)
    if name == "loader":
        pictures: Pictures = DecodedPictures(source, False, False, 0, ("bench", "instance"))
        ahead = int(workers)
    else:
        limits = {"memory_limit": 0} if workers == "disk" else {}
        cache = cache_of(folder, options, **limits)
        cache.prepare(fake_encoder)
        pictures, ahead = CachedLatents({size: cache}, 0, ("bench", "instance")), 0
    count = len(source.records)
    order = SampleOrder(source.sizes, 0, "bench", "instance")
    stream = SampleStream("bench", "instance", 0, count, order, pictures, [size], 0)
    share = Share(options.batch, 1, 0, 1)
    loader = SampleLoader([[stream]], share, ahead)
    if workers == "memory":  # the first epoch reads from disk and keeps
        for turn, _ in zip(share.turns(((0,), 0)), range(count // options.batch + 1), strict=False):
            loader.rows(turn)
    for turn in share.turns(((0,), 0)):
        yield len(loader.rows(turn)[1])


def window(image: Image.Image, to: int, ours: bool = False) -> torch.Tensor:
    """What another loader makes of a decoded picture: the central window, bicubic, uint8.

    Args:
        ours: resize with this project's function instead of Pillow's.
    """
    image = image.convert("RGB")
    if ours:
        pixels = fit(np.asarray(image), to, to)
    else:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.resize((to, to), Image.Resampling.BICUBIC, box=box))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class Window:
    """The transform of a webdataset pipeline."""

    def __init__(self, to: int, ours: bool) -> None:
        self.to, self.ours = to, ours

    def __call__(self, sample: tuple[Image.Image]) -> torch.Tensor:
        return window(sample[0], self.to, self.ours)


def batches_of_webdataset(folder: Path, options: argparse.Namespace, kind: str) -> Sizes:
    """The webdataset package's own pipeline: shuffle shards and samples, decode, window, batch."""
    import webdataset

    name, _, workers = kind.partition("-")
    tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    pipeline = (
        webdataset.WebDataset(tars, shardshuffle=100, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg")
        .map(Window(options.to, ours=name == "webdataset_fit"))
        .batched(options.batch, collation_fn=torch.stack, partial=False)
    )
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=int(workers))
    while True:
        for batch in loader:
            yield len(batch)


class PictureFolder(torch.utils.data.Dataset[torch.Tensor]):
    """A data set as torch's tutorials write it: one file a sample."""

    def __init__(self, folder: Path, to: int) -> None:
        self.paths, self.to = sorted(folder.glob("*.jpg")), to

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return window(image, self.to)


def batches_of_folder(folder: Path, options: argparse.Namespace, kind: str) -> Sizes:
    workers = int(kind.partition("-")[2])
    loader = torch.utils.data.DataLoader(
        PictureFolder(folder / "pictures", options.to),
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        for batch in loader:
            yield len(batch)


def raw_tar(folder: Path, options: argparse.Namespace, kind: str) -> Sizes:
    """Every picture's bytes, compared with their digest, nothing decoded."""
    source = open_source(folder / "shards")
    while True:
        for number in range(len(source.records)):
            source.read(number)
            yield 1


def decode_forever(folder: Path, to: int, counter: Any) -> None:
    source = open_source(folder / "shards")
    data = [source.read(number) for number in range(min(100, len(source.records)))]
    while True:
        for one in data:
            fit(images.decode(one, "", at_least=(to, to)).pixels, to, to)
            counter.value += 1


def decode_only(folder: Path, options: argparse.Namespace, kind: str) -> tuple[int, float]:
    """What the cores can decode and resize from memory: pictures and seconds."""
    context = multiprocessing.get_context("fork")
    counters = [context.Value("q", 0, lock=False) for _ in range(int(kind.partition("-")[2]))]
    processes = [
        context.Process(target=decode_forever, args=(folder, options.to, counter), daemon=True)
        for counter in counters
    ]
    for process in processes:
        process.start()
    while min(counter.value for counter in counters) < 3:
        time.sleep(0.01)
    begun, started = sum(counter.value for counter in counters), time.perf_counter()
    time.sleep(options.seconds)
    done, seconds = sum(counter.value for counter in counters), time.perf_counter() - started
    for process in processes:
        process.terminate()
        process.join()
    return done - begun, seconds


NAMES = ("loader", "webdataset", "webdataset_fit", "folder")
SOURCES: dict[str, Callable[[Path, argparse.Namespace, str], Sizes]] = {
    "tar": raw_tar,
    "loader": batches_of_ours,
    "latents": batches_of_ours,
    "webdataset": batches_of_webdataset,
    "webdataset_fit": batches_of_webdataset,
    "folder": batches_of_folder,
}
KINDS = [
    "tar",
    "decode-1",
    "decode-2",
    *[f"{name}-{n}" for name in NAMES for n in WORKERS],
    "latents-disk",
    "latents-memory",
]


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One figure, in this process: pictures a second, and the peak of memory in MB."""
    torch.set_num_threads(1)
    if options.one.startswith("decode"):
        count, seconds = decode_only(folder, options, options.one)
    else:
        batches = SOURCES[options.one.partition("-")[0]](folder, options, options.one)
        for _ in range(3):
            next(batches)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < options.seconds:
            count += next(batches)
        seconds = time.perf_counter() - started
        batches.close()
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"images_per_second": count / seconds, "peak_mb": (own + child) / 1024}


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, in turns."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options)
        size = sum(path.stat().st_size for path in (folder / "pictures").iterdir())
        for number in range(options.rounds):
            for kind in KINDS:
                print(f"round {number + 1}: {kind}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--one", kind, "--folder", name]
                for key in ("to", "batch", "seconds"):
                    command += [f"--{key}", str(getattr(options, key))]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[kind].append(json.loads(done.stdout))
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "pictures": options.pictures,
        "picture": f"{options.side} x {options.side * 3 // 4}, {size // options.pictures} bytes",
        "window": options.to,
        "rounds": found,
    }


def ratio(found: dict[str, list[dict[str, float]]], one: str, other: str) -> float:
    """Median over rounds of how many times `other` goes into `one`."""
    pairs = zip(found[one], found[other], strict=True)
    return statistics.median(a["images_per_second"] / b["images_per_second"] for a, b in pairs)


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    found = result["rounds"]
    lines = [
        f"{result['machine']}; {result['pictures']} JPEGs of {result['picture']} "
        f"-> {result['window']} x {result['window']}",
        "",
        "| | images/s | peak MB |",
        "|---|---|---|",
    ]
    for kind, rounds in found.items():
        speed = statistics.median(one["images_per_second"] for one in rounds)
        memory = statistics.median(one["peak_mb"] for one in rounds)
        lines.append(f"| {kind} | {speed:,.0f} | {memory:,.0f} |")
    lines += ["", "| ratio | |", "|---|---|"]
    for n in WORKERS:
        for other in NAMES[1:]:
            value = ratio(found, f"loader-{n}", f"{other}-{n}")
            lines.append(f"| loader / {other}, {n} workers | {value:.2f} |")
    for n in (1, 2):
        value = ratio(found, f"loader-{n}", f"decode-{n}")
        lines.append(f"| loader with {n} workers / decoding alone on {n} cores | {value:.2f} |")
    for kind in ("latents-memory", "latents-disk"):
        value = ratio(found, kind, "decode-1")
        lines.append(f"| {kind} / decoding alone on 1 core | {value:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pictures", type=int, default=1600)
    parser.add_argument("--side", type=int, default=640, help="width of the pictures in pixels")
    parser.add_argument("--to", type=int, default=256, help="side of the windows in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.folder, options)))
        return
    result = run_all(options)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
