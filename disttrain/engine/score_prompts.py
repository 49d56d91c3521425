"""What is drawn to score a subject: prompts with it, the same without it, and prompts of others.

Pure text, between settings and `scores.py`. Invariant: the list depends on the settings alone, so
every state of a subject is asked for the same pictures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from disttrain.config import METHODS_WITH_CLASS_WORD, FinetuneSettings, RunConfig, SubjectSettings
from disttrain.errors import ConfigError
from disttrain.prompts import USUAL_PROMPT, prompt_plan


@dataclass(frozen=True)
class ScorePrompts:
    """Prompts, filled. `plain[i]` is `subject[i]` in words that the base model knows: the class
    word stands for the token. `told[i]` is what a judge may be told of a picture of `subject[i]`:
    `plain[i]`, or nothing where taking the token out leaves no name."""

    subject: tuple[str, ...]
    plain: tuple[str, ...]
    told: tuple[str, ...]
    sanity: tuple[str, ...]


def score_prompts(config: RunConfig, subject: SubjectSettings) -> ScorePrompts:
    """The prompts of one subject.

    Raises:
        ConfigError: fine-tuning without `score.prompts`: it has no word of its own to ask for.
    """
    score, plan = config.score, prompt_plan(config, subject)
    lines = score.prompts or (_usual(config, subject),)
    usual = "a photo of {class_name}" if subject.class_name else "a photo"
    filled = tuple(plan.fill(line) for line in lines)
    plain = tuple(without_token(text, subject) for text in filled)
    told = tuple(
        text if subject.class_name or text == full else ""
        for text, full in zip(plain, filled, strict=True)
    )
    sanity = tuple(plan.fill(line) for line in score.sanity_prompts or (usual,))
    return ScorePrompts(filled, plain, told, sanity)


def _usual(config: RunConfig, subject: SubjectSettings) -> str:
    own = subject.instance_prompt
    if own and not any(place in own for place in ("{caption}", "[filewords]")):
        return own
    if isinstance(config.method, FinetuneSettings):
        raise ConfigError(
            "score.prompts: empty, and fine-tuning teaches no word to ask for; give some prompts"
        )
    with_class = config.method.name in METHODS_WITH_CLASS_WORD and subject.class_name
    return USUAL_PROMPT if with_class else "a photo of {token}"


def without_token(text: str, subject: SubjectSettings) -> str:
    """A prompt with the class word in place of the token (or of both, where they follow another).

    >>> from disttrain.config import SubjectSettings
    >>> without_token("a photo of sks fox", SubjectSettings("a", "b", "sks", "fox"))
    'a photo of fox'
    """
    if not subject.token:
        return text
    token, name = re.escape(subject.token), re.escape(subject.class_name)
    pattern = rf"(?<!\w){token}(?!\w)" + (rf"(?:\s+{name}(?!\w))?" if name else "")
    replaced = re.sub(pattern, lambda _: subject.class_name, text, flags=re.IGNORECASE)
    return " ".join(replaced.split())
