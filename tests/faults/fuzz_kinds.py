"""The kinds of fuzz cases: damaged shards, pictures, captions and indexes, each as a user has them.

A kind is a function of a `Case`; what must hold for all of them is in `fuzz_checks.py`.
"""

from __future__ import annotations

import json
import os
import random
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzz_checks import Case, indexed, load, opened, window
from fuzz_material import (
    HUGE,
    foreign_tar,
    harmed,
    harmed_tar,
    rebuilt_png,
    strange_json,
    strange_table,
    strange_text,
)

from disttrain import files
from disttrain.config import CaptionSettings
from disttrain.data.index import ShardIndex
from disttrain.data.shards import verify, write_shards
from disttrain.data.source import Source
from disttrain.data.tars import walk
from disttrain.errors import DataError
from disttrain.prompts import PromptPlan, words_of_stem

SPARSE = 300 * 2**20  # bytes that a file claims to have


def damaged_shard(case: Case) -> None:
    """A tar is not what its index says; and the same tar, indexed as it is."""
    draw = case.draw
    case.put(case.material.shards)
    name = f"shard-00000{draw.randrange(3)}.tar"
    tar, whole = case.inputs / name, case.material.shards[name]
    data = harmed_tar(whole, draw)
    early = opened(case, case.inputs) if draw.random() < 0.3 else None
    if early is not None:
        early.read(draw.randrange(12))
    index = ShardIndex(case.inputs / "index.json")
    tar.write_bytes(data)
    if early is None and draw.random() < 0.1:
        data = b""
        tar.unlink()
        draw.choice([lambda: None, tar.mkdir, lambda: tar.symlink_to(tar)])()
    case.seal()
    rows = [index.row(number) for number in range(len(index))]
    own = [n for n in range(len(rows)) if index.shards[index.shard_of(n)].file == name]
    places = {n: slice(rows[n].offset, rows[n].offset + rows[n].size) for n in own}
    bad = [n for n in own if data[places[n]] != whole[places[n]]]
    source = early or opened(case, case.inputs)
    if source is None:
        case.fail("opening: an index is refused for its tars")
        return
    load(case, source, bad, draw.choice([len(bad) / 12 + 1e-9, max(len(bad) - 1, 0) / 12, 1.0]))
    lines = case.tried("verifying", lambda: verify(case.inputs / "index.json", workers=1)) or []
    case.check_lines("verifying", lines)
    named = {n for n in own for line in lines if f" {rows[n].key}: picture" in line}
    if bool(lines) != (data != whole) or (data and named != set(bad)):
        case.fail(f"verifying: said {lines} where {bad} are damaged")
    if data:
        _indexed_anyway(case, tar, {rows[n].sha256 for n in own if n not in bad})


def _indexed_anyway(case: Case, tar: Path, whole: set[str]) -> None:
    """An index made of a damaged tar: what is whole is in it, or somebody says what is not."""
    found = indexed(case, [tar], case.draw.random() < 0.5)
    if found is None:
        return
    source, skipped = found
    lost = whole - {record.digest for record in source.records}
    if len(lost) > len(skipped) + _renamed(tar):
        case.fail(f"indexing: {len(lost)} whole pictures lost, {len(skipped)} spoken of")
    again = {record.digest: source.read(n) for n, record in enumerate(source.records)}
    load(case, source, None, 1.0, **{digest: _shown(data) for digest, data in again.items()})


def _renamed(tar: Path) -> int:
    """How many members are called what no sample's part is called here."""
    count = 0
    with tar.open("rb") as handle, suppress(DataError):
        for member in walk(handle, "tar"):
            count += re.fullmatch(r"p\d\d\.[a-z]+", member.name) is None
    return count


def _shown(data: bytes) -> bytes:
    """The window of bytes that may not be a picture; always the same one."""
    try:
        return window(data)
    except DataError:
        return b"damaged"


def damaged_picture(case: Case) -> None:
    """One picture among whole ones is not: in a folder, packed, and in somebody's tar."""
    draw, material = case.draw, case.material
    good = dict(draw.sample(sorted(material.pictures.items()), 4))
    victim = _victim(case)
    suffix = victim[0].rpartition(".")[2]
    name = f"q{draw.choice(['', ' ', '.b', '-狐'])}.{suffix}"
    case.put({**good, name: victim[1]})
    path = case.inputs / name
    if draw.random() < 0.06:
        path.unlink()
        draw.choice(
            [
                lambda: os.mkfifo(path),
                lambda: path.symlink_to(path),
                lambda: path.symlink_to("/dev/null"),
                lambda: _sparse(path),
            ]
        )()
    tar = case.inputs / "foreign.tar"
    foreign_tar(tar, {**good, f"q.{suffix}": victim[1]}, draw)
    case.seal()
    source = opened(case, case.inputs, 0.5)
    if source is None:
        case.fail("opening: one damaged picture of five ends it all")
        return
    whole = {files.sha256_bytes(data) for data in good.values()}
    left_out = len(source.damaged) + (name in source.ignored)  # a pipe is no picture
    if len(source.records) + left_out != 5 or left_out > 1:
        case.fail(f"opening: {len(source.records)} pictures and {source.damaged} of five")
    if not whole <= {record.digest for record in source.records}:
        case.fail("opening: a neighbour is lost")
    known = {files.sha256_bytes(victim[1]): _shown(victim[1])}
    load(case, source, [], 0.5, **known)
    if opened(case, case.inputs) is None and not source.damaged:
        case.fail("opening: refused though nothing is damaged")
    index = case.tried("packing", lambda: write_shards(case.inputs, case.output, workers=1))
    if bool(index) == bool(source.damaged):
        case.fail(f"packing: {index} where {source.damaged}")
    thorough = draw.random() < 0.5
    found = indexed(case, [tar], thorough)
    if found is None:
        case.fail("indexing: one damaged picture of five ends it all")
        return
    packed, skipped = found
    bad = [n for n, r in enumerate(packed.records) if _shown(packed.read(n)) == b"damaged"]
    if len(packed.records) + len(skipped) != 5 or (thorough and bad):
        case.fail(f"indexing: {len(packed.records)} pictures, {bad} damaged, and {skipped}")
    load(case, packed, bad, 0.5, **known)


def _victim(case: Case) -> tuple[str, bytes]:
    """Name and bytes of a picture that is probably damaged."""
    draw, material = case.draw, case.material
    if draw.random() < 0.25:
        return draw.choice(sorted(material.bombs.items()))
    name, data = draw.choice(sorted(material.pictures.items()))
    if name.endswith(".png") and draw.random() < 0.7:
        return name, rebuilt_png(data, draw)
    for _ in range(draw.choice([1, 1, 2])):
        data = harmed(data, draw) or b"\0"
    return name, data


def _sparse(path: Path) -> None:
    with path.open("wb") as handle:
        handle.truncate(SPARSE)


def strange_captions(case: Case) -> None:
    """Captions of every kind beside whole pictures; what is read must make prompts."""
    draw, pictures = case.draw, case.material.pictures
    case.put(pictures)
    case.put({"p10.txt": "whole, Füchse".encode()})
    text, detail = strange_text(draw), strange_json(draw)
    path = case.inputs / "p00.txt"
    how = draw.randrange(5)
    if how < 2:
        case.put({"p00.txt": text})
    elif how < 4:
        name, table = strange_table(draw)
        case.put({name: table})
        path = case.inputs / name
    if how < 4 and draw.random() < 0.06:
        path.unlink()
        draw.choice([lambda: os.mkfifo(path), lambda: _sparse(path)])()
    part = {"p00.jpg": pictures["p00.jpg"], "p00.json": detail}
    part |= {"p00.txt": text} if how == 0 else {}
    part |= {"p10.bmp": pictures["p10.bmp"], "p10.txt": "whole, Füchse".encode()}
    tar = foreign_tar(case.inputs / "foreign.tar", part, draw)
    case.seal()
    for share in (None, 0.2):
        source = opened(case, case.inputs, share)
        if source is not None:
            load(case, source, [], 0.0)
            _read_captions(case, source)
    index = case.tried("packing", lambda: write_shards(case.inputs, case.output, workers=1))
    if index is not None:
        found = opened(case, index)
        if found is not None:
            _read_captions(case, found)
    made = indexed(case, [tar], True)
    if made is None:
        case.fail("indexing: a caption ends it all")
        return
    load(case, made[0], [], 0.0)
    _read_captions(case, made[0])
    if len(made[0].records) + len(made[1]) != 2:
        case.fail(f"indexing: {len(made[0].records)} samples of 2 and {made[1]}")


def _read_captions(case: Case, source: Source, neighbour: bool = True) -> None:
    """Prompts of every caption, and the neighbour's caption as it was."""
    draw = case.draw
    varied = CaptionSettings(shuffle_tags=True, tag_dropout=0.3, keep_tags=1)
    settings = draw.choice([CaptionSettings(), CaptionSettings(dropout=0.1), varied])
    lines = ("{caption}", "a [filewords] of {token}", "{caption} [filewords]")
    plan = PromptPlan(lines, "sks", "fox", "sks fox", settings)
    records = case.tried("reading captions", lambda: [*source.records])
    for number, record in enumerate(records or ()):
        caption = record.caption
        if neighbour and record.stem == "p10" and caption != "whole, Füchse":
            case.fail(f"captions: a neighbour's caption became {caption!r}")
        if caption is None:
            caption = words_of_stem(record.stem)
        prompts = case.tried("prompts", lambda text=caption, n=number: _prompts(plan, n, text))
        for prompt in prompts or ():
            if len(prompt) > 4 * len(caption) + 1000:
                case.fail(f"prompts: {len(prompt)} letters of a caption of {len(caption)}")
            elif case.tried("ids", lambda text=prompt: case.material.tokenizer.ids(text)) is None:
                case.fail("ids: no prompt is refused")


def _prompts(plan: PromptPlan, index: int, caption: str) -> list[str]:
    drawn = [plan.prompt(0, "fox", index, caption)]
    return drawn + (list(plan.every([caption]))[-1:] if plan.fixed else [])


def strange_index(case: Case) -> None:
    """An index that was cut, flipped, laid out anew, or says what is not so."""
    draw = case.draw
    case.put(case.material.shards)
    path = case.inputs / "index.json"
    whole = path.read_bytes()
    how = draw.randrange(4)
    early = opened(case, path) if draw.random() < 0.2 else None
    if how == 0:
        data = harmed(whole, draw)
    else:
        value = json.loads(whole)
        for _ in range(draw.choice([0, 1, 1, 3])):
            _misstate(value, draw)
        data = _digested(value) if how == 1 else _laid_out_anew(value, draw)
    path.write_bytes(data)
    if draw.random() < 0.03:
        path.unlink()
        draw.choice([path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path)])()
    case.seal()
    lines = case.tried("verifying", lambda: verify(path, workers=1)) or []
    case.check_lines("verifying", lines)
    for source in (early, opened(case, path)):
        if source is not None:
            load(case, source, None, draw.choice([0.0, 0.3, 1.0]))
            case.tried("masks", lambda found=source: [*map(found.read_mask, range(found.sizes[0]))])
            _read_captions(case, source, neighbour=False)


def _misstate(value: Any, draw: random.Random) -> None:
    """One wrong thing in an index."""
    part = draw.choice(value["shards"] + value["samples"])
    key = draw.choice([*part, "extra"])
    numbers = [0, -1, 1, 2**31, 2**32, 2**63, 2**64, 10**30, HUGE, 1.0, 1e300, True]
    texts = ["", "x" * 5000, "\ud800", "a\nb", "f" * 64, "../../etc/passwd", "file:///a%00b"]
    texts += ["pipe:touch outside", "/dev/zero", "shard-000001.tar", "file:a%0Ab", "狐", "p00"]
    old = part.get(key)
    if draw.random() < 0.6 and isinstance(old, int):
        part[key] = draw.choice([*numbers, old + draw.choice([-512, -1, 1, 512])])
    elif draw.random() < 0.6 and isinstance(old, str):
        part[key] = draw.choice(texts)
    elif draw.random() < 0.3 and "mask" in part:
        part["mask"] = [draw.choice(numbers), draw.choice(numbers), "f" * 64]
    elif draw.random() < 0.3 and "size" in part:  # places that fit a tar of endless length
        for shard in value["shards"]:
            shard["bytes"] = draw.choice([2**62, 2**70, HUGE])
        part["offset"] = draw.choice([0, 2**40, 2**62, 2**66, HUGE // 10])
        part["size"] = draw.choice([1, 10**9, 2**40, 2**62, 2**66])
    elif draw.random() < 0.5:
        part[key] = draw.choice([*numbers, *texts, None, [], {}, [[]] * 3, ["a", "b", "c"]])
    elif draw.random() < 0.5:
        part.pop(key, None)
    else:
        draw.choice([value["shards"], value["samples"]]).append(part)


def _digested(value: Any) -> bytes:
    """The layout that is written, with digests that fit what it says."""

    def compact(part: Any) -> bytes:
        return json.dumps(part, sort_keys=True, separators=(",", ":")).encode()

    rows, start = value["samples"], 0
    for shard in value["shards"]:
        count = shard.get("samples")
        count = count if type(count) is int and 0 < count < 20 else 4
        block = b",\n".join(map(compact, rows[start : start + count]))
        shard["index_bytes"], shard["index_sha256"] = len(block), files.sha256_bytes(block)
        start += count
    lists = [b",\n".join(map(compact, part)) for part in (value["shards"], rows[:start])]
    head = b'{"format":"disttrain-shards","shards":[\n'
    return head + lists[0] + b'\n],"samples":[\n' + lists[1] + b'\n],"version":1}\n'


def _laid_out_anew(value: Any, draw: random.Random) -> bytes:
    """As other programs lay JSON out, now and then of another kind altogether."""
    if draw.random() < 0.3:
        key = draw.choice(list(value))
        value[key] = draw.choice([None, "x" * 3000, 2, HUGE, [], {}, [[]], [1], "disttrain-shards"])
    text = json.dumps(value, indent=draw.choice([None, 2]), ensure_ascii=draw.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.2:
        strange = draw.choice([b"9" * 5000, b"[" * 100_000, b"NaN", b"\xff", b"1e999"])
        place = draw.choice([b"1", b"4", b'"key"'])
        data = data.replace(place, strange, 1)
    return draw.choice([b"", b"", b"\xef\xbb\xbf"]) + data


KINDS = (damaged_shard, damaged_picture, strange_captions, strange_index)
