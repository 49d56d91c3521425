"""From a subject's words to the text of each training prompt.

Second link of the pipeline, pure text: settings and templates/ go in, prompts come out. Invariant:
the prompt of a sample is a function of (seed, subject, draw index, caption) alone.

Two spellings mean the same: `{token}`, `{class_name}`, `{caption}` of a config, and `[name]`,
`[filewords]` of the web UI's template files. `[name]` is the token, followed by the class word for
the methods that need one (LoRA and DreamBooth), because there the token alone is a rare word
without a meaning of its own.

Tags of a caption are shuffled and dropped as in the web UI's data set: first the caption's tags,
then `[filewords]`, then `[name]`. Two things differ. The web UI keeps the blanks around tags, so
that a shuffled caption begins with one and has doubled or missing ones inside; here tags are
stripped and joined by ", ". And what a draw leaves out depends on its index, not on what was drawn
before it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from disttrain import randomness
from disttrain.config import (
    METHODS_WITH_CLASS_WORD,
    CaptionSettings,
    FinetuneSettings,
    RunConfig,
    SubjectSettings,
)
from disttrain.errors import DataError
from disttrain.files import read_text

TEMPLATE_LIMIT = 2**20
USUAL_PROMPT = "a photo of {token} {class_name}"
USUAL_TEMPLATE = "subject.txt"
FINETUNE_PROMPT = "{caption}"
NAME_PLACES = ("[name]", "{token}")
CAPTION_PLACES = ("[filewords]", "{caption}")
_CAPTION = re.compile("|".join(map(re.escape, CAPTION_PLACES)))
AS_IT_IS = CaptionSettings()
"""Captions that are used unchanged."""


@dataclass(frozen=True)
class PromptPlan:
    """The lines a subject's training prompts are drawn from, and the words that fill them."""

    lines: tuple[str, ...]
    token: str
    class_name: str
    name: str
    """What `[name]` stands for."""

    captions: CaptionSettings = AS_IT_IS
    """How captions and prompts vary from draw to draw."""

    @property
    def uses_captions(self) -> bool:
        """Whether any line has a place for the picture's caption."""
        return any(_holds(line, CAPTION_PLACES) for line in self.lines)

    @property
    def varies_tags(self) -> bool:
        """Whether a caption's tags are shuffled or dropped."""
        return self.captions.shuffle_tags or self.captions.tag_dropout > 0

    @property
    def fixed(self) -> bool:
        """Whether a prompt is one of the lines filled with the caption, or the empty one."""
        return not (self.varies_tags and self.uses_captions)

    def every(self, captions: Iterable[str]) -> Iterator[str]:
        """Each different prompt that pictures with these captions can get, in a fixed order.

        Only for plans that are `fixed`.
        """
        assert self.fixed
        seen: set[str] = set()
        if self.captions.dropout > 0:
            seen.add("")
            yield ""
        for caption in captions if self.uses_captions else [""]:
            for line in self.lines:
                prompt = self.fill(line, caption)
                if prompt not in seen:
                    seen.add(prompt)
                    yield prompt

    def fill(self, line: str, caption: str = "") -> str:
        """`line` with its words in place; the caption goes first, so it may hold `[name]` too."""
        # In one pass: a caption that holds "[filewords]" must not be put into itself.
        text = _CAPTION.sub(lambda _: caption, line)
        text = text.replace("{token}", self.token).replace("{class_name}", self.class_name)
        return text.replace("[name]", self.name)

    def prompt(self, seed: int, subject: str, index: int, caption: str) -> str:
        """The prompt of draw `index`: one line, drawn uniformly, filled.

        With caption drop-out it is empty at the given rate, whatever the line.
        """
        rate = self.captions.dropout
        if rate > 0 and randomness.uniform(seed, (subject, "caption drop-out"), index) < rate:
            return ""
        choice = randomness.integer(len(self.lines), seed, (subject, "template"), index)
        if not self.fixed:
            caption = self._vary(seed, subject, index, caption)
        return self.fill(self.lines[choice], caption)

    def _vary(self, seed: int, subject: str, index: int, caption: str) -> str:
        """The caption with some tags left out and the others in another order."""
        stripped = (tag.strip() for tag in caption.split(","))
        tags = [tag for tag in stripped if tag]
        kept, rest = tags[: self.captions.keep_tags], tags[self.captions.keep_tags :]
        if self.captions.tag_dropout > 0:
            draws = randomness.generator(seed, (subject, "tag drop-out"), index).random(len(rest))
            pairs = zip(rest, draws, strict=True)
            rest = [tag for tag, draw in pairs if draw >= self.captions.tag_dropout]
        if self.captions.shuffle_tags:
            order = randomness.permutation(len(rest), seed, (subject, "tag order"), index)
            rest = [rest[place] for place in order]
        return ", ".join([*kept, *rest])


def prompt_plan(config: RunConfig, subject: SubjectSettings) -> PromptPlan:
    """The prompt plan of one subject.

    Raises:
        DataError: a template that is missing or empty, has a line that `read_template` refuses, or
            asks for the name of a subject that has none.
    """
    with_class = config.method.name in METHODS_WITH_CLASS_WORD
    finetune = isinstance(config.method, FinetuneSettings)
    name = f"{subject.token} {subject.class_name}".strip() if with_class else subject.token
    if subject.template:
        lines = read_template(subject.template, nameless=finetune)
    elif subject.instance_prompt:
        lines = (subject.instance_prompt,)
    elif finetune:
        lines = (FINETUNE_PROMPT,)
    else:
        lines = (USUAL_PROMPT,) if with_class else read_template(USUAL_TEMPLATE)
    asking = next((line for line in lines if _holds(line, NAME_PLACES)), None)
    if asking is not None and not subject.token:
        raise DataError(
            f"subject {subject.name}: its prompt '{asking[:60]}' asks for a name, but token is "
            "empty; give a token, or use [filewords] alone"
        )
    return PromptPlan(lines, subject.token, subject.class_name, name, config.captions)


def template_folders() -> list[Path]:
    """Where a template's bare name is looked up, in order."""
    package = Path(__file__).parent
    return [Path("templates"), package / "templates", package.parent / "templates"]


def read_template(name: str, *, nameless: bool = False) -> tuple[str, ...]:
    """The lines of a template file, given as a path or as the name of a file in templates/.

    Args:
        nameless: for full fine-tuning, which teaches no word: lines need the picture's words
            instead of the subject's name, or else no line of the file has a place for either.

    Raises:
        DataError: no such file, no lines, or a line from which nothing can be learned.
    """
    candidates = [Path(name), *(folder / name for folder in template_folders())]
    path = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
    if path is None:
        known = sorted(
            {found.name for folder in template_folders() for found in folder.glob("*.txt")}
        )
        raise DataError(f"template {name}: no such file; known in templates/: {', '.join(known)}")
    lines = [line.strip() for line in read_text(path, TEMPLATE_LIMIT).splitlines()]
    places = (*NAME_PLACES, *CAPTION_PLACES) if nameless else NAME_PLACES
    wordless = nameless and not any(_holds(line, places) for line in lines)
    for number, line in enumerate(lines, start=1):
        if line and not wordless and not _holds(line, places):
            problem = (
                "no [filewords] in it, which other lines have; add it or remove the line"
                if nameless
                else "no [name] in it, so the word learns nothing"
            )
            raise DataError(f"{path} line {number}: {problem}")
    filled = tuple(line for line in lines if line)
    if not filled:
        wanted = "[filewords]" if nameless else "[name]"
        raise DataError(f"{path}: no prompts in it; write one per line, each with {wanted}")
    return filled


def words_of_stem(stem: str, captions: CaptionSettings = AS_IT_IS) -> str:
    """A caption from a file name, as in the web UI's data set.

    Leading numbers and dashes go. With `filename_pattern` the caption is what it matches in the
    rest, joined by `filename_join`; of a pattern with groups the whole match counts.
    """
    words = re.sub(r"^[-\d]+\s*", "", stem)
    if not captions.filename_pattern:
        return words
    found = (match.group() for match in re.finditer(captions.filename_pattern, words))
    return captions.filename_join.join(match for match in found if match)


def _holds(line: str, places: tuple[str, ...]) -> bool:
    return any(place in line for place in places)
