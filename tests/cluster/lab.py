"""A real SLURM cluster of several hosts on one machine, for the checks in this folder.

    python tests/cluster/lab.py start --nodes 2      # as root; then, from any folder:
    python tests/cluster/lab.py exec sinfo           # on the host `control`, where one logs in
    python tests/cluster/lab.py exec --host node2 hostname
    python tests/cluster/lab.py off node2            # power cut; on, crash, cut, mend
    python tests/cluster/lab.py stop

A host is a process with network, host name, processes, IPC, mounts, /tmp, /run and /dev/shm of its
own, and a bridge joins the hosts. Nothing of the machine's own network or files is changed. The
state lies in build/cluster-lab of the checkout, so each checkout has one lab at most.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux"
NETWORK = "10.77.0"
CONTROL = "control"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


class LabError(Exception):
    """The lab cannot run here, or something in it does not answer."""


def refuse_where_impossible() -> None:
    """Say what is missing, if anything.

    Raises:
        LabError: one line, with what to do.
    """
    if os.geteuid() != 0:
        raise LabError("needs root, to make hosts out of namespaces; run it as root or in a VM")
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        raise LabError(
            f"{', '.join(missing)} not found; on Debian: "
            f"apt-get install --no-install-recommends {PACKAGES}"
        )
    kinds = ["--net", "--uts", "--ipc", "--pid", "--mount"]
    command = ["unshare", *kinds, "--fork", "--mount-proc", "mount", "--make-rprivate", "/"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        raise LabError(
            f"namespaces are not allowed here ({tried.stderr.strip()}); in Docker: --privileged"
        )


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass
class Lab:
    """One cluster. `with Lab() as lab:` starts it and leaves nothing behind."""

    nodes: int = 3
    cpus: int = 4
    memory: int = 8000
    notice: bool = True
    """Whether preempted jobs are sent the signal of `sbatch --signal`; many clusters only send
    TERM to the processes of a job."""
    kill_wait: int = 20
    """Seconds between TERM and KILL."""
    folder: Path = field(default_factory=lambda: ROOT / "build/cluster-lab")
    dies_with_us: bool = True
    """Whether the hosts end when this process ends, however it ends."""

    @property
    def share(self) -> Path:
        """A folder that every host sees at the same path."""
        return self.folder / "share"

    @property
    def names(self) -> list[str]:
        """Hosts that jobs run on."""
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    def __enter__(self) -> Lab:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Bring every host up. What an earlier lab in the same folder left is ended first."""
        refuse_where_impossible()
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("run", "state", "spool", "log", "share", "etc/slurm"):
            (self.folder / name).mkdir(parents=True)
        self._write_settings()
        for host in (CONTROL, *self.names):
            self.on(host)
        self.wait_idle(self.names)

    def stop(self) -> None:
        """End every host; the kernel ends all that runs in it."""
        for file in sorted((self.folder / "run").glob("*.pid"), reverse=True):
            self.crash(file.stem)

    def run(
        self,
        *command: str | Path,
        host: str = CONTROL,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """A command on a host, in the current folder, with its output."""
        return subprocess.run(
            self.words(host, *command),
            env={**(os.environ if env is None else env), "PATH": _PATH},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def words(self, host: str, *command: str | Path) -> list[str]:
        """The words that run a command on a host."""
        kinds = ["-n", "-u", "-i", "-p", "-m"]
        here = f"--wdns={os.getcwd()}"
        return ["nsenter", "-t", str(self._pid(host)), *kinds, here, "--", *map(str, command)]

    def on(self, host: str) -> None:
        """Power on."""
        if self._lives(host):
            raise LabError(f"{host} is on already")
        kinds = ["--net", "--uts", "--ipc", "--pid", "--mount"]
        command = [
            "unshare",
            *kinds,
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
            HERE / "host.sh",
        ]
        shared = [folder for folder in _shared_folders(self.folder) if folder.is_dir()]
        with (self.folder / f"log/host-{host}.log").open("ab") as log:
            outer = subprocess.Popen(
                [*map(str, [*command, self.folder, host, *shared])],
                env={**os.environ, "PATH": _PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if self.dies_with_us else None,
            )
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        wait_until(f"{host} comes up", lambda: bool(children.read_text().split()), 10)
        pid = children.read_text().split()[0]
        (self.folder / f"run/{host}.pid").write_text(pid)
        wait_until(f"{host} runs host.sh", lambda: self._lives(host), 10)
        self._connect(host, pid)
        (self.folder / f"run/{host}.network").touch()

    def off(self, host: str) -> None:
        """Power cut: the host is silent at once; no connection of it is closed."""
        self.cut(host)
        self.crash(host)

    def crash(self, host: str) -> None:
        """End everything on a host; its kernel still closes the connections."""
        if self._lives(host):
            os.kill(self._pid(host), signal.SIGKILL)
            wait_until(f"{host} ends", lambda: not self._lives(host), 20)
        (self.folder / f"run/{host}.pid").unlink(missing_ok=True)

    def cut(self, host: str) -> None:
        """Pull the network cable."""
        self._ip(CONTROL, "link", "set", host, "down")

    def mend(self, host: str) -> None:
        """Put the cable back."""
        self._ip(CONTROL, "link", "set", host, "up")

    def mend_all(self) -> None:
        """Every host on, connected and idle, as after the start."""
        for host in self.names:
            if self._lives(host):
                self.mend(host)
            else:
                self.on(host)
        self.wait_idle(self.names)

    def wait_known(self, hosts: Sequence[str], seconds: float = 60) -> None:
        """Wait until SLURM hears these hosts, which may be at work."""

        def heard() -> bool:
            shown = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").stdout
            states = dict(line.split() for line in shown.splitlines())
            return not any(states[host].endswith("*") or "down" in states[host] for host in hosts)

        wait_until(f"{', '.join(hosts)} heard", heard, seconds)

    def wait_idle(self, hosts: Sequence[str], seconds: float = 60) -> None:
        """Wait until SLURM would give work to these hosts."""

        def idle() -> bool:
            shown = self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").stdout
            return set(hosts) <= set(shown.split())

        wait_until(f"{', '.join(hosts)} idle", idle, seconds)

    def _write_settings(self) -> None:
        etc = self.folder / "etc"
        settings = (HERE / "slurm.conf.in").read_text()
        for key, value in {
            "NODES": self.nodes,
            "CPUS": self.cpus,
            "MEMORY": self.memory,
            "KILL_WAIT": self.kill_wait,
            "NOTICE": "SlurmctldParameters=preempt_send_user_signal" if self.notice else "",
        }.items():
            settings = settings.replace(f"@{key}@", str(value))
        (etc / "slurm/slurm.conf").write_text(settings)
        (etc / "resolv.conf").write_text("")
        (etc / "munge.key").write_bytes(secrets.token_bytes(128))
        lines = ["127.0.0.1 localhost"]
        for host in (CONTROL, *self.names):
            lines += [f"{_address(host)} {host}", f"::ffff:{_address(host)} {host}"]
        (etc / "hosts").write_text("\n".join(lines) + "\n")

    def _connect(self, host: str, pid: str) -> None:
        self._ip(host, "link", "set", "lo", "up")
        if host == CONTROL:
            self._ip(host, "link", "add", "bridge", "type", "bridge")
            card = "bridge"
        else:
            old = [*self.words(CONTROL, "ip", "link", "del", host)]
            subprocess.run(old, capture_output=True, check=False)  # of before a power cut
            ends = ["type", "veth", "peer", "name", "eth0", "netns", pid]
            subprocess.run(
                ["nsenter", "-t", str(self._pid(CONTROL)), "-n", "ip", "link", "add", host, *ends],
                check=True,
            )
            self._ip(CONTROL, "link", "set", host, "master", "bridge", "up")
            card = "eth0"
        self._ip(host, "addr", "add", f"{_address(host)}/24", "dev", card)
        self._ip(host, "link", "set", card, "up")

    def _ip(self, host: str, *words: str) -> None:
        command = ["nsenter", "-t", str(self._pid(host)), "-n", "ip", *words]
        subprocess.run(command, env={**os.environ, "PATH": _PATH}, check=True)

    def _pid(self, host: str) -> int:
        try:
            return int((self.folder / f"run/{host}.pid").read_text())
        except (OSError, ValueError) as error:
            raise LabError(f"{host} is off") from error

    def _lives(self, host: str) -> bool:
        """Whether the recorded process is this lab's host, and not another that got its number."""
        try:
            words = Path(f"/proc/{self._pid(host)}/cmdline").read_bytes().split(b"\0")
            stat = Path(f"/proc/{self._pid(host)}/stat").read_text()
        except (OSError, LabError):
            return False
        mine = [str(self.folder).encode(), host.encode()]
        return words[2:4] == mine and ") Z" not in stat


def wait_until(what: str, met: Callable[[], bool], seconds: float, every: float = 0.1) -> None:
    """Look until something is so.

    Raises:
        LabError: it was not within these seconds.
    """
    deadline = time.monotonic() + seconds
    while not met():
        if time.monotonic() > deadline:
            raise LabError(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(every)


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """The folder that commands on hosts start in."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _address(host: str) -> str:
    return f"{NETWORK}.1" if host == CONTROL else f"{NETWORK}.{10 + int(host[4:])}"


def _shared_folders(folder: Path) -> list[Path]:
    """What hosts need to see even where it lies below /tmp."""
    return [ROOT, folder, Path(sys.prefix), Path(sys.base_prefix)]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def main() -> int:
    """The command line; returns an exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="bring the cluster up")
    start.add_argument("--nodes", type=int, default=2)
    start.add_argument("--cpus", type=int, default=4, help="that each host claims to have")
    commands.add_parser("stop", help="end it")
    commands.add_parser("possible", help="say what is missing here, if anything")
    inside = commands.add_parser("exec", help="run a command on a host")
    inside.add_argument("--host", default=CONTROL)
    inside.add_argument("words", nargs=argparse.REMAINDER)
    for name in ("on", "off", "crash", "cut", "mend"):
        commands.add_parser(name).add_argument("host")
    options = parser.parse_args()
    lab = Lab(dies_with_us=False)
    try:
        if options.command == "start":
            lab = Lab(nodes=options.nodes, cpus=options.cpus, dies_with_us=False)
            lab.start()
            print(f"{lab.nodes} hosts; shared folder {lab.share}")
        elif options.command == "stop":
            lab.stop()
        elif options.command == "possible":
            refuse_where_impossible()
        elif options.command == "exec":
            return subprocess.run(lab.words(options.host, *options.words), check=False).returncode
        else:
            getattr(lab, options.command)(options.host)
    except LabError as error:
        print(f"cluster lab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
