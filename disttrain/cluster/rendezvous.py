"""Where the launchers of several nodes meet, and whether this node can get there.

Asked before anything is started, so that a wrong name or a closed firewall is one line within
seconds, and not a time-out of each process. Invariant: a rendezvous that passed is one to which
this node opened a connection, or this node is the one that will listen there.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from disttrain.cluster.machine import Address
from disttrain.errors import Interrupted, UserError

ANSWER_SECONDS = 20.0
SAY_EVERY = 10.0


@dataclass(frozen=True)
class Rendezvous:
    """The first node, by a name that every node knows, and a port on it."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_rendezvous(text: str) -> Rendezvous:
    """HOST:PORT, with brackets around an IPv6 address."""
    found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]\s/]+)):([0-9]{1,5})", text)
    if found is None or not 0 < int(found[3]) < 65536:
        raise UserError(f"--rendezvous: {text!r} is no place; write HOST:PORT, such as node1:29500")
    return Rendezvous(found[1] or found[2], int(found[3]))


def resolve(
    place: Rendezvous,
    patience: float = 0.0,
    say: Callable[[str], None] = print,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Address]:
    """Addresses of the rendezvous host.

    Args:
        patience: seconds to wait for a name that is not known yet; 0 refuses it at once.

    Raises:
        UserError: the name is not known.
    """
    waiting = _Waiting(place, patience, say, stopped)
    while True:
        try:
            found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            if isinstance(error, OSError) and waiting.goes_on("its name is not known yet"):
                continue
            reason = getattr(error, "strerror", None) or "not a host name"
            raise _unreachable(
                place,
                f"{place.host} is not known here ({reason})",
                "give a name or address of the first node that every node can resolve, or wait for "
                "it with --join-timeout",
            ) from error
        return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


def check_free(place: Rendezvous) -> None:
    """Refuse a port of this host at which something listens already."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.port))
        except OSError as error:
            raise UserError(
                f"cannot listen at the rendezvous {place} on {socket.gethostname()}: "
                f"{error.strerror}; give another port with --rendezvous on every node"
            ) from error


def reach(
    place: Rendezvous,
    patience: float,
    say: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
    for_whatever: bool = False,
) -> None:
    """Wait until the rendezvous takes connections.

    A host that refuses is there and its launcher is not, yet; one that gives no answer is behind a
    firewall or off.

    Args:
        patience: seconds to wait while it refuses.
        for_whatever: wait so long also for a host that gives no answer.

    Raises:
        UserError: it cannot be reached, with the reason and what to do.
        Interrupted: a signal asked for the end meanwhile.
    """
    waiting = _Waiting(place, patience, say, stopped)
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=ANSWER_SECONDS).close()
            return
        except OSError as error:
            refused = isinstance(error, ConnectionRefusedError)
            what = "nothing listens there yet" if refused else "no answer yet"
            if (refused or for_whatever) and waiting.goes_on(what):
                continue
            raise _unreachable(place, *_explanation(place, error, waiting)) from error


class _Waiting:
    """Patience with one place, and the lines that are said meanwhile."""

    def __init__(
        self,
        place: Rendezvous,
        patience: float,
        say: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        self.place, self.patience, self.say, self.stopped = place, patience, say, stopped
        self.began = time.monotonic()
        self.said = self.began - SAY_EVERY

    @property
    def waited(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.began

    def goes_on(self, what: str) -> bool:
        """Pause and say yes, or no when patience is over.

        Raises:
            Interrupted: a signal asked for the end.
        """
        if self.stopped():
            raise Interrupted("stopped while waiting for the first node; the same command goes on")
        left = self.patience - self.waited
        if left <= 0:
            return False
        if time.monotonic() - self.said >= SAY_EVERY:
            self.say(f"waiting for {self.place}: {what}; {left:.0f} s left")
            self.said = time.monotonic()
        time.sleep(min(1.0, max(0.05, left)))
        return True


def _explanation(place: Rendezvous, error: OSError, waiting: _Waiting) -> tuple[str, str]:
    """Why a host cannot be reached, and what to do."""
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listened there for {waiting.waited:.0f} s", _advice(place)
    if isinstance(error, TimeoutError):
        return (
            f"no answer for {max(ANSWER_SECONDS, waiting.waited):.0f} s",
            f"open port {place.port} of {place.host} to this host, or give another of its "
            "addresses",
        )
    return (
        error.strerror or str(error),
        f"make {place.host} reachable from this host, or give another of its addresses",
    )


def _advice(place: Rendezvous) -> str:
    if all(address.is_loopback for address in resolve(place)):
        return f"{place.host} means each node itself; give a name or address that others reach"
    return (
        "start disttrain launch on the first node too, with the same --rendezvous, or wait longer "
        "with --join-timeout"
    )


def _unreachable(place: Rendezvous, reason: str, advice: str) -> UserError:
    here = socket.gethostname()
    return UserError(f"cannot reach the rendezvous {place} from {here}: {reason}; {advice}")
