"""What packing is worth: subjects an hour by pack size, against one after another and the scripts.

    python benchmarks/pack.py                       # about four minutes on two cores
    python benchmarks/pack.py --ranks               # also 64 subjects on 1 and on 2 ranks

All figures are of one process that has loaded the base once, taken in turns, several rounds; ratios
are medians over rounds. "script" is the work of one step of diffusers' example scripts, which train
one subject a process: textual inversion with a gradient, an optimizer state and a restored copy for
the whole vocabulary; both with the picture encoded by the autoencoder and the prompt by the text
encoder in each step, batch 1. What a script loads at each start is timed by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig

from disttrain.config import RunConfig
from disttrain.engine.claims import Claims
from disttrain.engine.distributed import Mesh, WorkerPlace
from disttrain.engine.fleet import settled
from disttrain.engine.fleet_worker import FleetWorker
from disttrain.engine.pack import Pack
from disttrain.engine.pack_size import bytes_per_subject
from disttrain.engine.progress import Progress
from disttrain.engine.train import gradients
from disttrain.manifest import read_manifest
from disttrain.models.base import BaseModel, load_base
from disttrain.models.text import PromptTokenizer

ROOT = Path(__file__).parent.parent
EXAMPLES = ("fox", "penguin", "octopus", "dolphin", "dragon")
SIZES = (1, 2, 4, 8, 16, 32)
METHODS: dict[str, dict[str, Any]] = {
    "textual_inversion": {"name": "textual_inversion", "num_vectors": 1, "init_text": "animal"},
    "lora": {"name": "lora", "rank": 8},
}


def members(method: str, count: int, output: Path, steps: int, base: str) -> list[RunConfig]:
    """Subjects of the example pictures, with words of their own."""
    rows = [
        {
            "name": f"s{i:03d}",
            "images": str(ROOT / "examples/subjects" / EXAMPLES[i % 5]),
            "token": f"<s{i:03d}>",
            "class_name": EXAMPLES[i % 5],
            "seed": i,
        }
        for i in range(count)
    ]
    tree = {
        "name": "bench",
        "output_dir": str(output),
        "base_model": base,
        "method": METHODS[method],
        "data": {"resolution": 64, "batch_size": 1},
        "optim": {"learning_rate": 1e-3, "scale_lr": "none"},
        "train": {"max_steps": steps, "checkpoint_every": 10**6},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "manifest.yaml").write_text(yaml.safe_dump(rows))
    return settled(read_manifest(output / "manifest.yaml", tree))


class Packs:
    """A pack of each size, made over one base after another."""

    def __init__(self, method: str, folder: Path, base: str, sizes: Sequence[int] = SIZES) -> None:
        self.members = members(method, max(sizes), folder, 10**6, base)
        self.mesh = Mesh(self.members[0])
        claims = Claims(folder / "claims", 60, WorkerPlace(0, 1), static=False)
        self.worker = FleetWorker(
            self.members, self.mesh, Progress(False, details=False), claims, retry=False
        )
        self.packs: dict[int, Pack] = {}
        for size in sizes:
            data = self.worker._open(list(self.worker.members)[:size])
            pack = self.worker.assemble(data)
            assert pack is not None
            self.packs[size] = pack

    def step(self, size: int) -> None:
        """One update of every subject of a pack, as training makes it."""
        pack = self.packs[size]
        pack.begin_step()
        pack.update(gradients(self.worker, pack).tolist())


def script_step(method: str, base: BaseModel) -> Callable[[], None]:
    """One step of the example script of a method, batch 1, in plain torch and diffusers."""
    vae, unet, text = base.load_vae(), base.unet, base.text_encoder
    tokenizer = PromptTokenizer(base.tokenizer)
    alphas = base.scheduler.alphas_cumprod
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    ids = tokenizer.ids("a photo of sks animal")[None]
    if method == "lora":
        unet.add_adapter(
            LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        )
        trained = [p for p in unet.parameters() if p.requires_grad]
        vocabulary = before = None
    else:
        vocabulary = text.get_input_embeddings().weight
        vocabulary.requires_grad_(True)
        before, trained = vocabulary.detach().clone(), [vocabulary]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-2)

    def step() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * base.scaling_factor
        noise = torch.randn_like(latents)
        time_step = torch.randint(0, 1000, (1,))
        kept = alphas[time_step].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        context = text(input_ids=ids).last_hidden_state
        predicted = unet(noisy, time_step, context, return_dict=False)[0]
        torch.nn.functional.mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if vocabulary is not None and before is not None:
            others = torch.ones(len(vocabulary), dtype=torch.bool)
            others[48136] = False
            with torch.no_grad():
                vocabulary[others] = before[others]

    return step


def peak_of(method: str, size: int, base: str) -> int:
    """Peak memory in bytes of a process that takes three updates of a pack."""
    command = [sys.executable, __file__, "--base", base, "--peak", method, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak(method: str, size: int, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        packs = Packs(method, Path(name), options.base, (size,))
        for _ in range(3):
            packs.step(size)
        packs.mesh.release()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def seconds_of(work: Callable[[], None], at_least: float) -> float:
    """Mean time of one call, over calls for so many seconds."""
    work()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < at_least:
        work()
        count += 1
    return (time.perf_counter() - started) / count


def measure(method: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of an update of each kind, by round; memory; traffic."""
    packs = Packs(method, folder / method, options.base)
    started = time.perf_counter()
    base = load_base(options.base)
    loading = time.perf_counter() - started
    script = script_step(method, base)
    kinds: dict[str, Callable[[], None]] = {"script": script}
    for size in SIZES:
        kinds[f"pack of {size}"] = lambda size=size: packs.step(size)
    rounds = []
    for number in range(options.rounds):
        print(f"{method}: round {number + 1}", file=sys.stderr, flush=True)
        rounds.append({kind: seconds_of(work, options.seconds) for kind, work in kinds.items()})
    pack = packs.packs[1]
    own = sum(value.numel() * 4 for value in pack.parameters.values())
    rows, width = base.text_encoder.get_input_embeddings().weight.shape
    result = {
        "seconds_of_an_update": rounds,
        "seconds_to_load_the_base": loading,
        "bytes_per_subject": bytes_per_subject(packs.packs[8]),
        "peak_bytes": {size: peak_of(method, size, options.base) for size in (8, 32)},
        "bytes_reduced_a_step": own,
        "bytes_of_optimizer_state": 2 * own,
        "bytes_reduced_by_the_script": rows * width * 4 if method != "lora" else own,
    }
    packs.mesh.release()
    return result


def on_ranks(folder: Path, subjects: int, steps: int) -> dict[str, float]:
    """Wall seconds of a fleet on one and on two ranks, one thread each, start-up included."""
    found = {}
    members("textual_inversion", subjects, folder, steps, "tiny")
    tree = {
        "name": "bench",
        "method": METHODS["textual_inversion"],
        "data": {"resolution": 64, "batch_size": 1},
        "optim": {"learning_rate": 1e-3, "scale_lr": "none"},
        "train": {"max_steps": steps, "checkpoint_every": 10**6},
        "fleet": {"pack_size": 8},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    for ranks in (1, 2):
        command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", str(ranks)]
        command += ["--master-port", str(29600 + ranks), "-m", "disttrain", "fleet"]
        command += [str(folder / "manifest.yaml"), str(folder / "config.yaml")]
        command += [f"output_dir={folder / str(ranks)}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        found[str(ranks)] = time.perf_counter() - started
    return found


def by_peaks(peaks: dict[Any, int]) -> float:
    """MiB of one more subject, from the peaks of two packs."""
    return (peaks[32] - peaks[8]) / 24 / 2**20


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{result['machine']}, base {result['base']}, {result['threads']} thread(s)"]
    for method, found in result["methods"].items():
        rounds = found["seconds_of_an_update"]
        lines += [
            "",
            f"{method}, {result['steps']} steps a subject, batch 1",
            "",
            "| | ms an update | subjects/hour | against pack of 1 | against script |",
            "|---|---|---|---|---|",
        ]
        for kind in rounds[0]:
            size = int(kind.rpartition(" ")[2]) if kind != "script" else 1
            one = statistics.median(r[kind] for r in rounds)
            hourly = 3600 * size / (one * result["steps"])
            ratios = [
                statistics.median(size * r[other] / r[kind] for r in rounds)
                for other in ("pack of 1", "script")
            ]
            lines.append(
                f"| {kind} | {one * 1000:.1f} | {hourly:,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
            )
        lines += [
            "",
            f"loading the base: {found['seconds_to_load_the_base']:.1f} s, once for the fleet, and "
            "once a subject with the script",
            f"memory of one more subject: {found['bytes_per_subject'] / 2**20:.2f} MiB by what a "
            f"step keeps, {by_peaks(found['peak_bytes']):.2f} MiB by peaks of packs of 8 and 32",
            f"all-reduced a step: {found['bytes_reduced_a_step']:,} bytes a subject; the script: "
            f"{found['bytes_reduced_by_the_script']:,}",
            f"optimizer state: {found['bytes_of_optimizer_state']:,} bytes a subject",
        ]
    if "ranks" in result:
        one, two = result["ranks"]["1"], result["ranks"]["2"]
        lines += ["", f"64 subjects: {one:.0f} s on 1 rank, {two:.0f} s on 2: {two / one:.2f}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each figure")
    parser.add_argument("--steps", type=int, default=300, help="of a subject, for subjects/hour")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", action="store_true", help="also 64 subjects on 1 and 2 ranks")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]), options)
        return
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "base": options.base,
        "threads": options.threads,
        "steps": options.steps,
        "methods": {},
    }
    with tempfile.TemporaryDirectory() as name:
        for method in METHODS:
            result["methods"][method] = measure(method, options, Path(name))
        if options.ranks:
            result["ranks"] = on_ranks(Path(name) / "ranks", 64, 60)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
