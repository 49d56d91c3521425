"""Scores subjects while they train: the yardstick of each, and the scores of their present state.

Between a pack and `history.py`. Rank zero draws and measures inside `Pack.whole`; the numbers go to
all ranks, so all decide alike. Invariant: scores are a function of a subject's weights and its
yardstick, and nothing that trains changes, so scoring a state again gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from disttrain import schema
from disttrain.config import RunConfig
from disttrain.engine.artist import Ask, Drawn, each_with_each
from disttrain.engine.compared_pictures import as_base_keeps, compared_pictures, draw_settings
from disttrain.engine.distributed import Mesh
from disttrain.engine.pack import Pack
from disttrain.engine.pack_drawing import draw_anywhere, draw_for_slots, open_vae
from disttrain.engine.score_prompts import ScorePrompts, score_prompts
from disttrain.engine.scores import Compared, Scores, Yardstick, scores_of
from disttrain.engine.slot import Slot
from disttrain.errors import ModelError
from disttrain.files import digest_of
from disttrain.models.encoders import open_encoder
from disttrain.models.features import FeatureEncoder
from disttrain.models.sampler import DrawSettings

WORST = Scores(subject=-1.0, subject_error=0.0, diversity=None, drift=2.0)
"""Of a state that draws numbers that are not finite."""


class Examiner:
    """Every rank calls every method."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._encoders: dict[str, FeatureEncoder] = {}
        self._wanted: dict[str, np.ndarray] = {}
        """Pictures of each subject, on rank zero, until it is admitted."""
        self._yardsticks: dict[str, Yardstick] = {}
        """By subject, on rank zero."""
        self._admitted: set[str] = set()

    def check(self, config: RunConfig) -> None:
        """Refuse features that cannot be had.

        Raises:
            UserError: naming what is missing.
        """

        def check() -> None:
            self._encoder(config)

        self.mesh.on_rank_zero(check)

    def know(self, member: RunConfig) -> str:
        """Look at the pictures that a subject will be compared with; returns the digest of all that
        it is measured against.

        Raises:
            UserError: pictures that cannot be read, or features that cannot be had.
        """

        def look() -> str:
            self._encoder(member)
            against, pictures = compared_pictures(member)
            self._wanted[member.subjects[0].name] = pictures
            prompts = _prompts(member)
            how = schema.to_mapping(member)["score"]
            asked = [prompts.subject, prompts.sanity]
            return digest_of([how, asked, against.held_out, against.digest, against.pictures])

        return self.mesh.on_rank_zero(look)

    def admit(self, pack: Pack, slots: Sequence[Slot]) -> None:
        """Draw what the base draws for those of these slots that are new, before they enter a pack;
        forget the others that were known.

        Raises:
            ModelError: the base draws numbers that are not finite.
        """
        names = {slot.name for slot in slots}
        new = [slot for slot in slots if slot.name not in self._admitted]
        self._admitted = names

        def draw() -> None:
            for gone in self._yardsticks.keys() - names:
                del self._yardsticks[gone]
            drifting = [slot for slot in new if pack.method.new_vectors(0) is None]
            with pack.method.untouched():
                untouched = self._untouched(pack, drifting)
            vae = open_vae(pack)
            for slot in new:
                score, encoder = slot.config.score, self._encoder(slot.config)
                wanted = as_base_keeps(slot.config, self._wanted[slot.name], vae)
                self._yardsticks[slot.name] = Yardstick(
                    prompts=_prompts(slot.config),
                    pictures=score.pictures,
                    seed=score.seed,
                    main=Compared(encoder, encoder.encode(wanted)),
                    untouched=untouched.get(slot.name, np.empty((0, 0))),
                )

        if new:
            with pack.whole():
                self.mesh.on_rank_zero(draw)
        self._wanted.clear()  # also those whose subjects were refused since

    def examine(self, pack: Pack, slots: Sequence[Slot]) -> list[Scores]:
        """The scores of these slots' subjects as they are now."""
        with pack.whole():
            return self.mesh.on_rank_zero(lambda: self._measure(pack, slots))

    def _encoder(self, member: RunConfig) -> FeatureEncoder:
        spec = member.score.features
        if spec not in self._encoders:
            self._encoders[spec] = open_encoder(spec, self.mesh.device)
        return self._encoders[spec]

    def _untouched(self, pack: Pack, slots: Sequence[Slot]) -> dict[str, np.ndarray]:
        """Features of what the base draws for the sanity prompts of each; alike ones once."""
        found: dict[str, np.ndarray] = {}
        for settings, own in _by_settings(pack, slots).items():
            asked = {slot.name: _asks(slot.config, sanity=True) for slot in own}
            once = list(dict.fromkeys(ask for asks in asked.values() for ask in asks))
            drawn = draw_anywhere(pack, once, settings)
            if drawn is None:
                raise ModelError(
                    f"base_model: {pack.config.base_model} draws numbers that are not finite; "
                    "train.early_stop needs one that can draw"
                )
            place = {ask: row for row, ask in enumerate(once)}
            for slot in own:
                rows = [place[ask] for ask in asked[slot.name]]
                found[slot.name] = self._encoder(slot.config).encode(drawn.pictures[rows])
        return found

    def _measure(self, pack: Pack, slots: Sequence[Slot]) -> list[Scores]:
        found: dict[str, Scores] = {}
        for settings, own in _by_settings(pack, slots).items():
            asked: list[list[Ask]] = [[] for _ in pack.slots]
            for slot in own:
                index = pack.slots.index(slot)
                asked[index] = _asks(slot.config)
                if pack.method.new_vectors(index) is None:
                    asked[index] += _asks(slot.config, sanity=True)
            drawn = draw_for_slots(pack, asked, settings)
            for slot in own:
                index = pack.slots.index(slot)
                found[slot.name] = self._scores(pack, slot, index, drawn[index])
        return [found[slot.name] for slot in slots]

    def _scores(self, pack: Pack, slot: Slot, index: int, drawn: Drawn | None) -> Scores:
        if drawn is None:
            return WORST
        word = pack.method.new_vectors(index)
        count = len(_asks(slot.config))
        parts = [
            Drawn(drawn.pictures[rows], drawn.latents[rows])
            for rows in (slice(count), slice(count, None))
        ]
        return scores_of(
            self._yardsticks[slot.name],
            parts[0],
            parts[1] if word is None else None,
            vectors=None if word is None else word.vectors,
            vocabulary=None if word is None else word.vocabulary,
        )


def _prompts(member: RunConfig) -> ScorePrompts:
    return score_prompts(member, member.subjects[0])


def _asks(member: RunConfig, sanity: bool = False) -> list[Ask]:
    """What a subject's scores are made of."""
    prompts, score = _prompts(member), member.score
    texts = prompts.sanity if sanity else prompts.subject
    return each_with_each(texts, score.pictures, score.seed)


def _by_settings(pack: Pack, slots: Sequence[Slot]) -> Mapping[DrawSettings, list[Slot]]:
    """The slots that are drawn alike, and so together."""
    found: dict[DrawSettings, list[Slot]] = {}
    for slot in slots:
        found.setdefault(draw_settings(slot.config, pack.base), []).append(slot)
    return found
