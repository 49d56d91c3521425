"""Layers with a subject axis: a pack of S is S separate layers, in outputs and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from disttrain.models.packed import (
    PackedLoRALinear,
    PackedTokenEmbedding,
    linear_layers,
    replace_layer,
)

SUBJECTS, EACH, LENGTH, WIDTH, OUT, RANK, VOCABULARY, VECTORS = 3, 2, 5, 6, 7, 2, 11, 4
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture
def source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def frozen_linear(source: torch.Generator) -> nn.Linear:
    base = nn.Linear(WIDTH, OUT, dtype=torch.float64)
    base.weight = nn.Parameter(drawn(source, OUT, WIDTH), requires_grad=False)
    base.bias = nn.Parameter(drawn(source, OUT), requires_grad=False)
    return base


def frozen_embedding(source: torch.Generator) -> nn.Embedding:
    weight = drawn(source, VOCABULARY, WIDTH)
    return nn.Embedding.from_pretrained(weight, freeze=True)


@pytest.mark.parametrize("subjects", [1, SUBJECTS])
@pytest.mark.parametrize("middle", [(), (LENGTH,), (2, LENGTH)])
def test_lora_pack_equals_separate_layers(
    source: torch.Generator, subjects: int, middle: tuple[int, ...]
) -> None:
    base = frozen_linear(source)
    down, up = drawn(source, subjects, RANK, WIDTH), drawn(source, subjects, OUT, RANK)
    x = drawn(source, subjects * EACH, *middle, WIDTH).requires_grad_()
    pull = drawn(source, subjects * EACH, *middle, OUT)
    pack = PackedLoRALinear(base, down.clone(), up.clone(), alpha=3.0)
    found = pack(x)
    assert found.shape == (subjects * EACH, *middle, OUT)
    (found * pull).sum().backward()
    assert x.grad is not None
    assert pack.down.grad is not None
    assert pack.up.grad is not None
    for s in range(subjects):
        rows = slice(s * EACH, (s + 1) * EACH)
        own = x.detach()[rows].requires_grad_()
        a, b = down[s].clone().requires_grad_(), up[s].clone().requires_grad_()
        alone = own @ base.weight.T + base.bias + 3.0 / RANK * (own @ a.T @ b.T)
        (alone * pull[rows]).sum().backward()
        torch.testing.assert_close(found[rows], alone, **TOLERANCE)
        torch.testing.assert_close(x.grad[rows], own.grad, **TOLERANCE)
        torch.testing.assert_close(pack.down.grad[s], a.grad, **TOLERANCE)
        torch.testing.assert_close(pack.up.grad[s], b.grad, **TOLERANCE)


def test_lora_base_is_neither_trained_nor_changed(source: torch.Generator) -> None:
    base = frozen_linear(source)
    before = base.weight.clone()
    pack = PackedLoRALinear(base, drawn(source, 2, RANK, WIDTH), drawn(source, 2, OUT, RANK), 1.0)
    trainable = {name for name, value in pack.named_parameters() if value.requires_grad}
    assert trainable == {"down", "up"}
    pack(drawn(source, 4, WIDTH)).sum().backward()
    assert base.weight.grad is None
    assert base.bias.grad is None
    assert torch.equal(base.weight, before)
    assert pack.weight is base.weight


def test_lora_with_up_at_zero_is_the_base_to_the_bit(source: torch.Generator) -> None:
    base = frozen_linear(source)
    zero = torch.zeros(2, OUT, RANK, dtype=torch.float64)
    pack = PackedLoRALinear(base, drawn(source, 2, RANK, WIDTH), zero, alpha=8.0)
    x = drawn(source, 4, LENGTH, WIDTH)
    assert torch.equal(pack(x), base(x))


def test_lora_change_is_computed_in_the_dtype_of_the_input(source: torch.Generator) -> None:
    base = frozen_linear(source).to(torch.bfloat16)
    down, up = drawn(source, 2, RANK, WIDTH).float(), drawn(source, 2, OUT, RANK).float()
    pack = PackedLoRALinear(base, down, up, 1.0)
    found = pack(drawn(source, 4, WIDTH).to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert pack.down.grad is not None
    assert pack.down.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((2, RANK, WIDTH), (3, OUT, RANK)),
        ((2, RANK, WIDTH), (2, OUT, RANK + 1)),
        ((2, RANK, WIDTH + 1), (2, OUT, RANK)),
        ((2, RANK, WIDTH), (2, OUT + 1, RANK)),
    ],
)
def test_lora_shapes_that_do_not_fit_are_refused(
    source: torch.Generator, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    with pytest.raises(AssertionError):
        PackedLoRALinear(frozen_linear(source), torch.zeros(down), torch.zeros(up), 1.0)


def test_batches_that_do_not_divide_by_subjects_are_refused(source: torch.Generator) -> None:
    down, up = drawn(source, 3, RANK, WIDTH), drawn(source, 3, OUT, RANK)
    lora = PackedLoRALinear(frozen_linear(source), down, up, 1.0)
    tokens = PackedTokenEmbedding(
        frozen_embedding(source), drawn(source, 3, VECTORS, WIDTH), VOCABULARY
    )
    for rows in (2, 4, 7):
        with pytest.raises(AssertionError, match="as many rows for each subject"):
            lora(drawn(source, rows, WIDTH))
        with pytest.raises(AssertionError, match="as many rows for each subject"):
            tokens(torch.zeros(rows, LENGTH, dtype=torch.long))


@pytest.mark.parametrize("subjects", [1, SUBJECTS])
def test_token_pack_equals_separate_embeddings(source: torch.Generator, subjects: int) -> None:
    base = frozen_embedding(source)
    rows = drawn(source, subjects, VECTORS, WIDTH)
    pack = PackedTokenEmbedding(base, rows.clone(), VOCABULARY)
    high = VOCABULARY + VECTORS
    ids = torch.randint(high, (subjects * EACH, 4 * LENGTH), generator=source)
    assert set(range(VOCABULARY - 1, high)) <= set(ids.flatten().tolist()), "both sides of the edge"
    pull = drawn(source, *ids.shape, WIDTH)
    found = pack(ids)
    (found * pull).sum().backward()
    assert pack.rows.grad is not None
    for s in range(subjects):
        own = slice(s * EACH, (s + 1) * EACH)
        mine = rows[s].clone().requires_grad_()
        alone = nn.functional.embedding(ids[own], torch.cat([base.weight, mine]))
        (alone * pull[own]).sum().backward()
        torch.testing.assert_close(found[own], alone, **TOLERANCE)
        torch.testing.assert_close(pack.rows.grad[s], mine.grad, **TOLERANCE)
    assert base.weight.grad is None


def test_unused_new_tokens_get_no_gradient(source: torch.Generator) -> None:
    """The last known id and the first new one are clamped onto their neighbours on the way."""
    pack = PackedTokenEmbedding(
        frozen_embedding(source), drawn(source, 1, VECTORS, WIDTH), VOCABULARY
    )
    pack(torch.tensor([[VOCABULARY - 1, 0, VOCABULARY + 1]])).sum().backward()
    assert pack.rows.grad is not None
    touched = pack.rows.grad[0].abs().sum(dim=1) > 0
    assert touched.tolist() == [False, True, False, False]


def test_only_new_rows_are_parameters_that_train(source: torch.Generator) -> None:
    base = frozen_embedding(source)
    before = base.weight.clone()
    pack = PackedTokenEmbedding(base, drawn(source, 2, VECTORS, WIDTH), VOCABULARY)
    optimizer = torch.optim.AdamW([p for p in pack.parameters() if p.requires_grad], lr=1.0)
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [
        (2, VECTORS, WIDTH)
    ]
    pack(torch.tensor([[1, VOCABULARY], [2, VOCABULARY + 3]])).sum().backward()
    optimizer.step()
    assert torch.equal(base.weight, before)
    assert pack.weight is base.weight


def test_linear_layers_are_found_by_the_end_of_their_dotted_name() -> None:
    model = nn.ModuleDict(
        {
            "attn": nn.ModuleDict(
                {
                    "to_q": nn.Linear(2, 2),
                    "not_to_q": nn.Linear(2, 2),
                    "to_out": nn.ModuleList([nn.Linear(2, 2), nn.Dropout()]),
                    "to_k": nn.Conv2d(2, 2, 1),
                }
            ),
            "to_q": nn.Linear(2, 2),
        }
    )
    names = [name for name, _ in linear_layers(model, ("to_q", "to_out.0", "to_k"))]
    assert names == ["attn.to_q", "attn.to_out.0", "to_q"]
    for name in names:
        replace_layer(model, name, nn.Identity())
    assert not list(linear_layers(model, ("to_q", "to_out.0")))
    assert isinstance(model["attn"]["to_out"][0], nn.Identity)
    assert isinstance(model["attn"]["not_to_q"], nn.Linear)
