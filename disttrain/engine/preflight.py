"""Before anything is loaded: do the processes of a run agree, and can they go all the way?

Called by `train` and `cache` as soon as the mesh exists. Invariant: every rank has the same facts,
so all come to the same verdict and raise the same line; a refusal leaves nothing behind.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable, Sequence

from disttrain.config import RunConfig
from disttrain.engine.disk_need import FLOOR, needed_bytes
from disttrain.engine.distributed import Mesh
from disttrain.engine.progress import Progress, join_names
from disttrain.engine.survey import (
    RankFacts,
    free_bytes,
    nearest_folder,
    saying_if_it_waits,
    survey,
)
from disttrain.errors import UserError

MUST_BE_EQUAL = ("torch", "accelerate", "diffusers", "transformers", "disttrain")
CLOCKS_APART = 10.0
MOST_KEYS = 3
MOST_PROBLEMS = 4
LONGEST_VALUE = 60


def preflight(
    config: RunConfig, mesh: Mesh, progress: Progress, command: str, fresh: bool = False
) -> None:
    """Compare the ranks of a run, and the free disk with what the run needs.

    Args:
        command: what all of them must have been asked for.
        fresh: the run starts over in a new folder.

    Raises:
        UserError: naming the hosts and what differs, or what is missing; the same on every rank.
    """
    with saying_if_it_waits(mesh.rank):
        _refuse_full_disk(config, mesh, fresh)
        if mesh.world == 1:
            return
        facts = survey(config, mesh, f"{command} --fresh" if fresh else command)
    for line in warnings(facts):
        progress.warn(line)
    found = problems(facts)
    if found:
        more = f"; and {len(found) - MOST_PROBLEMS} more" if len(found) > MOST_PROBLEMS else ""
        raise UserError(f"preflight: {'; '.join(found[:MOST_PROBLEMS])}{more}")


def _refuse_full_disk(config: RunConfig, mesh: Mesh, fresh: bool) -> None:
    """Rank zero writes the checkpoints, so its disk must have room for them."""
    place = nearest_folder(config.folder.absolute())

    def check() -> None:
        need, free = needed_bytes(config, fresh), free_bytes(place)
        if free is not None and free < need:
            raise UserError(
                f"preflight: {socket.gethostname()}: {place} has {plain_size(free)} free, this run "
                f"needs {plain_size(need)} for checkpoints and results; free some, lower "
                "train.keep_checkpoints, or choose another output_dir"
            )

    mesh.on_rank_zero(check)


def problems(facts: Sequence[RankFacts]) -> list[str]:
    """What must be mended before these processes can train together."""
    return [
        *_other_settings(facts),
        *_other_versions(facts, _must_be_equal(facts), "install the same on every host"),
        *_other_code(facts),
        *_not_shared(facts),
        *_devices_in_conflict(facts),
        *_full_disks(facts),
        *_wrong_sums(facts),
    ]


def warnings(facts: Sequence[RankFacts]) -> list[str]:
    """What a person should know, though the processes can train together."""
    lax = dict.fromkeys(name for one in facts for name in one.versions)
    lines = _other_versions(facts, [n for n in lax if n not in _must_be_equal(facts)], "")
    first = facts[0]
    for one in facts[1:]:
        if one.device == first.device and one.device_name != first.device_name:
            lines.append(
                f"{one.label} has a {one.device_name}, {first.label} a {first.device_name}; "
                "the slowest sets the pace"
            )
        if abs(one.clock - first.clock) > CLOCKS_APART:
            apart = abs(one.clock - first.clock)
            lines.append(f"the clocks of {one.host} and {first.host} are {apart:.0f} s apart")
    return list(dict.fromkeys(lines))[:MOST_PROBLEMS]


def _must_be_equal(facts: Sequence[RankFacts]) -> list[str]:
    settings = facts[0].settings
    needed = str(settings.get("parallel.strategy", "")).startswith("zero")
    return [*MUST_BE_EQUAL, *(["deepspeed"] if needed else [])]


def _other_settings(facts: Sequence[RankFacts]) -> list[str]:
    first = facts[0]

    def different(one: RankFacts) -> str:
        keys = dict.fromkeys([*first.settings, *one.settings])
        other = [key for key in keys if one.settings.get(key) != first.settings.get(key)]
        shown = [
            f"{key} {_value(one, key)} ({_name(first, one)}: {_value(first, key)})"
            for key in other[:MOST_KEYS]
        ]
        more = f" and {len(other) - MOST_KEYS} more" if len(other) > MOST_KEYS else ""
        return ", ".join(shown) + more

    return [
        f"{who} other settings than {than}: {what}; start every process with the same config"
        for who, than, what in _groups(facts, different, "has", "have")
    ]


def _value(one: RankFacts, key: str) -> str:
    text = str(one.settings.get(key, "nothing")) or '""'
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _other_versions(facts: Sequence[RankFacts], names: Sequence[str], advice: str) -> list[str]:
    first = facts[0]

    def different(one: RankFacts) -> str:
        return ", ".join(
            f"{name} {one.versions.get(name, 'missing')} "
            f"({_name(first, one)}: {first.versions.get(name, 'missing')})"
            for name in names
            if one.versions.get(name) != first.versions.get(name)
        )

    return [
        f"{who} other versions than {than}: {what}" + (f"; {advice}" if advice else "")
        for who, than, what in _groups(facts, different, "has", "have")
    ]


def _other_code(facts: Sequence[RankFacts]) -> list[str]:
    first = facts[0]

    def different(one: RankFacts) -> str:
        return one.code[:12] if one.code != first.code else ""

    return [
        f"{who} other code of disttrain than {than}: digest {what}, not {first.code[:12]}; "
        "install the same revision on every host"
        for who, than, what in _groups(facts, different, "runs", "run")
    ]


def _not_shared(facts: Sequence[RankFacts]) -> list[str]:
    def blind(one: RankFacts) -> str:
        return "" if one.shared else one.output_dir

    def refused(one: RankFacts) -> str:
        return "" if one.writable or not one.shared else one.output_dir

    return [
        *(
            f"{who} not see what {than} writes into output_dir {what}; put output_dir on a file "
            "system that all hosts share, under the same path"
            for who, than, what in _groups(facts, blind, "does", "do")
        ),
        *(
            f"{who} not write into output_dir {what}; change its permissions"
            for who, _, what in _groups(facts, refused, "may", "may")
        ),
    ]


def _devices_in_conflict(facts: Sequence[RankFacts]) -> list[str]:
    first = facts[0]
    lines = [
        f"{who} on {what}, {than} on {first.device}; give every process a GPU or none"
        for who, than, what in _groups(
            facts,
            lambda one: one.device if one.device != first.device else "",
            "computes",
            "compute",
        )
    ]
    users: dict[str, list[RankFacts]] = defaultdict(list)
    for one in facts:
        if one.device_id:
            users[one.device_id].append(one)
    for several in users.values():
        if len(several) > 1:
            ranks = ", ".join(str(one.rank) for one in several)
            lines.append(
                f"ranks {ranks} on {join_names(dict.fromkeys(one.host for one in several))} share "
                f"one GPU ({several[0].device_name}); start one process for each GPU"
            )
    return lines


def _full_disks(facts: Sequence[RankFacts]) -> list[str]:
    full = {
        (one.host, place): free for one in facts for place, free in one.free.items() if free < FLOOR
    }
    return [
        f"{host}: {place} has {plain_size(free)} free, at least {plain_size(FLOOR)} are needed"
        for (host, place), free in full.items()
    ]


def _wrong_sums(facts: Sequence[RankFacts]) -> list[str]:
    wrong = [one.label for one in facts if not one.sum_is_right]
    if not wrong:
        return []
    return [
        f"{join_names(wrong)} got a wrong sum over all processes; the network or a GPU of theirs "
        "is defective, leave these hosts out"
    ]


def _groups(
    facts: Sequence[RankFacts], different: Callable[[RankFacts], str], verb: str, verbs: str
) -> list[tuple[str, str, str]]:
    """Those that differ from rank zero, as (who with verb, than whom, what), a host's ranks that
    differ alike together."""
    groups: dict[tuple[str, str], list[RankFacts]] = defaultdict(list)
    for one in facts:
        what = different(one)
        if what:
            groups[one.host, what].append(one)
    found = []
    for (host, what), members in groups.items():
        ranks = join_names(str(one.rank) for one in members)
        single = len(members) == 1
        who = f"{host} ({'rank' if single else 'ranks'} {ranks}) {verb if single else verbs}"
        found.append((who, _name(facts[0], members[0]), what))
    return found


def _name(one: RankFacts, other: RankFacts) -> str:
    """One of two ranks: by its host, or where they share one by its rank."""
    return one.host if one.host != other.host else f"rank {one.rank}"


def plain_size(size: int) -> str:
    """Bytes as 512 MiB or 20.6 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
