"""The commands and the environment of one node's training processes, as pure functions.

Between `node.py`, which knows what is wanted and the machine, and `supervise.py`, which starts it.
Invariant: nothing here looks at the machine or starts anything; the same request gives the same
words on every machine.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from disttrain.cluster.rendezvous import Rendezvous

_STALE = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
_STALE_STARTS = ("ACCELERATE_", "TORCHELASTIC_", "PET_")
_TYPED = {
    "torch.distributed.run": ["torchrun"],
    "accelerate.commands.launch": ["accelerate", "launch"],
    "disttrain": ["disttrain"],
}
"""What a person types for a module that is started here with `python -m`."""


@dataclass(frozen=True)
class Request:
    """What one node is to start."""

    words: tuple[str, ...]
    """What each process runs, after `-m disttrain`."""
    nproc: int
    """Processes on this node, the same on every node."""
    nodes: int = 1
    """Nodes that make one world."""
    node_rank: int = 0
    """Which of them this is."""
    rendezvous: Rendezvous | None = None
    """Where launchers of several nodes meet."""
    own_address: str | None = None
    """How other nodes reach this one; torchrun would give them its host name, known or not."""
    launcher: str = "torchrun"
    """Which program starts the processes."""
    max_restarts: int = 0
    """How often all processes are started again after one died."""
    join_timeout: int = 300
    """Seconds until every node must have come."""
    run_name: str = ""
    """Keeps launchers of another run, at the same place by mistake, out of this one."""


@dataclass(frozen=True)
class Command:
    """A module to start with `python -m`, and what it needs beside the environment of all."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As one would type it."""
        _, _, module, *rest = self.arguments
        words = [*_TYPED[module], *rest]
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(words)])


def launcher_commands(request: Request, threads: int) -> list[Command]:
    """The one launcher of this node."""
    if request.launcher == "accelerate":
        words = _accelerate(request, threads)
    else:
        words = _torchrun(request)
    return [Command((sys.executable, "-m", *words, "-m", "disttrain", *request.words))]


def worker_commands(request: Request) -> list[Command]:
    """The workers of a fleet: worlds of their own, so nothing stands above them that would end all
    of them with one. They learn from a launcher's usual names which of how many they are."""
    world = request.nodes * request.nproc
    return [
        Command(
            (sys.executable, "-m", "disttrain", *request.words),
            {
                "RANK": str(request.node_rank * request.nproc + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(world),
            },
        )
        for local in range(request.nproc)
    ]


def _meeting(request: Request) -> str:
    """Settings of the rendezvous. Left to itself, torchrun guesses from names who listens there."""
    return f"is_host={int(request.node_rank == 0)},join_timeout={request.join_timeout}"


def _torchrun(request: Request) -> list[str]:
    words = ["torch.distributed.run", f"--nproc-per-node={request.nproc}"]
    if request.nodes == 1:
        words.append("--standalone")
    else:
        words += [
            f"--nnodes={request.nodes}",
            "--rdzv-backend=c10d",  # gives ranks itself; told of a node's, it warns
            f"--rdzv-endpoint={request.rendezvous}",
            f"--rdzv-id={request.run_name}",
            f"--rdzv-conf={_meeting(request)}",
        ]
        if request.own_address is not None:
            words.append(f"--local-addr={request.own_address}")
    return [*words, f"--max-restarts={request.max_restarts}"]


def _accelerate(request: Request, threads: int) -> list[str]:
    """Every value that a person's own Accelerate file could set otherwise is given."""
    world = request.nodes * request.nproc
    words = ["accelerate.commands.launch", *(["--multi_gpu"] if world > 1 else [])]
    pairs = {
        "num_machines": request.nodes,
        "num_processes": world,
        "machine_rank": request.node_rank,
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "num_cpu_threads_per_process": threads,
        "gpu_ids": "all",
        "max_restarts": request.max_restarts,
    }
    if request.rendezvous is not None:
        pairs |= {
            "main_process_ip": request.rendezvous.host,
            "main_process_port": request.rendezvous.port,
            "rdzv_backend": "c10d",
            "rdzv_conf": _meeting(request),
        }
    else:
        pairs["main_process_port"] = 0  # any that is free
    for name, value in pairs.items():
        words += [f"--{name}", str(value)]
    return words


def threads_of(inherited: Mapping[str, str], cores: int, nproc: int) -> int:
    """Processor threads of each process: its share of the cores, unless somebody said."""
    said = inherited.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) > 0 else max(1, cores // nproc)


def added_environment(
    inherited: Mapping[str, str], threads: int, interface: str | None
) -> dict[str, str]:
    """What the processes get beside what is set already.

    Args:
        interface: network interface towards the other nodes, if there are any.
    """
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        # Without it a restarted worker may read the address of its dead predecessor.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # A scheduler's TERM goes to torchrun too, which then gives its processes so many seconds
        # to save.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60",
    }
    if interface is not None:
        wanted |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    chosen = inherited.get("DISTTRAIN_INTERFACE")
    if chosen:  # wins over what is set already
        return {
            **{name: value for name, value in wanted.items() if name not in inherited},
            "GLOO_SOCKET_IFNAME": chosen,
            "NCCL_SOCKET_IFNAME": chosen,
        }
    return {name: value for name, value in wanted.items() if name not in inherited}


def without_stale(inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment without what another launcher left in it."""
    return {
        name: value
        for name, value in inherited.items()
        if name not in _STALE and not name.startswith(_STALE_STARTS)
    }
