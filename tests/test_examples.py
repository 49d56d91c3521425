"""The pictures and templates that the demo, the documents and the configs start from."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TEMPLATES = ROOT / "templates"
PICTURE_SUFFIXES = (".jpg", ".png")
SUBJECTS = ("dolphin", "dragon", "fox", "octopus", "penguin")
CAPTIONED = ("dolphin", "penguin")
CLASSES = ("animal_face", "bird")
TABLE_ROW = re.compile(r"^\| `(?P<folder>[\w/]+)` \| (?P<count>\d+) (?P<kind>JPEG|PNG)")
KINDS = {"JPEG": ".jpg", "PNG": ".png"}
LARGEST_TOTAL = 1_500_000  # bytes


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in PICTURE_SUFFIXES)


def read_rgb(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        assert picture.mode == "RGB", f"{path} is {picture.mode}"
        return picture.copy()


def table() -> dict[str, re.Match[str]]:
    lines = (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
    matches = [match for line in lines if (match := TABLE_ROW.match(line))]
    return {match["folder"]: match for match in matches}


def test_subject_folders_are_the_known_ones():
    for kind in ("subjects", "held_out"):
        assert tuple(sorted(path.name for path in (EXAMPLES / kind).iterdir())) == SUBJECTS
    assert tuple(sorted(path.name for path in (EXAMPLES / "class_pictures").iterdir())) == CLASSES


@pytest.mark.parametrize(
    ("folder", "at_least"),
    [
        *((f"subjects/{name}", 8) for name in SUBJECTS),
        *((f"held_out/{name}", 3) for name in SUBJECTS),
        *((f"class_pictures/{name}", 8) for name in CLASSES),
    ],
)
def test_pictures_decode_and_differ(folder: str, at_least: int):
    decoded = [read_rgb(path) for path in pictures(EXAMPLES / folder)]
    assert len(decoded) >= at_least
    assert all(min(picture.size) >= 64 for picture in decoded)
    digests = {hashlib.sha256(picture.tobytes()).hexdigest() for picture in decoded}
    assert len(digests) == len(decoded)


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_held_out_picture_is_trained_on(name: str):
    training, held_out = (
        {read_rgb(path).tobytes() for path in pictures(EXAMPLES / kind / name)}
        for kind in ("subjects", "held_out")
    )
    assert training.isdisjoint(held_out)


def test_one_subject_has_pictures_of_several_shapes():
    sizes = {read_rgb(path).size for path in pictures(EXAMPLES / "subjects" / "octopus")}
    assert len({width > height for width, height in sizes}) == 2
    assert len(sizes) >= 3


@pytest.mark.parametrize("name", SUBJECTS)
def test_captions_are_all_there_or_none(name: str):
    folder = EXAMPLES / "subjects" / name
    captions = {
        path.stem: path.read_text(encoding="utf-8").strip() for path in folder.glob("*.txt")
    }
    expected = {path.stem for path in pictures(folder)} if name in CAPTIONED else set()
    assert set(captions) == expected
    assert all(captions.values())
    # What a caption names is not learned into the word, so it must not name the subject itself.
    assert not any(name in caption for caption in captions.values())


def test_readme_names_every_folder_with_its_count_kind_and_licence():
    rows = table()
    assert set(rows) == {
        *(f"subjects/{name}" for name in SUBJECTS),
        *(f"class_pictures/{name}" for name in CLASSES),
    }
    for folder, row in rows.items():
        found = pictures(EXAMPLES / folder)
        assert len(found) == int(row["count"]), folder
        assert {path.suffix for path in found} == {KINDS[row["kind"]]}, folder
        licence = row.string.rstrip("| ").rsplit("|", 1)[-1].strip()
        assert licence == ("MIT" if folder.startswith("subjects/") else "Apache-2.0"), folder


def test_examples_stay_small():
    files = [path for path in EXAMPLES.rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.is_file()) < LARGEST_TOTAL


@pytest.mark.parametrize(
    ("template", "fewest", "most", "with_caption"),
    [
        ("subject.txt", 20, 30, False),
        ("subject_filewords.txt", 20, 30, True),
        ("style.txt", 15, 20, False),
        ("style_filewords.txt", 15, 20, True),
    ],
)
def test_template_lines(template: str, fewest: int, most: int, with_caption: bool):
    lines = (TEMPLATES / template).read_text(encoding="utf-8").splitlines()
    assert fewest <= len(lines) <= most
    assert len(set(lines)) == len(lines)
    for line in lines:
        assert line == line.strip()
        assert line.count("[name]") == 1, line
        assert line.count("[filewords]") == int(with_caption), line
        assert re.findall(r"[\[{].*?[\]}]", line.replace("[filewords]", "")) == ["[name]"], line


def test_template_for_fine_tuning_names_nothing():
    (line,) = (TEMPLATES / "none.txt").read_text(encoding="utf-8").splitlines()
    assert line.strip()
    assert "[" not in line


def test_notice_and_licence_cover_what_is_shipped():
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for shipped in ("disttrain/assets/bpe_simple_vocab_16e6.txt.gz", "examples/subjects/"):
        assert shipped in notice
        assert (ROOT / shipped).exists()
    for folder in ("examples/held_out/", "examples/class_pictures/"):
        assert folder in notice
    assert "Permission is hereby granted" in notice
