"""From words to training prompts: which lines, how they are filled, which one is drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, small_config

from disttrain import randomness
from disttrain.config import CaptionSettings, RunConfig
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


def test_a_pattern_takes_words_from_a_file_name() -> None:
    def words(stem: str, pattern: str, join: str = " ") -> str:
        return words_of_stem(stem, CaptionSettings(filename_pattern=pattern, filename_join=join))

    assert words("000001-1-a man in suit", r"\w+", ", ") == "a, man, in, suit"
    assert words("7 red_fox", r"[a-z]+") == "red fox"
    assert words("a-b", r"(\w)(-)?", "|") == "a-|b", "whole matches, not the groups"
    assert words("a b", r"\w*", ",") == "a,b", "empty matches are no words"
    assert words("red fox", r"\d+") == ""
    assert words("2024 fox", "") == "fox"


# Tags and drop-out


def varied(lines: tuple[str, ...] = ("{caption}",), **captions: Any) -> PromptPlan:
    return PromptPlan(lines, "sks", "fox", "sks fox", CaptionSettings(**captions))


TAGS = [f"t{i}" for i in range(8)]


def drawn_tags(plan: PromptPlan, count: int = 400, caption: str = ", ".join(TAGS)) -> list[Any]:
    prompts = [plan.prompt(0, "fox", index, caption) for index in range(count)]
    return [prompt.split(", ") if prompt else [] for prompt in prompts]


def test_captions_are_used_as_they_are_unless_tags_vary() -> None:
    caption = " red fox ,,  snow,"
    assert varied().prompt(0, "fox", 0, caption) == caption
    assert varied(dropout=0.5, keep_tags=3).prompt(0, "fox", 3, caption) in (caption, "")
    plan = varied(shuffle_tags=True, keep_tags=9)
    assert plan.prompt(0, "fox", 0, caption) == "red fox, snow"
    assert plan.prompt(0, "fox", 0, " , ") == ""


def test_tags_are_shuffled_after_those_that_are_kept() -> None:
    drawn = drawn_tags(varied(shuffle_tags=True, keep_tags=2))
    assert all(tags[:2] == TAGS[:2] and sorted(tags) == TAGS for tags in drawn)
    for place in range(2, 8):
        counts = Counter(tags[place] for tags in drawn)
        assert set(counts) == set(TAGS[2:]), "every tag gets everywhere"
        assert min(counts.values()) > 35
    assert all(tags == TAGS for tags in drawn_tags(varied(shuffle_tags=True, keep_tags=8), 20))


def test_tags_are_dropped_one_by_one_except_those_that_are_kept() -> None:
    drawn = drawn_tags(varied(tag_dropout=0.3, keep_tags=1), 2000)
    assert all(tags == [tag for tag in TAGS if tag in tags] for tags in drawn), "in their order"
    counts = Counter(tag for tags in drawn for tag in tags)
    assert counts["t0"] == 2000
    assert all(abs(counts[tag] / 2000 - 0.7) < 0.05 for tag in TAGS[1:])
    both = sum("t1" in tags and "t2" in tags for tags in drawn) / 2000
    assert abs(both - 0.49) < 0.05, "independent of each other"


def test_dropping_and_shuffling_draw_from_streams_of_their_own() -> None:
    dropped = drawn_tags(varied(tag_dropout=0.5))
    both = drawn_tags(varied(tag_dropout=0.5, shuffle_tags=True))
    assert [sorted(tags) for tags in both] == dropped
    assert both != dropped


def test_whole_prompts_are_dropped_at_their_rate() -> None:
    lines = tuple(f"{i} [name] {{caption}}" for i in range(8))
    full, plan = varied(lines), varied(lines, dropout=0.25)
    prompts = [plan.prompt(0, "fox", index, "snow") for index in range(2000)]
    assert abs(prompts.count("") / 2000 - 0.25) < 0.04
    for index, prompt in enumerate(prompts):
        assert prompt in ("", full.prompt(0, "fox", index, "snow"))
    assert len(set(prompts)) == 9


def test_the_drawn_line_is_the_same_whatever_happens_to_captions() -> None:
    lines = tuple(f"{i}" for i in range(16))
    chosen = [randomness.integer(16, 5, ("fox", "template"), index) for index in range(40)]
    captions = {"shuffle_tags": True, "tag_dropout": 0.5, "dropout": 0.5}
    for plan in (varied(lines), varied(lines, **captions)):
        for index, line in enumerate(chosen):
            assert plan.prompt(5, "fox", index, "a, b") in ("", str(line))


def test_varied_captions_depend_on_seed_subject_and_index_only() -> None:
    plan = varied(shuffle_tags=True, tag_dropout=0.3, dropout=0.1)

    def drawn(seed: int, subject: str, order: list[int]) -> dict[int, str]:
        return {i: plan.prompt(seed, subject, i, ", ".join(TAGS)) for i in order}

    first = drawn(0, "fox", list(range(50)))
    assert drawn(0, "fox", list(range(50))[::-1]) == first
    assert drawn(1, "fox", list(range(50))) != first
    assert drawn(0, "owl", list(range(50))) != first


def test_tags_vary_before_names_are_filled_in() -> None:
    plan = PromptPlan(
        ("{caption}",), "a, b", "", "a, b", CaptionSettings(shuffle_tags=True, keep_tags=1)
    )
    assert plan.prompt(0, "fox", 0, "[name], snow") == "a, b, snow"


@pytest.mark.parametrize(
    ("lines", "captions", "fixed"),
    [
        (("[name]", "{caption}"), {}, True),
        (("{caption}",), {"dropout": 0.1}, True),
        (("{caption}",), {"shuffle_tags": True}, False),
        (("[filewords]",), {"tag_dropout": 0.1}, False),
        (("[name]",), {"tag_dropout": 0.1, "shuffle_tags": True}, True),
    ],
)
def test_every_prompt_of_a_fixed_plan_is_known(
    lines: tuple[str, ...], captions: dict[str, Any], fixed: bool
) -> None:
    plan = varied(lines, **captions)
    assert plan.fixed is fixed
    texts = ["snow", "night", "snow", "a, b"]
    if fixed:
        known = list(plan.every(texts))
        drawn = {plan.prompt(0, "fox", index, texts[index % 4]) for index in range(400)}
        assert set(known) == drawn
        assert len(known) == len(drawn), "each once"
        assert list(plan.every(texts)) == known


# Full fine-tuning


def finetune(**subject: Any) -> PromptPlan:
    tree = small_config("lora", Path("runs"))
    tree["method"] = {"name": "finetune"}
    tree["subjects"][0].update({"template": "", "token": "", "class_name": "", **subject})
    config = parse_config(tree)
    return prompt_plan(config, config.subjects[0])


def test_finetuning_uses_captions_as_prompts() -> None:
    plan = finetune()
    assert plan.lines == ("{caption}",)
    assert plan.prompt(0, "set", 0, "a fox in snow") == "a fox in snow"
    assert finetune(instance_prompt="photo, {caption}").lines == ("photo, {caption}",)


def test_finetuning_needs_no_name_in_its_template(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("a photo of [filewords]\n\n{caption}\n")
    assert finetune(template=str(path)).lines == ("a photo of [filewords]", "{caption}")
    with pytest.raises(DataError, match=r"line 1: no \[name\] in it"):
        read_template(str(path))
    assert finetune(template="none.txt").prompt(0, "set", 0, "words") == "a picture"


def test_templates_that_finetuning_cannot_use_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("a photo of [filewords]\na photo\n")
    with pytest.raises(DataError, match=r"own\.txt line 2: no \[filewords\] in it"):
        finetune(template=str(path))
    path.write_text("\n")
    with pytest.raises(DataError, match=r"no prompts in it; .* each with \[filewords\]"):
        finetune(template=str(path))
    for given in ({"template": "subject_filewords.txt"}, {"instance_prompt": "[name], {caption}"}):
        with pytest.raises(DataError, match=r"^subject fox: .*\[name\].* but token is empty"):
            finetune(**given)
        assert "sks" in finetune(**given, token="sks").prompt(0, "set", 0, "words")


def test_caption_settings_of_the_config_reach_the_plan() -> None:
    tree = small_config("lora", Path("runs"))
    tree["captions"] = {"shuffle_tags": True, "keep_tags": 1}
    config = parse_config(tree)
    plan = prompt_plan(config, config.subjects[0])
    assert plan.captions == CaptionSettings(shuffle_tags=True, keep_tags=1)
