"""What this machine has: cores, GPUs, and the way to other machines. No torch is asked.

Below `launch.py` and `rendezvous.py`. Invariant: everything is read, nothing is changed; the parts
that decide are pure functions of what was read.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ROUTES = Path("/proc/net/route")
ROUTES_6 = Path("/proc/net/ipv6_route")
_UP = 1


@dataclass(frozen=True)
class Route:
    """Packets for `network` leave by `interface`."""

    network: Network
    interface: str
    metric: int = 0


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def count_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that processes started here will see; none without NVIDIA's driver."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return count_visible(visible)
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        shown = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in shown.stdout.splitlines())


def count_visible(devices: str) -> int:
    """How many devices CUDA_VISIBLE_DEVICES names; CUDA stops reading at the first bad one."""
    names = [name.strip() for name in devices.split(",")]
    bad = [i for i, name in enumerate(names) if not name or name.startswith("-")]
    return bad[0] if bad else len(names)


def read_routes() -> list[Route]:
    """The routing table of this host, as far as it can be read."""
    routes: list[Route] = []
    if ROUTES.is_file():
        routes += parse_routes(ROUTES.read_text())
    if ROUTES_6.is_file():
        routes += parse_routes_6(ROUTES_6.read_text())
    return [route for route in routes if route.interface != "lo"]


def parse_routes(text: str) -> list[Route]:
    """Routes of /proc/net/route, whose addresses are hexadecimal in the order of the host."""
    routes = []
    for line in text.splitlines()[1:]:
        name, target, _, flags, _, _, metric, mask, *_ = line.split()
        if int(flags, 16) & _UP:
            address = ipaddress.IPv4Address(struct.pack("=L", int(target, 16)))
            bits = int(mask, 16).bit_count()
            routes.append(
                Route(ipaddress.IPv4Network((address, bits), strict=False), name, int(metric))
            )
    return routes


def parse_routes_6(text: str) -> list[Route]:
    """Routes of /proc/net/ipv6_route."""
    routes = []
    for line in text.splitlines():
        target, bits, _, _, _, metric, _, _, flags, name = line.split()
        if int(flags, 16) & _UP:
            address = ipaddress.IPv6Address(bytes.fromhex(target))
            network = ipaddress.IPv6Network((address, int(bits, 16)), strict=False)
            routes.append(Route(network, name, int(metric, 16)))
    return routes


def interface_towards(
    address: Address, routes: Sequence[Route], interfaces: Sequence[str]
) -> str | None:
    """The interface by which this host reaches `address`, or by which others reach it there.

    An address of this host's own stands for the network it is in. A loopback address, which many
    hosts give to their own name, stands for none: then it is the interface of the default route,
    else the only one there is.
    """
    fitting = [route for route in routes if address in route.network]
    if not fitting:  # such as ::1 on a host whose network is IPv4
        fitting = [route for route in routes if route.network.prefixlen == 0]
    if fitting:
        return min(fitting, key=lambda route: (-route.network.prefixlen, route.metric)).interface
    others = [name for name in interfaces if name != "lo"]
    return others[0] if len(others) == 1 else None


def interface_names() -> list[str]:
    """Network interfaces of this host."""
    return [name for _, name in socket.if_nameindex()]


def own_address_towards(address: Address) -> str | None:
    """The address of this host that `address` sees; none of a host that sees itself."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
        try:
            probe.connect((str(address), 9))
        except OSError:
            return None
        found = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    return None if found.is_loopback else str(found)
