"""Embedding files: stock diffusers gets the same rows and ids; everybody's files are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from disttrain.errors import ModelError
from disttrain.formats import embedding
from disttrain.formats.embedding import read_embedding, write_embedding
from disttrain.models.base import load_base

WIDTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("embedding") / "model"
    load_base("tiny").save(place)
    return place


def drawn(rows: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("token", ["<fox>", "ffoxx"])
def test_stock_pipeline_gets_the_rows_and_ids(folder, tmp_path, rows, token):
    vectors = drawn(rows)
    write_embedding(tmp_path / "fox.safetensors", token, vectors, {"step": "12"})
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    before = pipeline.text_encoder.get_input_embeddings().weight.clone()
    pipeline.load_textual_inversion(tmp_path / "fox.safetensors")
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert table.shape == (49408 + rows, WIDTH)
    assert torch.equal(table[49408:], vectors)
    assert torch.equal(table[:49408], before)
    prompt = pipeline.maybe_convert_prompt(f"a photo of {token} here", pipeline.tokenizer)
    ids = pipeline.tokenizer(prompt).input_ids
    new = list(range(49408, 49408 + rows))
    assert ids == [49406, 320, 1125, 539, *new, 763, 49407]


def test_the_file(tmp_path):
    path = tmp_path / "fox.safetensors"
    write_embedding(path, "<fox>", drawn(3).half(), {"step": "12", "base_model": "tiny"})
    tensors = load_file(path)
    assert list(tensors) == ["<fox>"]
    assert tensors["<fox>"].dtype == torch.float32
    assert torch.equal(tensors["<fox>"], drawn(3).half().float())
    with safe_open(path, framework="pt") as archive:
        assert archive.metadata() == {"format": "pt", "step": "12", "base_model": "tiny"}
    found = read_embedding(path)
    assert (found.name, found.step) == ("<fox>", 12)
    assert torch.equal(found.vectors, tensors["<fox>"])
    first = path.read_bytes()
    write_embedding(path, "<fox>", drawn(3).half(), {"base_model": "tiny", "step": "12"})
    assert path.read_bytes() == first


def test_vectors_with_gradient_or_strides(tmp_path):
    path = tmp_path / "fox.safetensors"
    vectors = torch.nn.Parameter(drawn(64, 3).T.contiguous().T[:3])
    write_embedding(path, "<fox>", vectors)
    assert torch.equal(read_embedding(path).vectors, vectors.detach())
    assert read_embedding(path).step is None


def webui(vectors, **changes):
    """What the web UI's own training saves."""
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": "fox-500",
        "step": 499,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    return {**content, **changes}


READ = {
    "webui": (webui(drawn(2)), "fox-500", 499),
    "webui with gradient": (webui(torch.nn.Parameter(drawn(2))), "fox-500", 499),
    "webui, no name": (webui(drawn(2), name=None, step=None), "file", None),
    "original": (
        {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(drawn(2))}),
        },
        "file",
        None,
    ),
    "diffusers": ({"<fox>": drawn(2)}, "<fox>", None),
    "half": ({"<fox>": drawn(2).half()}, "<fox>", None),
    "one vector": ({"<fox>": drawn(1)[0]}, "<fox>", None),
    "bare tensor": (drawn(2), "file", None),
}


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_torch_files_of_others(tmp_path, what, suffix):
    content, name, step = READ[what]
    torch.save(content, tmp_path / f"file{suffix}")
    found = read_embedding(tmp_path / f"file{suffix}")
    rows = 1 if what == "one vector" else 2
    expected = drawn(rows).half().float() if what == "half" else drawn(rows)
    assert torch.equal(found.vectors, expected)
    assert found.vectors.dtype == torch.float32
    assert not found.vectors.requires_grad
    assert (found.name, found.step) == (name, step)


def test_old_torch_container(tmp_path):
    torch.save(webui(drawn(2)), tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_embedding(tmp_path / "file.pt").vectors, drawn(2))


def test_kohyas_file_is_called_by_its_name(tmp_path):
    save_file({"emb_params": drawn(4, 1024)}, tmp_path / "my fox.safetensors")
    found = read_embedding(tmp_path / "my fox.safetensors")
    assert found.name == "my fox"
    assert torch.equal(found.vectors, drawn(4, 1024))


WRONG = {
    "sdxl": ({"clip_l": drawn(2), "clip_g": drawn(2)}, "made for SDXL"),
    "two": ({"a": drawn(2), "b": drawn(2)}, "an embedding has one tensor, this has 2 entries"),
    "none": ({}, "this has 0 entries"),
    "shape": ({"a": torch.ones(2, 2, 2)}, "its tensor of shape (2, 2, 2) is no list"),
    "empty": ({"a": torch.ones(0, 4)}, "its tensor of shape (0, 4) is no list"),
    "integers": ({"a": torch.ones(2, 4, dtype=torch.int64)}, "is no list of token vectors"),
    "nan": ({"a": torch.full((1, 4), float("nan"))}, "not finite"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_other_files_are_told_in_one_line(tmp_path, what, suffix):
    content, message = WRONG[what]
    path = tmp_path / f"file{suffix}"
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    with pytest.raises(ModelError) as caught:
        read_embedding(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [[1], "text", {"a": 1}, webui(5), webui({"*": 1}), webui({}), {1: {2: 3}}]
)
def test_other_torch_content(tmp_path, content):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ModelError, match=r"file\.pt"):
        read_embedding(tmp_path / "file.pt")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(webui(drawn(1), name=Hostile()), "file.pt")
    with pytest.raises(ModelError, match="could run code"):
        read_embedding(Path("file.pt"))
    assert not Path("pwned").exists()


def test_damaged_and_missing_files(tmp_path):
    torch.save(webui(drawn(2)), tmp_path / "file.pt")
    write_embedding(tmp_path / "file.safetensors", "<fox>", drawn(2))
    for path in (tmp_path / "file.pt", tmp_path / "file.safetensors"):
        content = path.read_bytes()
        for size in (0, 1, 9, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            with pytest.raises(ModelError, match="file"):
                read_embedding(path)
        path.unlink()
        with pytest.raises(ModelError, match="cannot be read"):
            read_embedding(path)
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"an embedding is one of \.safetensors"):
        read_embedding(tmp_path / "file.txt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_mutated_files_never_give_a_traceback(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    if suffix == ".pt":
        torch.save(webui(drawn(2, 8)), path)
    else:
        write_embedding(path, "<fox>", drawn(2, 8))
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        spoiled = bytearray(content)
        for _ in range(3):
            place, value = torch.randint(0, 2**31, (2,), generator=generator).tolist()
            spoiled[place % len(content)] = value % 256
        path.write_bytes(spoiled)
        try:
            assert torch.isfinite(read_embedding(path).vectors).all()
        except ModelError:
            refused += 1
    assert refused > 30


def test_what_cannot_be_used_is_not_written(tmp_path):
    with pytest.raises(ModelError, match="not finite"):
        write_embedding(tmp_path / "fox.safetensors", "<fox>", torch.full((1, 4), float("inf")))
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_what_was_given_does_not_stay(tmp_path, monkeypatch):
    """A disk that flips one bit."""
    real = embedding.write_bytes

    def flipping(path, data):
        spoiled = bytearray(data)
        spoiled[-3] ^= 1
        real(path, bytes(spoiled))

    monkeypatch.setattr(embedding, "write_bytes", flipping)
    with pytest.raises(ModelError, match="was not the same when read back"):
        write_embedding(tmp_path / "fox.safetensors", "<fox>", drawn(1))
    assert not list(tmp_path.iterdir())
