"""`disttrain launch`: starts the processes of this node and stays until they have ended.

Below `commands.py`, over `launch.py` (what to start), `rendezvous.py` (whether this node can get
there) and `supervise.py` (running it). Every job script, cloud template and person uses this one
command, once on each node.
"""

from __future__ import annotations

import os
import shlex
import sys

from disttrain.cluster import machine
from disttrain.cluster.commands import Options, all_overrides, check_config, strategy_of
from disttrain.cluster.launch import (
    Request,
    added_environment,
    launcher_commands,
    threads_of,
    without_stale,
    worker_commands,
)
from disttrain.cluster.rendezvous import (
    Rendezvous,
    check_free,
    parse_rendezvous,
    reach,
    resolve,
)
from disttrain.cluster.supervise import StopSignals, supervise
from disttrain.errors import EXIT_DONE, EXIT_INTERRUPTED, UserError

JOIN_SECONDS = 300
"""How long nodes wait for each other unless --join-timeout says it."""


def launch(options: Options) -> int:
    """Start the processes of this node and stay until they have ended; returns their code."""
    _check(options)
    name = check_config(options)
    inherited = dict(os.environ)
    with StopSignals() as signals:
        request, interface = _request(options, name, inherited, signals)
        threads = threads_of(inherited, machine.count_cores(), request.nproc)
        fleet = options.fleet is not None
        commands = worker_commands(request) if fleet else launcher_commands(request, threads)
        added = added_environment(inherited, threads, interface)
        if options.dry_run:
            for variable, value in added.items():
                print(f"export {variable}={shlex.quote(value)}")
            for command in commands:
                print(command)
            return EXIT_DONE
        if request.rendezvous is not None and not fleet:
            _meet(request, request.rendezvous, signals, options.join_timeout is not None)
        environment = {**without_stale(inherited), **added}
        code, began = supervise(commands, environment, signals, options.max_restarts > 0)
    if code == EXIT_INTERRUPTED:
        _say("stopped by a signal; the same command goes on")
    elif code and not began:
        _say(_never_began(request, code))
    return code


def _check(options: Options) -> None:
    """Refuse numbers and combinations that cannot be."""
    for option, least in [("nproc", 1), ("nodes", 1), ("max_restarts", 0), ("join_timeout", 1)]:
        value = getattr(options, option)
        if value is not None and value < least:
            raise UserError(f"--{option.replace('_', '-')}: must be at least {least}")
    rank, nodes = options.node_rank, options.nodes
    if nodes > 1 and rank is None:
        raise UserError(f"--node-rank: missing; say which of the {nodes} nodes this is, from 0")
    if rank is not None and not 0 <= rank < nodes:
        raise UserError(f"--node-rank: {rank} is none of {nodes} nodes; count them from 0")
    if nodes > 1 and options.rendezvous is None and options.fleet is None:
        raise UserError("--rendezvous: missing; give HOST:PORT of the first node")
    if options.fleet is not None and (options.rendezvous or options.join_timeout):
        raise UserError("--rendezvous, --join-timeout: workers of a fleet do not meet; remove them")
    if options.fleet is not None and options.fresh:
        raise UserError("--fresh: a fleet has none; give it another name= instead")
    if options.fleet is not None and options.max_restarts:
        raise UserError("--max-restarts: workers of a fleet take over what others lose; remove it")
    if options.fresh and options.max_restarts:
        raise UserError("--fresh: a restart would start over; remove --max-restarts, or name= anew")
    strategy_of(options)


def _request(
    options: Options, name: str, inherited: dict[str, str], signals: StopSignals
) -> tuple[Request, str | None]:
    """What to start here, and by which network interface it reaches the other nodes."""
    if options.fleet is not None:
        words = ("fleet", str(options.fleet), str(options.config), *options.overrides)
    else:
        fresh = ["--fresh"] if options.fresh else []
        words = ("train", str(options.config), *all_overrides(options), *fresh)
    place = None if options.rendezvous is None else parse_rendezvous(options.rendezvous)
    interface, own = None, None
    if options.nodes == 1 or options.fleet is not None:
        place = None  # nobody to meet
    if place is not None:
        interface, own = _way_to(place, options, signals)
    request = Request(
        words=words,
        nproc=options.nproc or machine.count_gpus(inherited) or 1,
        nodes=options.nodes,
        node_rank=options.node_rank or 0,
        rendezvous=place,
        own_address=own,
        launcher=options.launcher,
        max_restarts=options.max_restarts,
        join_timeout=options.join_timeout or JOIN_SECONDS,
        run_name=name,
    )
    return request, interface


def _way_to(
    place: Rendezvous, options: Options, signals: StopSignals
) -> tuple[str | None, str | None]:
    """This node's interface towards the rendezvous, and its own address there."""
    try:
        patience = 0 if options.dry_run else options.join_timeout or 0
        addresses = resolve(place, patience, _say, signals.any)
    except UserError as error:
        if not options.dry_run:
            raise
        _say(f"{error} (only a dry run: the interface is chosen on the node)")
        return None, place.host if not options.node_rank else None
    routes, names = machine.read_routes(), machine.interface_names()
    interface = machine.interface_towards(addresses[0], routes, names)
    own = place.host if not options.node_rank else machine.own_address_towards(addresses[0])
    return interface, own


def _meet(request: Request, place: Rendezvous, signals: StopSignals, patient: bool) -> None:
    """Make sure of the rendezvous: free on the node that listens, within reach of the others."""
    if request.node_rank == 0:
        check_free(place)
    else:
        reach(place, request.join_timeout, _say, signals.any, for_whatever=patient)


def _say(text: str) -> None:
    print(f"disttrain: {text}", file=sys.stderr, flush=True)


def _never_began(request: Request, code: int) -> str:
    """What to say of a launcher that ended before any process trained."""
    if request.rendezvous is None:
        return f"{request.launcher} ended with {code} before it started anything; see above"
    return (
        f"{request.launcher} ended with {code} before training began: not all of "
        f"{request.nodes} nodes came to {request.rendezvous} within {request.join_timeout} s, or "
        "see above"
    )
