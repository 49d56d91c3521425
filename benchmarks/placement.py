"""What each way to split a model holds on a process, and what a step costs.

    python benchmarks/placement.py [--processes 2] [--output FILE.json]

Each strategy trains the embedded base, made wider, in its own torchrun world on random latents.
Printed for each: resident memory that a process holds for it when gradients are there, for each
trained weight, and the seconds of a step beside those of ddp in the same run. On processors; a
GPU's ratios are others.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from disttrain.config import RunConfig
from disttrain.config_file import load_config
from disttrain.engine.distributed import Mesh
from disttrain.engine.optim import set_rates
from disttrain.engine.strategy import place_weights
from disttrain.engine.zero import load_deepspeed
from disttrain.methods import METHODS
from disttrain.models.base import load_base
from disttrain.models.parts import frozen

WIDTH = 4
ROOT = Path(__file__).parent.parent
WAYS = {
    "ddp": ["parallel.strategy=ddp"],
    "zero1": ["parallel.strategy=zero1"],
    "zero2": ["parallel.strategy=zero2"],
    "zero3": ["parallel.strategy=zero3"],
    "fsdp": ["parallel.strategy=fsdp"],
}


def resident_bytes() -> int:
    """Memory of this process that is in use, without what its allocator only keeps."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wider(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same network with WIDTH times the channels: large against what is held beside it."""
    channels = [WIDTH * n for n in unet.config["block_out_channels"]]
    torch.manual_seed(0)
    made = UNet2DConditionModel.from_config(unet.config, block_out_channels=channels)
    return frozen(made)


def batch(config: RunConfig, channels: int, rank: int, step: int) -> dict[str, torch.Tensor]:
    """Random latents and words for one micro-batch."""
    draws = torch.Generator().manual_seed(1000 * rank + step)
    rows = config.data.batch_size
    shape = (rows, channels, 8, 8)
    return {
        "latents": torch.randn(shape, generator=draws),
        "noise": torch.randn(shape, generator=draws),
        "timesteps": torch.randint(1000, (rows,), generator=draws),
        "weights": torch.full((1, rows), 1 / rows),
        "ids": torch.randint(1000, (rows, 77), generator=draws),
    }


def measure(words: list[str], steps: int) -> None:
    """One strategy on this process; rank zero prints the figures as JSON."""
    torch.set_num_threads(1)
    config = load_config(
        ROOT / "configs/dreambooth.yaml", [*words, "method.train_text_encoder=true"]
    )
    with Mesh(config) as mesh:
        load_deepspeed(mesh.device)  # its code is no part of what is compared
        base = load_base("tiny")
        channels = base.unet.config["in_channels"]
        base.unet = wider(base.unet)
        before = resident_bytes()
        own = sum(
            value.numel() * 4
            for part in (base.unet, base.text_encoder)
            for value in part.parameters()
        )
        method = METHODS["dreambooth"](base, [config])
        placement = place_weights(config, mesh, base, method)
        weights = own // 4
        seconds, held = [], 0
        for step in range(steps):
            mesh.barrier()
            started = time.perf_counter()
            with placement.accumulate(last=True):
                loss = placement.denoiser(batch(config, channels, mesh.rank, step)).sum()
                placement.backward(loss)
            del loss
            if step == steps - 1:  # gradients are there now, as at the peak of a step
                held = resident_bytes() - before + own
            set_rates(placement.optimizer, [config], [1.0])
            placement.step([True], [1.0])
            seconds.append(time.perf_counter() - started)
        if mesh.is_main:
            print(json.dumps({"bytes": held / weights, "seconds": statistics.median(seconds[2:])}))
        placement, method, base = None, None, None  # before the group that they talk through


def run(words: list[str], options: argparse.Namespace) -> dict[str, float]:
    """The figures of one strategy, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(options.processes), __file__, "--one"]
        command += ["--steps", str(options.steps), *words, f"output_dir={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(f"{words[0]} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def main() -> None:
    """Every strategy, and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.one:
        measure(options.words, options.steps)
        return
    found: dict[str, Any] = {}
    for name, words in WAYS.items():
        found[name] = run(words, options)
        found[name]["step / ddp"] = found[name]["seconds"] / found["ddp"]["seconds"]
        print(
            f"{name:6} {found[name]['bytes']:6.2f} bytes a weight   "
            f"step {found[name]['step / ddp']:.2f} x ddp's",
            flush=True,
        )
    if options.output:
        machine = f"{os.cpu_count()} cores, no GPU, {platform.machine()}, torch {torch.__version__}"
        facts = {"machine": machine, "processes": options.processes, "figures": found}
        options.output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
