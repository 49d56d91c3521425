"""Contexts on disk: the same bits as without, computed once, shared by ranks without waiting."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel

from disttrain.data import tensor_store
from disttrain.engine.text_cache import open_context_store, prepare_contexts
from disttrain.models.base import load_base
from disttrain.models.parts import BaseModel
from disttrain.models.text import ContextCache, PromptTokenizer, text_encoder_digest

PROMPTS = ["a red fox", "", "a fox in the snow", "a fox in the rain", "two owls, at night"]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base("tiny")


class Counted(ContextCache):
    """Counts what is computed; stops after a number of them."""

    computed = 0
    stop_after = -1

    def compute(self, ids: torch.Tensor) -> torch.Tensor:
        if self.computed == self.stop_after:
            raise KeyboardInterrupt
        self.computed += 1
        return super().compute(ids)


def plain(base: BaseModel, text_encoder: CLIPTextModel | None = None, limit: int = 4096) -> Counted:
    return Counted(PromptTokenizer(base.tokenizer), text_encoder or base.text_encoder, limit)


def stored(
    base: BaseModel, folder: Path, text_encoder: CLIPTextModel | None = None, limit: int = 4096
) -> Counted:
    contexts = plain(base, text_encoder, limit)
    open_context_store(folder, contexts)
    return contexts


def test_contexts_have_the_same_bits_with_and_without_a_store(base, tmp_path):
    expected = plain(base).get(PROMPTS)
    assert expected.shape == (5, 77, base.text_encoder.config.hidden_size)
    told = []
    writer = stored(base, tmp_path)
    assert prepare_contexts(writer, PROMPTS, progress=lambda *done: told.append(done)) == 5
    assert told == [(done, 5) for done in range(1, 6)]
    for limit in (4096, 1):
        reader = stored(base, tmp_path, limit=limit)
        assert torch.equal(reader.get(PROMPTS), expected)
        assert torch.equal(reader.get(PROMPTS[::-1]), expected.flip(0))
        assert reader.computed == 0


def test_a_second_call_computes_nothing(base, tmp_path):
    assert prepare_contexts(stored(base, tmp_path), PROMPTS) == 5
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = stored(base, tmp_path)
    assert prepare_contexts(again, iter(PROMPTS)) == 0
    assert prepare_contexts(again, [*PROMPTS, "one more"]) == 1
    assert again.computed == 1
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()


def test_what_is_not_there_is_computed_when_needed_and_not_written(base, tmp_path):
    contexts = stored(base, tmp_path)
    assert torch.equal(contexts.get(PROMPTS), plain(base).get(PROMPTS))
    assert contexts.computed == 5
    assert not list(tmp_path.iterdir())


def test_ranks_share_prompts_and_do_not_wait(base, tmp_path):
    ranks = [stored(base, tmp_path / "cache") for _ in range(3)]
    counts = [
        prepare_contexts(contexts, PROMPTS, rank=rank, world=3)
        for rank, contexts in enumerate(ranks)
    ]
    assert counts == [2, 2, 1]
    expected = plain(base).get(PROMPTS)
    assert all(torch.equal(contexts.get(PROMPTS), expected) for contexts in ranks)
    assert [contexts.computed for contexts in ranks] == [5, 3, 1], "of later ranks computed again"
    assert prepare_contexts(stored(base, tmp_path / "cache"), PROMPTS) == 0
    alone = stored(base, tmp_path / "alone")
    assert prepare_contexts(alone, PROMPTS, rank=1, world=3) == 2, "nobody else ever comes"
    assert prepare_contexts(stored(base, tmp_path / "more"), PROMPTS, rank=7, world=8) == 0


def test_an_interrupted_call_is_continued(base, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "ITEMS_PER_FILE", 2)
    contexts = stored(base, tmp_path)
    contexts.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        prepare_contexts(contexts, PROMPTS)
    assert len(list(tmp_path.iterdir())) == 2
    again = stored(base, tmp_path)
    assert prepare_contexts(again, PROMPTS) == 2
    assert torch.equal(again.get(PROMPTS), plain(base).get(PROMPTS))


def test_damaged_contexts_are_computed_again(base, tmp_path):
    prepare_contexts(stored(base, tmp_path), PROMPTS)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    contexts = stored(base, tmp_path)
    assert torch.equal(contexts.get(PROMPTS), plain(base).get(PROMPTS))
    assert contexts.computed == 1
    assert prepare_contexts(stored(base, tmp_path), PROMPTS) == 1
    path.write_bytes(b"text")
    assert prepare_contexts(stored(base, tmp_path), PROMPTS) == 4


def test_prompts_of_equal_ids_are_kept_once(base, tmp_path):
    long = "word " * 200
    same = ["a fox", "A  Fox", long, long + "more"]
    assert prepare_contexts(stored(base, tmp_path), same) == 2
    contexts = stored(base, tmp_path)
    assert torch.equal(contexts.get(same), plain(base).get(same))
    assert contexts.computed == 0


def test_prompts_beyond_the_limit_are_left_for_later(base, tmp_path):
    contexts = stored(base, tmp_path)
    assert prepare_contexts(contexts, (f"fox {i}" for i in range(10**9)), most=4) == 4
    assert contexts.computed == 4


def test_another_text_encoder_finds_nothing(base, tmp_path):
    prepare_contexts(stored(base, tmp_path), PROMPTS)
    other = copy.deepcopy(base.text_encoder)
    assert prepare_contexts(stored(base, tmp_path, other), PROMPTS) == 0, "a copy is the same"
    with torch.no_grad():
        next(iter(other.parameters()))[0, 0] += 1
    changed = stored(base, tmp_path, other)
    assert torch.equal(changed.get(PROMPTS), plain(base, other).get(PROMPTS))
    assert changed.computed == 5
    half = copy.deepcopy(base.text_encoder).to(torch.bfloat16)
    assert prepare_contexts(stored(base, tmp_path, half), PROMPTS) == 5
    reader = stored(base, tmp_path, half)
    found = reader.get(PROMPTS)
    assert reader.computed == 0
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, plain(base, half).get(PROMPTS))


def test_the_digest_of_a_text_encoder_is_of_all_that_it_computes_with(base):
    original = text_encoder_digest(base.text_encoder)
    assert text_encoder_digest(copy.deepcopy(base.text_encoder)) == original
    for name in dict(base.text_encoder.named_parameters()):
        other = copy.deepcopy(base.text_encoder)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1
        assert text_encoder_digest(other) != original, name
    other = copy.deepcopy(base.text_encoder)
    other.config.hidden_act = "gelu"
    assert text_encoder_digest(other) != original


def test_contexts_do_not_depend_on_who_asks_first(base):
    expected = plain(base).get(PROMPTS)
    contexts = plain(base)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contexts.get(PROMPTS), expected)
    assert not contexts.get(PROMPTS).requires_grad
