"""What every process of a run says of itself, gathered so that all have the same list.

Before the base model loads; `preflight.py` judges it and `disttrain doctor --distributed` prints
it. Invariant: nothing stays behind: the one file that is written, to see whether the others see it,
is removed again.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from disttrain import __version__, schema
from disttrain.config import RunConfig
from disttrain.engine.distributed import Mesh
from disttrain.engine.run_folder import PACKAGES
from disttrain.errors import UserError
from disttrain.files import digest_of, sha256_file

SECONDS_TO_SEE_A_FILE = 10.0
SECONDS_UNTIL_SAID = 60.0
NUMBERS_ADDED = 1024
INTERFACE_NAMES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@dataclass(frozen=True)
class RankFacts:
    """One process, as it sees itself."""

    host: str
    rank: int
    local_rank: int
    settings: Mapping[str, object]
    """The resolved settings by dotted key, the command, and what the launcher chose."""
    versions: Mapping[str, str]
    """Of Python and of every package that decides what a run does, if it is installed."""
    code: str
    """Digest of disttrain's own source."""
    device: str
    """cpu or cuda."""
    device_name: str
    device_id: str
    """The same for two processes that compute on one GPU; empty on processors."""
    interface: str
    """What the variables for the network interface say."""
    output_dir: str
    free: Mapping[str, int]
    """Free bytes where the run writes, by the nearest folder that exists."""
    shared: bool
    """Whether this process sees what rank zero writes into output_dir."""
    writable: bool
    sum_is_right: bool
    clock: float
    """Seconds since 1970, by this host, just after all ranks had met."""

    @property
    def label(self) -> str:
        """How messages call this process."""
        return f"{self.host} (rank {self.rank})"


def survey(config: RunConfig, mesh: Mesh, command: str) -> list[RankFacts]:
    """The facts of all ranks, in order; the same list on each.

    Args:
        command: what was asked for besides the settings, such as "train --fresh".

    Raises:
        UserError: rank zero cannot write into output_dir, or the ranks cannot add up numbers.
    """
    folder = Path(config.output_dir).absolute()
    if mesh.world == 1:
        return [_facts_here(config, mesh, command, shared=True, sum_is_right=True)]
    token = mesh.on_rank_zero(partial(_leave_token, folder))
    try:
        right = _sum_is_right(mesh)
        clock = time.time()
        shared = _sees(folder, token)
        return mesh.gather(_facts_here(config, mesh, command, shared, right, clock))
    finally:
        if mesh.is_main:
            token.path(folder).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Token:
    """A file in output_dir, or where output_dir would be made: so many folders above."""

    levels: int
    name: str

    def path(self, folder: Path) -> Path:
        above = [folder, *folder.parents]
        return above[min(self.levels, len(above) - 1)] / self.name


def _leave_token(folder: Path) -> _Token:
    above = [folder, *folder.parents]
    levels = next(level for level, place in enumerate(above) if place.exists())
    token = _Token(levels, f".disttrain-{uuid.uuid4().hex}.tmp")
    try:
        token.path(folder).touch(exist_ok=False)
    except OSError as error:
        raise UserError(
            f"preflight: {socket.gethostname()} (rank 0) cannot write into output_dir {folder}: "
            f"{error.strerror or error}"
        ) from error
    return token


def _sees(folder: Path, token: _Token) -> bool:
    """Whether the file is there. A network file system may take a moment to show it."""
    deadline = time.monotonic() + SECONDS_TO_SEE_A_FILE
    while not token.path(folder).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _sum_is_right(mesh: Mesh) -> bool:
    own = torch.full((NUMBERS_ADDED,), float(mesh.rank + 1), device=mesh.device)
    try:
        mean = mesh.mean(own)
    except RuntimeError as error:  # what gloo and NCCL raise when they cannot reach each other
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"preflight: {socket.gethostname()} (rank {mesh.rank}) cannot add up numbers with the "
            f"others: {reason}; name the network interface that reaches them in DISTTRAIN_INTERFACE"
        ) from error
    return bool(torch.allclose(mean, torch.full_like(mean, (mesh.world + 1) / 2)))


@contextmanager
def saying_if_it_waits(rank: int, seconds: float = SECONDS_UNTIL_SAID) -> Iterator[None]:
    """Inside the block one line is said if it takes so long: a collective waits in silence."""
    text = (
        f"[{socket.gethostname()} rank {rank}] preflight: still waiting for the other processes "
        f"after {seconds:.0f} s; the one that says nothing is stuck, or the network between the "
        f"hosts does not carry the traffic ({interface()})"
    )
    timer = threading.Timer(seconds, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def interface() -> str:
    """What the variables for the network interface say."""
    names = [f"{name}={os.environ[name]}" for name in INTERFACE_NAMES if os.environ.get(name)]
    return " ".join(names) or "no interface is named; the libraries choose"


def _facts_here(
    config: RunConfig,
    mesh: Mesh,
    command: str,
    shared: bool,
    sum_is_right: bool,
    clock: float | None = None,
) -> RankFacts:
    name, identity = _device(mesh.device)
    folder = Path(config.output_dir).absolute()
    places = {nearest_folder(folder), nearest_folder(config.cache_folder.absolute())}
    return RankFacts(
        host=socket.gethostname(),
        rank=mesh.rank,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        settings={
            "command": command,
            **schema.flatten(schema.to_mapping(config)),
        },
        versions=_versions(),
        code=code_digest(),
        device=mesh.device.type,
        device_name=name,
        device_id=identity,
        interface=interface(),
        output_dir=str(folder),
        free={str(p): free for p in sorted(places) if (free := free_bytes(p)) is not None},
        shared=shared,
        writable=os.access(nearest_folder(folder), os.W_OK | os.X_OK),
        sum_is_right=sum_is_right,
        clock=time.time() if clock is None else clock,
    )


def _device(device: torch.device) -> tuple[str, str]:
    """Name, and what tells two GPUs apart wherever they are."""
    if device.type != "cuda":
        return platform.machine(), ""
    properties = torch.cuda.get_device_properties(device)
    # Parts of one GPU (MIG) may share its identity; a process sees one of them, by its own name.
    part = os.environ.get("CUDA_VISIBLE_DEVICES", "") if "MIG" in properties.name else ""
    return properties.name, f"{properties.uuid}{part}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "disttrain": __version__}
    for name in (*PACKAGES, "deepspeed"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """Hex digest of disttrain's own source files."""
    root = Path(__file__).parent.parent
    return digest_of(
        {str(path.relative_to(root)): sha256_file(path) for path in root.rglob("*.py")}
    )


def nearest_folder(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above it that does."""
    return next(place for place in (path, *path.parents) if place.exists())


def free_bytes(folder: Path) -> int | None:
    """Free bytes for this user where a folder lies; None where the file system does not say."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None
