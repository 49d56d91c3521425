"""From words to training prompts: which lines, how they are filled, which one is drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, small_config

from disttrain.config import RunConfig
from disttrain.config_file import parse_config
from disttrain.errors import DataError
from disttrain.prompts import PromptPlan, prompt_plan, read_template, words_of_stem

WITH_CLASS = ("lora", "dreambooth")


def config_of(method: str, **subject: Any) -> RunConfig:
    tree = small_config(method, Path("runs"))
    tree["subjects"][0].update({"template": "", **subject})
    return parse_config(tree)


def plan_of(method: str, **subject: Any) -> PromptPlan:
    config = config_of(method, **subject)
    return prompt_plan(config, config.subjects[0])


@pytest.mark.parametrize("method", WITH_CLASS)
def test_methods_with_a_class_word_have_one_usual_prompt(method: str) -> None:
    plan = plan_of(method)
    assert plan.lines == ("a photo of {token} {class_name}",)
    assert plan.prompt(0, "fox", 0, "") == "a photo of sks fox"
    assert plan.name == "sks fox"


def test_textual_inversion_has_the_subject_template_as_usual_prompts() -> None:
    plan = plan_of("textual_inversion")
    assert plan.lines == read_template("subject.txt")
    assert len(plan.lines) > 10
    assert plan.name == "<fox>", "the new word means the whole subject, without a class word"


def test_the_token_alone_is_the_name_where_there_is_no_class() -> None:
    plan = plan_of("lora", class_name="", instance_prompt="a [name]!")
    assert plan.prompt(0, "fox", 0, "") == "a sks!"


@pytest.mark.parametrize("method", [*WITH_CLASS, "textual_inversion"])
def test_instance_prompt_and_template_are_used_when_given(method: str, tmp_path: Path) -> None:
    assert plan_of(method, instance_prompt="one {token}").lines == ("one {token}",)
    template = tmp_path / "own.txt"
    template.write_text("first [name]\n\n  second {token}  \n")
    assert plan_of(method, template=str(template)).lines == ("first [name]", "second {token}")


@pytest.mark.parametrize(
    ("line", "caption", "expected"),
    [
        ("a [name]", "", "a sks fox"),
        ("a {token}", "", "a sks"),
        ("a {class_name} called {token}", "", "a fox called sks"),
        ("[name], [filewords]", "in snow", "sks fox, in snow"),
        ("{token}, {caption}", "in snow", "sks, in snow"),
        ("{caption}", "a [name] in snow", "a sks fox in snow"),
        ("[filewords]", "{token} the {class_name}", "sks the fox"),
        ("[name] and [name]", "", "sks fox and sks fox"),
        ("[Name] {Token} {}", "", "[Name] {Token} {}"),
        ("[name], {caption}", r"50% {x} \1", r"sks fox, 50% {x} \1"),
    ],
)
def test_words_are_put_in_their_places(line: str, caption: str, expected: str) -> None:
    plan = PromptPlan((line,), "sks", "fox", "sks fox")
    assert plan.fill(line, caption) == expected
    assert plan.prompt(0, "fox", 3, caption) == expected


@pytest.mark.parametrize(
    ("lines", "used"),
    [
        (("[name]",), False),
        (("[name]", "[name], [filewords]"), True),
        (("{token} {caption}",), True),
        (("{token} {captions}",), False),
    ],
)
def test_a_plan_knows_whether_it_uses_captions(lines: tuple[str, ...], used: bool) -> None:
    assert PromptPlan(lines, "sks", "fox", "sks fox").uses_captions is used


def test_the_drawn_line_depends_on_seed_subject_and_index_only() -> None:
    lines = tuple(f"[name] {i}" for i in range(8))
    plan = PromptPlan(lines, "sks", "fox", "sks")

    def drawn(seed: int, subject: str, order: list[int]) -> dict[int, str]:
        return {i: plan.prompt(seed, subject, i, "") for i in order}

    indices = list(range(400))
    first = drawn(0, "fox", indices)
    assert drawn(0, "fox", indices[::-1]) == first
    assert drawn(1, "fox", indices) != first
    assert drawn(0, "owl", indices) != first
    counts = Counter(first.values())
    assert len(counts) == 8, "every line is used"
    assert min(counts.values()) > 25, "about as often as any other"
    assert plan.prompt(0, "fox", 5, "caption") == first[5]


@pytest.mark.parametrize("name", ["subject.txt", "templates/subject.txt"])
def test_templates_are_found_by_path_and_by_bare_name(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = read_template(str(ROOT / "templates/subject.txt"))
    assert read_template(name) == expected
    if name == "subject.txt":
        monkeypatch.chdir(tmp_path)
        assert read_template(name) == expected, "the project's own, from any folder"
        (tmp_path / "templates").mkdir()
        (tmp_path / "templates/subject.txt").write_text("my [name]")
        assert read_template(name) == ("my [name]",)
        (tmp_path / "subject.txt").write_text("nearest [name]")
        assert read_template(name) == ("nearest [name]",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a [name]\n\nno name here\n", " line 3: no [name] in it, so the word learns nothing"),
        (b"a [Name]", " line 1: no [name] in it, so the word learns nothing"),
        (b"", ": no prompts in it; write one per line, each with [name]"),
        (b" \n\t\n", ": no prompts in it; write one per line, each with [name]"),
        (b"a [name] \xe9", ": not UTF-8 text (byte 9); save it as UTF-8"),
        (b"a [name]\n" * 2**17, ": 1179648 bytes of text, the limit is 1048576"),
    ],
)
def test_unusable_templates_are_refused_in_one_line(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_template(str(path))
    assert str(caught.value) == f"{path}{problem}"


def test_a_template_that_is_nowhere_is_answered_with_those_that_are() -> None:
    for name in ("subjcet.txt", "examples", "a" * 300):
        with pytest.raises(
            DataError, match=rf"^template {name}: no such file; known .*subject\.txt"
        ):
            read_template(name)


def test_templates_of_windows_editors_lose_their_mark(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbfa [name]\r\nthe [name]\r\n")
    assert read_template(str(path)) == ("a [name]", "the [name]")


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("0001-0-a red fox", "a red fox"),
        ("12 fox", "fox"),
        ("fox-2", "fox-2"),
        ("-- fox", "fox"),
        ("2024", ""),
        ("a 3d fox", "a 3d fox"),
    ],
)
def test_words_of_a_file_name(stem: str, words: str) -> None:
    assert words_of_stem(stem) == words
