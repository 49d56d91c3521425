"""From a subject's words to the text of each training prompt.

Second link of the pipeline, pure text: settings and templates/ go in, prompts come out. Invariant:
the prompt of a sample is a function of (seed, subject, draw index, caption) alone.

Two spellings mean the same: `{token}`, `{class_name}`, `{caption}` of a config, and `[name]`,
`[filewords]` of the web UI's template files. `[name]` is the token, followed by the class word for
the methods that need one (LoRA and DreamBooth), because there the token alone is a rare word
without a meaning of its own.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from disttrain import randomness
from disttrain.config import METHODS_WITH_CLASS_WORD, RunConfig, SubjectSettings
from disttrain.errors import DataError
from disttrain.files import read_text

TEMPLATE_LIMIT = 2**20
USUAL_PROMPT = "a photo of {token} {class_name}"
USUAL_TEMPLATE = "subject.txt"


@dataclass(frozen=True)
class PromptPlan:
    """The lines a subject's training prompts are drawn from, and the words that fill them."""

    lines: tuple[str, ...]
    token: str
    class_name: str
    name: str
    """What `[name]` stands for."""

    @property
    def uses_captions(self) -> bool:
        """Whether any line has a place for the picture's caption."""
        return any("{caption}" in line or "[filewords]" in line for line in self.lines)

    def fill(self, line: str, caption: str = "") -> str:
        """`line` with its words in place; the caption goes first, so it may hold `[name]` too."""
        text = line.replace("{caption}", caption).replace("[filewords]", caption)
        text = text.replace("{token}", self.token).replace("{class_name}", self.class_name)
        return text.replace("[name]", self.name)

    def prompt(self, seed: int, subject: str, index: int, caption: str) -> str:
        """The prompt of draw `index`: one line, drawn uniformly, filled."""
        choice = randomness.integer(len(self.lines), seed, (subject, "template"), index)
        return self.fill(self.lines[choice], caption)


def prompt_plan(config: RunConfig, subject: SubjectSettings) -> PromptPlan:
    """The prompt plan of one subject.

    Raises:
        DataError: a template that is missing, empty, or has a line without `[name]`.
    """
    with_class = config.method.name in METHODS_WITH_CLASS_WORD
    name = f"{subject.token} {subject.class_name}".strip() if with_class else subject.token
    if subject.template:
        lines = read_template(subject.template)
    elif subject.instance_prompt:
        lines = (subject.instance_prompt,)
    else:
        lines = (USUAL_PROMPT,) if with_class else read_template(USUAL_TEMPLATE)
    return PromptPlan(lines, subject.token, subject.class_name, name)


def template_folders() -> list[Path]:
    """Where a template's bare name is looked up, in order."""
    package = Path(__file__).parent
    return [Path("templates"), package / "templates", package.parent / "templates"]


def read_template(name: str) -> tuple[str, ...]:
    """The lines of a template file, given as a path or as the name of a file in templates/.

    Raises:
        DataError: no such file, no lines, or a line that does not hold the subject's name.
    """
    candidates = [Path(name), *(folder / name for folder in template_folders())]
    path = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
    if path is None:
        known = sorted(
            {found.name for folder in template_folders() for found in folder.glob("*.txt")}
        )
        raise DataError(f"template {name}: no such file; known in templates/: {', '.join(known)}")
    lines = [line.strip() for line in read_text(path, TEMPLATE_LIMIT).splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and "[name]" not in line and "{token}" not in line:
            raise DataError(f"{path} line {number}: no [name] in it, so the word learns nothing")
    filled = tuple(line for line in lines if line)
    if not filled:
        raise DataError(f"{path}: no prompts in it; write one per line, each with [name]")
    return filled


def words_of_stem(stem: str) -> str:
    """A caption from a file name: leading numbers and dashes go, as in the web UI's data set."""
    return re.sub(r"^[-\d]+\s*", "", stem)
