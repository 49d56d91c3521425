"""Manifests as people, spreadsheets and programs write them, and what is said of broken ones."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, small_config

from disttrain import schema
from disttrain.config import RunConfig
from disttrain.errors import ConfigError
from disttrain.manifest import read_manifest

FOX = "examples/subjects/fox"
OWL = "examples/subjects/penguin"


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A LoRA config whose subject has more to say than a name."""
    tree = small_config("lora", tmp_path / "runs")
    tree["subjects"][0]["instance_prompt"] = "a {class_name} named {token}"
    return tree


def read(path: Path, content: Any, tree: dict[str, Any]) -> list[RunConfig]:
    """The manifest with this content; text, bytes, or rows for the format that the name says."""
    if isinstance(content, list):
        lines = "".join(json.dumps(row) + "\n" for row in content)
        content = yaml.safe_dump(content) if path.suffix == ".yaml" else lines
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_manifest(path, tree)


def refusal(path: Path, content: Any, tree: dict[str, Any]) -> str:
    """What is said of a broken manifest, without the file's place: one line."""
    with pytest.raises(ConfigError) as caught:
        read(path, content, tree)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message[len(str(path)) :].lstrip(": ")


def names(members: list[RunConfig]) -> list[str]:
    return [member.subjects[0].name for member in members]


CSV = f"name,images,class_name,train.max_steps\nfox,{FOX},fox,7\nowl,{OWL},,\n"


@pytest.mark.parametrize(
    "content",
    [
        CSV,
        b"\xef\xbb\xbf" + CSV.encode(),
        CSV.replace("\n", "\r\n"),
        CSV.replace("\n", "\r"),
        CSV.replace("\n", "\n\n"),
        CSV.replace("\n", "\n,,,\n"),
        CSV.replace("\n", ",,\n"),
        CSV.replace(",", " , "),
        CSV.removesuffix("\n"),
        CSV.replace("owl,", '"owl",').replace(FOX, f'"{FOX}"'),
        CSV.replace(",,\n", "\n"),
    ],
)
def test_csv_as_editors_and_spreadsheets_write_it(
    content: str | bytes, tree: dict[str, Any], tmp_path: Path
) -> None:
    fox, owl = read(tmp_path / "m.CSV", content, tree)
    assert names([fox, owl]) == ["fox", "owl"]
    assert (fox.subjects[0].images, owl.subjects[0].images) == (FOX, OWL)
    assert (fox.train.max_steps, owl.train.max_steps) == (7, tree["train"]["max_steps"])
    assert owl.subjects[0].class_name == "fox", "the config's subject says what a row leaves open"


def test_quoted_cells_hold_commas_quotes_and_line_breaks(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    prompt = 'a ""big"", red {token}\nin the snow'
    text = f'name,images,instance_prompt\nfox,{FOX},"{prompt}"\nowl,missing,\n'
    message = refusal(tmp_path / "m.csv", text, tree)
    assert message.startswith("line 4: images: missing does not exist"), "lines are the file's"
    (fox,) = read(tmp_path / "m.csv", text.rsplit("owl", 1)[0], tree)
    assert fox.subjects[0].instance_prompt == prompt.replace('""', '"')


ROWS = [
    {"name": "fox", "images": FOX, "train.max_steps": 7, "optim.learning_rate": 2e-4, "seed": 3},
    {"name": "owl", "images": OWL, "token": "", "class_name": None},
    {
        "name": 7,
        "images": FOX,
        "optim.learning_rate": "2e-4",
        "train.sample_prompts": ["a {token}"],
    },
]


@pytest.mark.parametrize("name", ["m.jsonl", "m.yaml"])
def test_formats_with_types(name: str, tree: dict[str, Any], tmp_path: Path) -> None:
    members = read(tmp_path / name, ROWS, tree)
    assert names(members) == ["fox", "owl", "7"]
    fox, owl, seven = members
    assert (fox.train.max_steps, fox.optim.learning_rate, fox.seed) == (7, 2e-4, 3)
    assert (owl.train.max_steps, owl.optim.learning_rate, owl.seed) == (6, 1e-3, 0)
    assert owl.subjects[0].token == "sks", "empty says nothing"
    assert seven.optim.learning_rate == 2e-4
    assert seven.train.sample_prompts == ("a {token}",)


def test_json_lines_end_at_line_feeds_only(tree: dict[str, Any], tmp_path: Path) -> None:
    prompt = "a {token} \u2028 \x85 \x0b there"
    rows = [{"name": "fox", "images": FOX, "instance_prompt": prompt}, {"name": "owl"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
    assert refusal(tmp_path / "m.jsonl", text, tree).startswith("line 3: images: missing")
    (fox,) = read(tmp_path / "m.jsonl", text.split("\n")[0], tree)
    assert fox.subjects[0].instance_prompt == prompt


def test_yaml_with_shared_parts_and_comments(tree: dict[str, Any], tmp_path: Path) -> None:
    text = f"""# subjects
- &usual
  name: fox
  images: {FOX}
  train.max_steps: 9
- <<: *usual
  name: owl   # else the same
"""
    assert [m.train.max_steps for m in read(tmp_path / "m.yml", text, tree)] == [9, 9]


def test_a_folder_of_folders(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "people.v2"
    for name in ("s10", "s2", ".hidden"):
        (folder / name).mkdir(parents=True)
    (folder / "notes.txt").write_text("not a subject")
    (folder / "linked").symlink_to(ROOT / FOX)
    members = read_manifest(folder, tree)
    assert names(members) == ["linked", "s10", "s2"]
    assert [m.subjects[0].images for m in members] == [str(folder / n) for n in names(members)]
    (folder / "two words").mkdir()
    with pytest.raises(ConfigError, match="two words: name: 'two words' is no file name"):
        read_manifest(folder, tree)


def test_paths_are_as_given_or_beside_the_manifest(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["method"]["num_class_images"] = 2
    for place in ("beside/one", "here/one", "here/classes", "beside/two", "beside/classes/x"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    rows = [
        {"name": "one", "images": "one", "class_images": "classes"},
        {"name": "two", "images": "two", "class_images": "classes/x"},
        {"name": "web", "images": "s3://bucket/index.json"},
        {"name": "absolute", "images": str(tmp_path / "here/one")},
    ]
    members = read(tmp_path / "beside/m.jsonl", rows, tree)
    beside = str(tmp_path / "beside")
    assert [member.subjects[0].images for member in members] == [
        "one",
        f"{beside}/two",
        "s3://bucket/index.json",
        str(tmp_path / "here/one"),
    ]
    classes = [member.subjects[0].class_images for member in members]
    assert classes == ["classes", f"{beside}/classes/x", "", ""]


def test_each_new_word_of_textual_inversion_is_named_for_its_subject(tmp_path: Path) -> None:
    tree = small_config("textual_inversion", tmp_path)
    assert tree["subjects"][0]["token"] == "<fox>"
    text = f"name,images,token\nOwl,{FOX},\nfish,{FOX},<cod>\n"
    assert [m.subjects[0].token for m in read(tmp_path / "m.csv", text, tree)] == ["<owl>", "<cod>"]
    tree["method"] = {"name": "lora"}
    tree["subjects"][0] = {"name": "x", "images": FOX, "class_name": "fox", "token": "sks"}
    rows = [{"name": "fox", "images": FOX, "method.name": "textual_inversion"}]
    assert read(tmp_path / "m.jsonl", rows, tree)[0].subjects[0].token == "<fox>"
    assert read(tmp_path / "m.csv", text, tree)[0].subjects[0].token == "sks"


def test_a_config_need_not_name_a_subject(tree: dict[str, Any], tmp_path: Path) -> None:
    del tree["subjects"]
    text = f"name,images,class_name,token\nfox,{FOX},fox,sks\n"
    assert names(read(tmp_path / "m.csv", text, tree)) == ["fox"]
    before = json.dumps(tree)
    refusal(tmp_path / "m.csv", text.replace("sks", ""), tree)
    assert json.dumps(tree) == before, "a config is read, not changed"


def test_held_out_pictures_are_those_of_the_row(tree: dict[str, Any], tmp_path: Path) -> None:
    """Those of the config's subject would judge every row by another one's pictures."""
    tree["subjects"][0]["held_out"] = "examples/held_out/fox"
    text = f"name,images,held_out\nfox,{FOX},examples/held_out/dragon\nowl,{FOX},\n"
    members = read(tmp_path / "m.csv", text, tree)
    assert [m.subjects[0].held_out for m in members] == ["examples/held_out/dragon", ""]


@pytest.mark.parametrize("subjects", [{"name": "fox"}, ["fox"], "fox", 3])
def test_a_config_with_broken_subjects(subjects: Any, tree: dict[str, Any], tmp_path: Path) -> None:
    tree["subjects"] = subjects
    (tmp_path / "m.csv").write_text(CSV)
    with pytest.raises(ConfigError, match=r"^subjects: expected a list"):
        read_manifest(tmp_path / "m.csv", tree)


BROKEN_CSV = [
    ("", "no subjects in it"),
    ("name,images\n", "no subjects in it"),
    (f"name,images\nfox,{FOX}\nFOX,{OWL}\n", "line 3: name 'FOX' is that of"),
    (f"name,images,nmae\nfox,{FOX},x\n", "line 2: 'nmae': unknown column; use class_images,"),
    (f"name,images,\nfox,{FOX},x\n", "line 2: '': unknown column"),
    (f"name;images\nfox;{FOX}\n", "line 2: 'name;images': unknown column"),
    (f"name,images,name\nfox,{FOX},owl\n", "line 1: column 'name' is given twice"),
    (f"name,images\nfox,{FOX},x\n", "line 2: more cells than the first line has columns"),
    (f'name,images\nfox,"{FOX}\n', "line 2: not CSV (unexpected end of data)"),
    (f'name,images\n"fo"x,{FOX}\n', "line 2: not CSV ("),
    ("name,images\n\nfox\n", "line 3: images: missing; A folder of pictures"),
    (f"images\n{FOX}\n", "line 2: name: missing; Name of the result"),
    (f"name,images\n../fox,{FOX}\n", "line 2: name: '../fox' is no file name"),
    ("name,images\nfox,absent\n", "line 2: images: absent does not exist"),
    ('name,images\nfox,"ab\nsent"\n', "line 3: images: ab sent does not exist"),
    (f"name,images\nfox,{'x' * 100_000}\n", "line 2: images: xxx"),
    (f"name,images\nfox,{'x' * 200_000}\n", "line 2: not CSV (field larger than field limit"),
    (f"name,images\nfox,{FOX}/\0\n", "line 2: "),
    (f"name,images,train.max_steps\nfox,{FOX},many\n", "line 2: train.max_steps: expected a whole"),
    (f"name,images,train.max_steps\nfox,{FOX},0\n", "line 2: train.max_steps: 0 is impossible"),
    (f"name,images,optim.learning_rat\nfox,{FOX},1\n", "line 2: optim.learning_rat: unknown key;"),
    (f"name,images,optim.learning_rate\nfox,{FOX},nan\n", "line 2: optim.learning_rate: nan is"),
    (f"name,images,seed\nfox,{FOX},-1\n", "line 2: seed: -1 is impossible"),
    (f"name,images,seed\nfox,{FOX},[1\n", "line 2: override 'seed=[1': the value is not YAML"),
    (f"name,images,subjects.0.name\nfox,{FOX},owl\n", "line 2: 'subjects.0.name': unknown column"),
    (f"name,images,.\nfox,{FOX},1\n", "line 2: : unknown key"),
    (b"name,images\nf\xfcchs,x\n", "not UTF-8 text (byte 13); save it as UTF-8"),
]


@pytest.mark.parametrize(("content", "said"), BROKEN_CSV)
def test_a_broken_csv_is_refused_in_one_line_that_names_the_row(
    content: str | bytes, said: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    message = refusal(tmp_path / "m.csv", content, tree)
    assert message.startswith(said)
    assert len(message) < 1000


def test_two_rows_of_one_name_are_both_named(tree: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    text = f"[{{name: fox, images: {FOX}}}, {{name: Fox, images: {FOX}}}]\n"
    expected = f"line 1: name 'Fox' is that of {path} line 1 too; each needs its own"
    assert refusal(path, text, tree) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[]", "a row is a mapping of columns to values"),
        ("3", "a row is a mapping of columns to values"),
        ("{", "not JSON (Expecting property name"),
        ('{"name": "owl"} {}', "not JSON (Extra data"),
        ("[" * 100_000, "not JSON ("),
        ('{"seed": ' + "9" * 5000 + "}", "not JSON ("),
        ('{"name": "a", "name": "b"}', "not JSON (key 'name' is given twice)"),
        ('{"name": {"first": "owl"}}', "name: expected text, found a mapping"),
        (f'{{"name": ["owl"], "images": "{FOX}"}}', "name: expected text, found a list"),
        ('{"name": "owl", "images": ["a", "b"]}', "images: expected text, found a list"),
        ('{"name": "owl", "optim.learning_rate": {"a": 1}}', "optim.learning_rate: expected a num"),
        ('{"name": "owl", "train.max_steps": [[1]]}', "train.max_steps: expected a number, text"),
        (f'{{"name": "owl", "images": "{FOX}", "train.max_steps": true}}', "train.max_steps: exp"),
        (f'{{"name": "owl", "images": "{FOX}", "train.max_steps": 1.5}}', "train.max_steps: exp"),
    ],
)
def test_a_broken_line_of_json(line: str, said: str, tree: dict[str, Any], tmp_path: Path) -> None:
    text = f'{{"name": "fox", "images": "{FOX}"}}\n{line}\n'
    assert refusal(tmp_path / "m.jsonl", text, tree).startswith(f"line 2: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a manifest is a list, an entry for each subject"),
        ("name: fox\n", "a manifest is a list, an entry for each subject"),
        ("[]\n", "no subjects in it"),
        ("- name: [\n", "line 2: not YAML ("),
        ("- name: fox\n  name: owl\n", "line 1: key 'name' is given twice"),
        ("- fox\n", "line 1: a row is a mapping of columns to values"),
        ("- 3: fox\n", "line 1: a row is a mapping of columns to values"),
        ("- &a\n  name: fox\n  seed: *a\n", "line 1: seed: expected a number, text or a list"),
        ("- &a [*a]\n", "line 1: a row is a mapping of columns to values"),
        ("-\n  name: 2024-01-01\n  seed: 2024-01-01\n", "line 2: seed: expected a number, text or"),
        (f"- name: 2024-01-01\n  images: {FOX}\n", "line 1: name: expected text, found date"),
        (f"- name: no\n  images: {FOX}\n", "line 1: name: expected text, found bool False"),
        ("- !!bool maybe\n", "not YAML ("),
        ("- !!timestamp maybe\n", "not YAML ("),
        ("- !!python/object:os.system x\n", "line 1: not YAML (could not determine"),
        ("[" * 5000, "not YAML ("),
        ("- name: \x01\n", "not YAML ("),
    ],
)
def test_a_broken_yaml(text: str, said: str, tree: dict[str, Any], tmp_path: Path) -> None:
    assert refusal(tmp_path / "m.yaml", text, tree).startswith(said)


def test_what_is_no_manifest(tree: dict[str, Any], tmp_path: Path) -> None:
    for name, said in [
        ("absent.csv", "No such file or directory"),
        ("m.xlsx", "give a .csv, .jsonl or .yaml file, or a folder of folders"),
        ("absent", "give a .csv, .jsonl or .yaml file, or a folder of folders"),
    ]:
        with pytest.raises(ConfigError) as caught:
            read_manifest(tmp_path / name, tree)
        assert str(caught.value) == f"{tmp_path / name}: {said}"
    with pytest.raises(ConfigError, match="no subjects in it"):
        read_manifest(tmp_path, tree)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_a_folder_that_may_not_be_read(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ConfigError, match="closed: Permission denied"):
        read_manifest(tmp_path / "closed", tree)


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.yaml"])
def test_thousands_of_rows_are_read_in_seconds(
    name: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"name": f"s{i}", "images": FOX, "train.max_steps": i + 1} for i in range(2000)]
    cells = "".join(f"s{i},{FOX},{i + 1}\n" for i in range(2000))
    content = f"name,images,train.max_steps\n{cells}" if name == "m.csv" else rows
    began = time.process_time()
    members = read(tmp_path / name, content, tree)
    assert time.process_time() - began < 8, "0.4 to 2 seconds when this was written"
    assert [member.train.max_steps for member in members] == list(range(1, 2001))


def test_the_example_manifest() -> None:
    members = read_manifest(
        Path("examples/fleet.csv"), schema.read_mapping(Path("configs/lora.yaml"))
    )
    assert names(members) == ["fox", "penguin", "dolphin", "octopus", "dragon"]
    assert [member.train.max_steps for member in members] == [300, 200, 300, 300, 150]
    assert [member.optim.learning_rate for member in members][2:] == [2e-4, 5e-4, 1e-3]
