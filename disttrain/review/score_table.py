"""Scores as a table for people: what `disttrain score` prints.

After `score.py`. Invariant: a column stands there only if it has a number, and every number means
what docs/judging.md says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from disttrain.engine.overtraining import Reading
from disttrain.engine.scores import Scores
from disttrain.review.score import PICTURE_FILE, SCORES_FILE, SubjectScores

Column = tuple[str, Callable[[Reading], float | None]]


def lines_of(found: SubjectScores, folder: Path) -> list[str]:
    """The lines of one subject.

    Args:
        folder: the subject's, where `scores.json` lies.
    """
    against = found.against
    kind = "kept out of training" if against.held_out else "from the training set"
    head = f"{found.name}: {found.features} to {against.pictures} pictures {kind} ({against.place})"
    if found.member.score.through_autoencoder:
        head += ", as the base keeps them"
    lines = [head]
    if not against.held_out:
        lines.append(
            "  copying the training pictures scores well too; "
            "give --held-out FOLDER to tell learning from copying"
        )
    lines += [f"  {line}" for line in _table(found)]
    best = next(r.scores for r in found.readings if r.step == found.verdict.best_step)
    change = f"subject fidelity {found.before.subject:.3f} before, {best.subject:.3f} after"
    picked = next(s.path for s in found.states if s.step == found.verdict.best_step)
    lines.append(f"  {change} ({found.features})")
    lines.append(f"  picked step {found.verdict.best_step}: {found.verdict.reason}")
    lines.append(f"  {picked}")
    lines += [f"  step {flag.step}, {flag.kind}: {flag.reason}" for flag in found.verdict.flags]
    return [*lines, f"  wrote {folder / SCORES_FILE}", f"  wrote {folder / PICTURE_FILE}"]


def _table(found: SubjectScores) -> list[str]:
    before = Reading(0, found.before)
    rows = [before, *found.readings]
    columns = [
        column for column in _columns(rows) if any(column[1](row) is not None for row in rows)
    ]
    table = [["", "step", "subject", *(name for name, _ in columns)]]
    for row in rows:
        mark = (
            "before" if row is before else "picked" if row.step == found.verdict.best_step else ""
        )
        fidelity = f"{row.scores.subject:.3f} +- {row.scores.subject_error:.3f}"
        cells = [_number(value(row)) for _, value in columns]
        table.append([mark, str(row.step), fidelity, *cells])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]


def _columns(rows: Sequence[Reading]) -> list[Column]:
    """All there may be, in their order; the base has no drift of its own."""
    others = dict.fromkeys(name for row in rows for name in row.scores.others)

    def of(read: Callable[[Scores], float | None]) -> Callable[[Reading], float | None]:
        return lambda row: read(row.scores)

    return [
        ("prompt", of(lambda scores: scores.prompt)),
        ("diversity", of(lambda scores: scores.diversity)),
        ("drift", of(lambda scores: scores.drift)),
        ("strength", of(lambda scores: scores.strength)),
        ("loss", lambda row: row.loss),
        *((name, _other(name)) for name in others),
    ]


def _other(name: str) -> Callable[[Reading], float | None]:
    return lambda row: row.scores.others.get(name)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
