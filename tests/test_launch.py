"""`disttrain launch`: what it starts, whether it gets there, how it stops, what it returns."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, checkpoints, clean_environment, small_config, write_config

from disttrain.cli import main
from disttrain.cluster import machine, rendezvous
from disttrain.cluster.commands import joined
from disttrain.cluster.exit_codes import FOLDER, meaning, read_notes, told
from disttrain.cluster.launch import (
    Request,
    added_environment,
    launcher_commands,
    threads_of,
    without_stale,
    worker_commands,
)
from disttrain.cluster.machine import Route, interface_towards, parse_routes, parse_routes_6
from disttrain.cluster.rendezvous import Rendezvous, parse_rendezvous
from disttrain.cluster.supervise import GENTLE
from disttrain.errors import Interrupted, UserError

WORDS = ("train", "c.yaml", "name=a b")
TWO_NODES = Request(
    WORDS, 4, nodes=2, node_rank=1, rendezvous=Rendezvous("node1", 29500), run_name="fox"
)


# What is started, as pure functions.


def shown(request: Request) -> str:
    (command,) = launcher_commands(request, threads=3)
    return str(command)


def test_one_node_needs_no_rendezvous() -> None:
    assert shown(Request(WORDS, 2)) == (
        "torchrun --nproc-per-node=2 --standalone --max-restarts=0 "
        "-m disttrain train c.yaml 'name=a b'"
    )


def test_several_nodes_meet_at_the_first() -> None:
    assert shown(TWO_NODES) == (
        "torchrun --nproc-per-node=4 --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node1:29500 "
        "--rdzv-id=fox --rdzv-conf=is_host=0,join_timeout=300 --max-restarts=0 "
        "-m disttrain train c.yaml 'name=a b'"
    )
    first = Request(
        **{**vars(TWO_NODES), "node_rank": 0, "own_address": "10.0.0.1", "max_restarts": 3}
    )
    assert "is_host=1,join_timeout=300 --local-addr=10.0.0.1 --max-restarts=3 " in shown(first)


def test_accelerate_is_told_everything_its_own_file_could_say() -> None:
    request = Request(**{**vars(TWO_NODES), "launcher": "accelerate"})
    assert shown(request) == (
        "accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank 1 "
        "--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 3 --gpu_ids all "
        "--max_restarts 0 --main_process_ip node1 --main_process_port 29500 --rdzv_backend c10d "
        "--rdzv_conf is_host=0,join_timeout=300 -m disttrain train c.yaml 'name=a b'"
    )
    alone = shown(Request(WORDS, 1, launcher="accelerate"))
    assert "--multi_gpu" not in alone  # Accelerate refuses it for one process
    assert "--main_process_port 0 " in alone


def test_the_command_that_runs_is_the_one_that_is_shown() -> None:
    (command,) = launcher_commands(TWO_NODES, threads=3)
    assert command.arguments[:3] == (sys.executable, "-m", "torch.distributed.run")
    assert command.arguments[-5:] == ("-m", "disttrain", *WORDS)


def test_workers_of_a_fleet_know_which_of_how_many_they_are() -> None:
    commands = worker_commands(Request(("fleet", "m.csv", "c.yaml"), 2, nodes=3, node_rank=2))
    places = [
        tuple(int(command.environment[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        for command in commands
    ]
    assert places == [(4, 0, 6), (5, 1, 6)]
    assert str(commands[0]) == "RANK=4 LOCAL_RANK=0 WORLD_SIZE=6 disttrain fleet m.csv c.yaml"


@pytest.mark.parametrize(
    ("set_before", "expected"),
    [({}, 2), ({"OMP_NUM_THREADS": "5"}, 5), ({"OMP_NUM_THREADS": ""}, 2)],
)
def test_processes_share_the_cores(set_before: dict[str, str], expected: int) -> None:
    assert threads_of(set_before, cores=9, nproc=4) == expected
    assert threads_of({}, cores=2, nproc=4) == 1


def test_what_is_set_already_stays_and_a_chosen_interface_wins() -> None:
    assert added_environment({}, 2, "ib0") == {
        "OMP_NUM_THREADS": "2",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60",
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "ib0",
    }
    before = {"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "eth1"}
    added = added_environment(before, 2, "ib0")
    assert "OMP_NUM_THREADS" not in added
    assert "GLOO_SOCKET_IFNAME" not in added
    assert added["NCCL_SOCKET_IFNAME"] == "ib0"
    chosen = added_environment({**before, "DISTTRAIN_INTERFACE": "wg0"}, 2, "ib0")
    assert (chosen["GLOO_SOCKET_IFNAME"], chosen["NCCL_SOCKET_IFNAME"]) == ("wg0", "wg0")
    assert "GLOO_SOCKET_IFNAME" not in added_environment({}, 2, None)


def test_what_other_launchers_left_behind_goes() -> None:
    stale = {"ACCELERATE_USE_CPU": "1", "RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "x"}
    stale |= {"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "y", "PET_NNODES": "2"}
    assert without_stale({**stale, "HOME": "/h", "SLURM_NODEID": "1"}) == {
        "HOME": "/h",
        "SLURM_NODEID": "1",
    }


# This machine and the way to others.


@pytest.mark.parametrize(
    ("devices", "count"), [("0,1,3", 3), ("", 0), ("-1", 0), ("0,-1,2", 1), ("GPU-a,MIG-b", 2)]
)
def test_visible_devices_are_the_gpus(devices: str, count: int) -> None:
    assert machine.count_gpus({"CUDA_VISIBLE_DEVICES": devices}) == count


def test_gpus_are_counted_by_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g'\necho 'GPU 1: A'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert machine.count_gpus({}) == 2
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert machine.count_gpus({}) == 0


TABLE = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
wlan0\t00000000\t0102A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
ib0\t0000640A\t00000000\t0001\t0\t0\t900\t0000FFFF\t0\t0\t0
down0\t0001640A\t00000000\t0000\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
TABLE_6 = (
    "fd000000000000000000000000000000 08 00000000000000000000000000000000 00 "
    "00000000000000000000000000000000 00000100 00000001 00000000 00000001     ib0\n"
)


@pytest.mark.skipif(sys.byteorder != "little", reason="the table above is of such a machine")
@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("10.100.1.7", "ib0"),
        ("192.0.2.9", "eth0"),
        ("8.8.8.8", "eth0"),
        ("127.0.1.1", "eth0"),
        ("fd00::5", "ib0"),
        ("::1", "eth0"),
    ],
)
def test_the_interface_is_the_one_that_reaches_the_host(address: str, interface: str) -> None:
    routes = parse_routes(TABLE) + parse_routes_6(TABLE_6)
    assert interface_towards(ipaddress.ip_address(address), routes, []) == interface


def test_without_a_default_route_the_only_interface_counts() -> None:
    own = ipaddress.ip_address("127.0.1.1")
    assert interface_towards(own, [], ["lo", "veth0"]) == "veth0"
    assert interface_towards(own, [], ["lo", "veth0", "veth1"]) is None
    near = [Route(ipaddress.ip_network("10.0.0.0/24"), "veth1")]
    assert interface_towards(ipaddress.ip_address("10.0.0.2"), near, ["lo", "a", "b"]) == "veth1"


def test_the_routes_of_this_machine_can_be_read() -> None:
    assert {route.interface for route in machine.read_routes()} <= set(machine.interface_names())
    assert machine.own_address_towards(ipaddress.ip_address("127.0.0.1")) is None


# The rendezvous.


@pytest.mark.parametrize(
    ("text", "place"),
    [("node1:29500", ("node1", 29500)), ("[fd00::1]:80", ("fd00::1", 80)), ("1.2.3.4:1", None)],
)
def test_places_are_read(text: str, place: tuple[str, int] | None) -> None:
    found = parse_rendezvous(text)
    assert str(found) == text
    if place:
        assert (found.host, found.port) == place


@pytest.mark.parametrize(
    "text",
    ["node1", "node1:", ":29500", "node1:0", "node1:65536", "fd00::1:80", "http://a:1", "a b:1"],
)
def test_other_texts_are_no_place(text: str) -> None:
    with pytest.raises(UserError, match=r"--rendezvous: .* is no place; write HOST:PORT"):
        parse_rendezvous(text)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(place: str, *options: str) -> int:
    words = ["configs/lora.yaml", "--nproc", "1", "--nodes", "2", "--rendezvous", place]
    return main(["launch", *words, *options])


def test_an_unknown_name_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert join("no-such-host.invalid:29500", "--node-rank", "1") == 2
    error = capsys.readouterr().err
    here = socket.gethostname()
    start = (
        f"disttrain: cannot reach the rendezvous no-such-host.invalid:29500 from {here}: no-such"
    )
    assert error.startswith(start)
    assert "a name or address of the first node that every node can resolve" in error
    assert error.count("\n") == 1
    assert time.monotonic() - began < 20


def test_a_name_that_comes_later_is_waited_for_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Kubernetes, where a pod has no name before it runs."""
    known = socket.getaddrinfo
    asked: list[str] = []

    def later(host: str, *words: Any, **more: Any) -> Any:
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known("127.0.0.1", *words, **more)

    monkeypatch.setattr(socket, "getaddrinfo", later)
    found = rendezvous.resolve(Rendezvous("pod-0.pods", 29500), 30)
    assert [str(address) for address in found] == ["127.0.0.1"]
    assert "waiting for pod-0.pods:29500: its name is not known yet" in capsys.readouterr().out


def test_a_dry_run_shows_the_command_of_a_node_whose_first_is_not_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert join("no-such-host.invalid:29500", "--node-rank", "1", "--dry-run") == 0
    out, error = capsys.readouterr()
    assert "--rdzv-endpoint=no-such-host.invalid:29500" in out
    assert "only a dry run" in error


def test_a_port_that_refuses_is_waited_for_until_the_time_is_over(
    free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert join(f"localhost:{free_port}", "--node-rank", "1", "--join-timeout", "1") == 2
    assert 1 <= time.monotonic() - began < 10
    waiting, error = capsys.readouterr().err.splitlines()
    assert waiting.startswith(f"disttrain: waiting for localhost:{free_port}: nothing listens")
    assert f"localhost:{free_port} from {socket.gethostname()}: nothing listened there" in error
    assert "localhost means each node itself" in error


def test_a_host_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 0.3)
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        place = Rendezvous("127.0.0.1", full.getsockname()[1])
        for waiting in (first, second):  # a full queue drops who comes next, as a firewall does
            waiting.setblocking(False)
            waiting.connect_ex((place.host, place.port))
        time.sleep(0.1)
        with pytest.raises(UserError, match=r"no answer for 0 s; open port [0-9]+ of 127\.0\.0\.1"):
            rendezvous.reach(place, 5, print)


def test_a_rendezvous_that_opens_later_is_reached(free_port: int) -> None:
    place, said = Rendezvous("127.0.0.1", free_port), []
    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def open_it(text: str) -> None:
            said.append(text)
            late.bind((place.host, place.port))
            late.listen()

        rendezvous.reach(place, 30, open_it)
    assert len(said) == 1


def test_waiting_ends_with_a_signal(free_port: int) -> None:
    with pytest.raises(Interrupted, match="stopped while waiting"):
        rendezvous.reach(Rendezvous("127.0.0.1", free_port), 30, print, lambda: True)


def test_a_port_in_use_is_refused_on_the_first_node(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert join(f"localhost:{taken.getsockname()[1]}", "--node-rank", "0") == 2
    assert "cannot listen at the rendezvous localhost:" in capsys.readouterr().err


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nproc", "0"], "--nproc: must be at least 1"),
        (["--nodes", "2"], "--node-rank: missing; say which of the 2 nodes"),
        (["--nodes", "2", "--node-rank", "2"], "--node-rank: 2 is none of 2 nodes"),
        (
            ["--fleet", "examples/fleet.csv", "--rendezvous", "a:1"],
            "--rendezvous, --join-timeout: workers",
        ),
        (["--nodes", "2", "--node-rank", "1"], "--rendezvous: missing"),
        (["--fsdp", "--deepspeed", "zero2"], "--fsdp: given beside --deepspeed"),
        (["--fleet", "examples/fleet.csv", "--fsdp"], "--fsdp: each worker of a fleet is"),
        (["--fleet", "examples/fleet.csv", "--offload"], "--offload: each worker of a fleet is"),
        (["--fleet", "examples/fleet.csv", "--launcher", "accelerate"], "--launcher: workers of"),
        (["--fleet", "examples/fleet.csv", "--fresh"], "--fresh: a fleet has none"),
        (["--fleet", "absent.csv"], "absent.csv: No such file"),
        (["--fresh", "--max-restarts", "1"], "--fresh: a restart would start over"),
        (["seed=-1"], "seed: -1 is impossible"),
        (["--dry-run", "seed=-1", "name=x"], "seed: -1 is impossible"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "configs/lora.yaml", *options]) == 2
    told_now = capsys.readouterr()
    assert told_now.err.startswith(f"disttrain: {message}")
    assert told_now.err.count("\n") == 1
    assert told_now.out == ""


def test_a_dry_run_shows_environment_and_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OMP_NUM_THREADS", "DISTTRAIN_INTERFACE"):
        monkeypatch.delenv(name, raising=False)
    words = ["configs/dreambooth.yaml", "--nproc", "2", "--deepspeed", "zero2", "--offload"]
    assert main(["launch", *words, "--fresh", "--dry-run", "name=it's"]) == 2  # no folder name
    capsys.readouterr()
    assert main(["launch", *words, "--fresh", "--dry-run", "train.sample_prompts=[a 'b' $c]"]) == 0
    threads = max(1, machine.count_cores() // 2)
    assert capsys.readouterr().out.splitlines() == [
        f"export OMP_NUM_THREADS={threads}",
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60",
        "torchrun --nproc-per-node=2 --standalone --max-restarts=0 -m disttrain train "
        "configs/dreambooth.yaml 'train.sample_prompts=[a '\"'\"'b'\"'\"' $c]' "
        "parallel.strategy=zero2 parallel.offload_optimizer=true --fresh",
    ]


def test_options_for_sbatch_may_stand_alone() -> None:
    words = ["slurm", "c", "--sbatch-option", "--exclusive", "a=b", "--sbatch-option=--x=y"]
    expected = ["slurm", "c", "--sbatch-option=--exclusive", "a=b", "--sbatch-option=--x=y"]
    assert joined(words) == expected


# Exit codes.


@pytest.mark.parametrize(
    ("said", "launcher", "stopped", "code"),
    [
        ([0, 0], 0, False, 0),
        ([0, 0], 0, True, 0),
        ([75, 75], 1, False, 75),
        ([75, None], 1, True, 75),
        ([2, 75], 1, True, 2),
        ([75, 3], 1, False, 3),
        ([None, 1], 1, False, 1),
        ([1, None], 1, True, 1),
        ([None, None], -9, False, 137),
        ([None, 0], 0, False, 0),
        ([130, 130], 1, True, 130),
        ([], 1, False, 1),
        ([], -15, True, 75),
        ([None], -15, True, 75),
    ],
)
def test_the_code_that_means_most(
    said: list[int | None], launcher: int, stopped: bool, code: int
) -> None:
    assert meaning(dict(enumerate(said)), launcher, stopped) == code


@pytest.mark.parametrize(
    ("end", "code"),
    [(0, 0), (75, 75), (SystemExit(2), 2), (KeyError("x"), 1), (KeyboardInterrupt(), 1)],
)
def test_a_process_leaves_a_note_of_its_end(
    end: int | BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))

    def command() -> int:
        assert read_notes(tmp_path) == {os.getpid(): None}
        if isinstance(end, BaseException):
            raise end
        return end

    if isinstance(end, BaseException):
        with pytest.raises(type(end)):
            told(command)
    else:
        assert told(command) == end
    assert read_notes(tmp_path) == {os.getpid(): code}


# Real launches.


@contextmanager
def launched(
    config: Path, *options: str, log: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`disttrain launch` as a process; nothing of it outlives the block."""
    command = [sys.executable, "-m", "disttrain", "launch", str(config), *options]
    with log.open("wb") as handle:
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(**environment), stdout=handle, stderr=handle
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # a broken launch; its launcher still ends its processes
            os.kill(launcher_of(process), signal.SIGTERM)
            process.wait(timeout=60)


def wait_until(ready: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def launcher_of(process: subprocess.Popen[bytes]) -> int:
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def stop_in_the_middle(
    tmp_path: Path, *options: str, number: signal.Signals
) -> tuple[Path, Path, int]:
    """A long run that is stopped by a signal to the launch; (config, run, steps at the signal)."""
    tree = small_config("lora", tmp_path, max_steps=5000, checkpoint_every=5000)
    config, run, log = write_config(tree, tmp_path / "c.yaml"), tmp_path / "lora", tmp_path / "log"
    with launched(config, "--nproc", "2", *options, log=log) as process:
        wait_until(lambda: steps_of(run), process, log)
        before = steps_of(run)
        if number in GENTLE:  # SLURM signals every process of a step, the launcher too
            os.kill(launcher_of(process), number)
        process.send_signal(number)
        assert process.wait(timeout=60) == 75, log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last == "disttrain: stopped by a signal; the same command goes on"
    return config, run, before


def test_a_stopped_launch_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config, run, before = stop_in_the_middle(tmp_path, number=signal.SIGUSR1)
    stopped_at = steps_of(run)
    assert before <= stopped_at < before + 200
    assert [path.name for path in checkpoints(run)] == [f"step-{stopped_at:08d}"]
    log = tmp_path / "second"
    with launched(config, "--nproc", "2", f"train.max_steps={stopped_at + 2}", log=log) as process:
        assert process.wait(timeout=120) == 0, log.read_text()
    assert steps_of(run) == stopped_at + 2
    assert (run / "subjects/fox/fox.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_each_launcher_stops_by_each_signal(
    launcher: str, number: signal.Signals, tmp_path: Path
) -> None:
    _, run, _ = stop_in_the_middle(tmp_path, "--launcher", launcher, number=number)
    assert [path.name for path in checkpoints(run)] == [f"step-{steps_of(run):08d}"]


@pytest.mark.slow
def test_a_stopped_launch_is_not_restarted(tmp_path: Path) -> None:
    _, run, _ = stop_in_the_middle(tmp_path, "--max-restarts", "3", number=signal.SIGUSR1)
    assert [path.name for path in checkpoints(run)] == [f"step-{steps_of(run):08d}"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_both_launchers_train_to_the_end(launcher: str, tmp_path: Path) -> None:
    config = write_config(small_config("lora", tmp_path, max_steps=2), tmp_path / "c.yaml")
    log = tmp_path / "log"
    with launched(config, "--nproc", "2", "--launcher", launcher, log=log) as process:
        assert process.wait(timeout=120) == 0, log.read_text()
    assert "2 processes x 4 batch" in log.read_text()


@pytest.mark.slow
def test_a_signal_while_loading_is_not_lost(tmp_path: Path) -> None:
    config = write_config(small_config("lora", tmp_path, max_steps=5000), tmp_path / "c.yaml")
    log = tmp_path / "log"
    with launched(config, "--nproc", "2", log=log) as process:
        wait_until(lambda: "loading base model" in log.read_text(), process, log)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 75, log.read_text()


@pytest.mark.slow
def test_exit_codes_of_the_training_pass_through(tmp_path: Path) -> None:
    tree = small_config("lora", tmp_path, max_steps=5)
    tree["optim"]["learning_rate"] = 1e38
    config, log = write_config(tree, tmp_path / "c.yaml"), tmp_path / "log"
    with launched(config, "--nproc", "2", "--max-restarts", "2", log=log) as process:
        assert process.wait(timeout=120) == 3, log.read_text()
    tree["base_model"] = str(tmp_path / "absent")
    write_config(tree, config)
    with launched(config, "--nproc", "2", log=log) as process:
        assert process.wait(timeout=120) == 2, log.read_text()


@pytest.mark.slow
def test_two_nodes_meet_whichever_comes_first(tmp_path: Path, free_port: int) -> None:
    config = write_config(small_config("lora", tmp_path, max_steps=2), tmp_path / "c.yaml")
    place = f"localhost:{free_port}"
    options = ("--nproc", "1", "--nodes", "2", "--rendezvous", place, "--node-rank")
    logs = [tmp_path / "0", tmp_path / "1"]
    with launched(config, *options, "1", log=logs[1]) as second:
        wait_until(lambda: "waiting for" in logs[1].read_text(), second, logs[1])
        with launched(config, *options, "0", log=logs[0]) as first:
            assert first.wait(timeout=120) == 0, logs[0].read_text()
            assert second.wait(timeout=120) == 0, logs[1].read_text()
    both = logs[0].read_text() + logs[1].read_text()
    assert "2 processes x 4 batch" in both


@pytest.mark.slow
def test_a_fleet_is_worked_on_by_workers_side_by_side(tmp_path: Path) -> None:
    log, name = tmp_path / "log", f"output_dir={tmp_path}"
    manifest = tmp_path / "m.jsonl"
    images = ROOT / "examples/subjects/fox"
    rows = [f'{{"name": "s{i}", "images": "{images}", "token": "sks"}}\n' for i in range(4)]
    manifest.write_text("".join(rows))
    options = ("--nproc", "2", name, "name=f", "train.max_steps=2", "fleet.pack_size=2")
    with launched(
        ROOT / "configs/lora.yaml", "--fleet", str(manifest), *options, log=log
    ) as process:
        assert process.wait(timeout=150) == 0, log.read_text()
    results = sorted(path.name for path in tmp_path.glob("f/subjects/*/*.safetensors"))
    assert results == [f"s{i}.safetensors" for i in range(4)]
