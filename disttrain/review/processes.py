"""`disttrain doctor --distributed`: the processes of one launcher, and what lies between them.

It sees what a run's preflight sees, and measures besides. Invariant: rank zero prints; nothing is
left behind.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from disttrain.config import OptimSettings, RunConfig, TextualInversionSettings, TrainSettings
from disttrain.engine.distributed import Mesh
from disttrain.engine.preflight import plain_size, problems, warnings
from disttrain.engine.survey import RankFacts, saying_if_it_waits, survey

SMALL, LARGE = 4, 64 * 10**6
REPEATS = 3
MOST_RANKS = 64


def describe_processes(output_dir: str) -> int:
    """Print what is found; returns how many things are wrong, the same on every rank.

    Raises:
        UserError: the processes cannot form one world.
    """
    config = RunConfig(
        name="doctor",
        method=TextualInversionSettings(),
        subjects=(),
        optim=OptimSettings(learning_rate=0.0),
        train=TrainSettings(max_steps=1),
        output_dir=output_dir,
    )
    with Mesh(config) as mesh:
        with saying_if_it_waits(mesh.rank):
            facts = survey(config, mesh, "doctor")
            # A wrong sum or a slow network shows here too; the ranks go through it alike.
            small, large = (_seconds_to_add(mesh, size) for size in (SMALL, LARGE))
        found = problems(facts)
        if mesh.is_main:
            _print(facts, small, large)
            for line in warnings(facts):
                print(f"warning: {line}")
            for line in found:
                print(f"wrong: {line}")
            print("ready to train together" if not found else f"{len(found)} to mend", flush=True)
    return len(found)


def _seconds_to_add(mesh: Mesh, size: int) -> float:
    """Wall time of adding up a tensor of so many bytes over all ranks; the best of a few."""
    values = torch.zeros(size // 4, device=mesh.device)
    best = float("inf")
    for _ in range(REPEATS):
        mesh.barrier()
        started = time.perf_counter()
        mesh.mean(values)[0].item()  # reading a number waits until the GPU has it
        best = min(best, time.perf_counter() - started)
    return best


def _print(facts: Sequence[RankFacts], small: float, large: float) -> None:
    first, hosts = facts[0], dict.fromkeys(one.host for one in facts)
    print(f"processes    {len(facts)} on {len(hosts)} {'host' if len(hosts) == 1 else 'hosts'}")
    for one in facts[:MOST_RANKS]:
        free = min(one.free.values(), default=None)
        room = "unknown" if free is None else plain_size(free)
        print(
            f"rank {one.rank:<7} {one.host}, local rank {one.local_rank}, {one.device} "
            f"({one.device_name}), {room} free in {one.output_dir}"
        )
    if len(facts) > MOST_RANKS:
        print(f"             and {len(facts) - MOST_RANKS} more")
    equal = all(one.versions == first.versions and one.code == first.code for one in facts)
    listed = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    print(f"versions     {'equal' if equal else 'not equal; rank 0'}: {listed}")
    for interface in dict.fromkeys(one.interface for one in facts):
        print(f"interface    {interface}")
    shared = all(one.shared for one in facts)
    print(f"output_dir   {first.output_dir} is {'' if shared else 'not '}shared by all")
    if len(facts) > 1:
        rate = LARGE / large / 1e9
        print(f"adding up    {SMALL} bytes in {small * 1e3:.2f} ms")
        print(f"             {LARGE // 10**6} MB in {large * 1e3:.1f} ms, {rate:.2f} GB/s")
