"""The cache of latents: right content, shared work, damage, interruption, stalled neighbours."""

import json
import logging
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import encoded, make_folder, noise

from disttrain import files
from disttrain.data import images, tensor_store
from disttrain.data.latents import LatentCache, Variants
from disttrain.data.shards import write_shards
from disttrain.data.source import SampleRecord, open_source
from disttrain.data.window import fit
from disttrain.errors import DataError

VAE = "ab" * 32


class Encoder:
    """A deterministic stand-in for the autoencoder's encoder that depends on every pixel."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls, self.stop_after = 0, stop_after
        self.seen: list[torch.Tensor] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        self.seen.append(pixels)
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([small, small.square(), small.sin()[:, :2]], dim=1)


def cache_of(folder: Path, cache: Path, **options) -> LatentCache:
    settings = {"variants": Variants(), "resolution": 16, "vae_digest": VAE} | options
    return LatentCache(open_source(folder), cache, **settings)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "foxes", 5)


def expected(
    folder: Path,
    sample: int,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    size: tuple[int, int] = (16, 16),
) -> torch.Tensor:
    data = open_source(folder).read(sample)
    pixels = fit(images.decode(data, "x").pixels, size[0], size[1], crop, flip)
    values = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    return Encoder()(values)[0]


def test_moments_are_those_of_the_picture(folder, tmp_path):
    cache = cache_of(folder, tmp_path / "cache")
    encode = Encoder()
    assert cache.missing() == 5
    assert cache.prepare(encode) == 5
    assert cache.missing() == 0
    for sample in range(5):
        found = cache.get(sample, 0)
        assert found.shape == (8, 2, 2)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected(folder, sample), rtol=0, atol=0)
    for pixels in encode.seen:
        assert pixels.shape == (1, 3, 16, 16), "one at a time, so that bits do not depend on others"
        assert pixels.min() >= -1
        assert pixels.max() <= 1


def test_other_sizes_than_squares(folder, tmp_path):
    cache = cache_of(folder, tmp_path / "cache", resolution=(16, 24))
    cache.prepare(Encoder())
    torch.testing.assert_close(cache.get(3, 0), expected(folder, 3, size=(16, 24)), rtol=0, atol=0)
    assert {path.name[:18] for path in (tmp_path / "cache").iterdir()} == {f"{VAE[:12]}-16x24"}


def test_variants(folder, tmp_path):
    variants = Variants(crops=3, random=True, flip=True)
    assert variants.count == 6
    cache = cache_of(folder, tmp_path / "cache", variants=variants)
    assert cache.prepare(Encoder()) == 30
    record = open_source(folder).records[2]
    crops = [variants.placement(record, variant, 16, 16) for variant in range(6)]
    assert [flip for _, flip in crops] == [False] * 3 + [True] * 3
    assert [place for place, _ in crops[:3]] == [place for place, _ in crops[3:]]
    assert {place[0] for place, _ in crops} == {0.5}, "the pictures are wide: no slack downwards"
    assert len({place[1] for place, _ in crops}) == 3
    for variant, (place, flip) in enumerate(crops):
        found = cache.get(2, variant)
        torch.testing.assert_close(found, expected(folder, 2, place, flip), rtol=0, atol=0)


def test_placement_depends_on_content_alone():
    wide = SampleRecord("a", "1" * 64, None, 40, 20)
    variants = Variants(crops=4, random=True)
    places = [variants.placement(wide, variant, 16, 16)[0] for variant in range(4)]
    renamed = SampleRecord("b", "1" * 64, "caption", 40, 20)
    assert places == [variants.placement(renamed, variant, 16, 16)[0] for variant in range(4)]
    more = Variants(crops=9, random=True, flip=True)
    assert places == [more.placement(wide, variant, 16, 16)[0] for variant in range(4)]
    other = SampleRecord("a", "2" * 64, None, 40, 20)
    assert places != [variants.placement(other, variant, 16, 16)[0] for variant in range(4)]
    tall = SampleRecord("a", "1" * 64, None, 20, 40)
    assert variants.placement(tall, 0, 16, 16)[0] == (
        variants.placement(tall, 0, 16, 16)[0][0],
        0.5,
    )
    assert variants.placement(tall, 0, 16, 16)[0][0] != 0.5
    assert variants.placement(tall, 0, 32, 16)[0] == (0.5, 0.5)
    assert Variants().placement(wide, 0, 16, 16) == ((0.5, 0.5), False)


def test_equal_windows_and_equal_pictures_are_encoded_once(tmp_path):
    folder = tmp_path / "foxes"
    folder.mkdir()
    for name, seed in [("a", 0), ("b", 1), ("c", 0)]:
        (folder / f"{name}.png").write_bytes(encoded(noise(32, 32, seed=seed)))
    cache = cache_of(folder, tmp_path / "cache", variants=Variants(crops=4, random=True))
    assert cache.prepare(Encoder()) == 2
    assert torch.equal(cache.get(0, 3), cache.get(2, 1))


def test_a_second_run_computes_nothing(folder, tmp_path):
    cache_of(folder, tmp_path / "cache").prepare(Encoder())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = cache_of(folder, tmp_path / "cache")
    assert again.missing() == 0
    assert again.prepare(Encoder(stop_after=0)) == 0
    torch.testing.assert_close(again.get(1, 0), expected(folder, 1), rtol=0, atol=0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before


def test_content_is_shared_by_subjects_folders_and_shards(folder, tmp_path):
    cache_of(folder, tmp_path / "cache").prepare(Encoder())
    index = write_shards(folder, tmp_path / "shards", samples_per_shard=2)
    assert cache_of(index, tmp_path / "cache").prepare(Encoder(stop_after=0)) == 0
    (folder / "fox-1.png").write_bytes(encoded(noise(24, 32, seed=77)))
    (folder / "fox-0.jpg").rename(folder / "renamed.jpg")
    assert cache_of(folder, tmp_path / "cache").prepare(Encoder()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 24},
        {"resolution": (16, 24)},
        {"vae_digest": "c" * 64},
        {"vae_digest": VAE[:12] + "0" * 52},
        {"variants": Variants(random=True)},
    ],
)
def test_what_matters_is_part_of_the_key(folder, tmp_path, change):
    cache_of(folder, tmp_path / "cache").prepare(Encoder())
    other = cache_of(folder, tmp_path / "cache", **change)
    assert other.prepare(Encoder()) == 5
    assert cache_of(folder, tmp_path / "cache").prepare(Encoder()) == 0
    assert cache_of(folder, tmp_path / "cache", **change).prepare(Encoder()) == 0


def test_an_interrupted_run_keeps_what_it_has(folder, tmp_path):
    variants = Variants(crops=2, random=True)
    cache = cache_of(folder, tmp_path / "cache", variants=variants)
    with pytest.raises(KeyboardInterrupt):
        cache.prepare(Encoder(stop_after=3))
    again = cache_of(folder, tmp_path / "cache", variants=variants)
    assert again.missing() == 7
    assert again.prepare(Encoder()) == 7
    reference = cache_of(folder, tmp_path / "other", variants=variants)
    reference.prepare(Encoder())
    for sample in range(5):
        for variant in range(2):
            assert torch.equal(again.get(sample, variant), reference.get(sample, variant))


def test_long_work_is_written_in_pieces(folder, tmp_path, monkeypatch):
    variants = Variants(crops=2, random=True)
    monkeypatch.setattr(tensor_store, "ITEMS_PER_FILE", 4)
    cache_of(folder, tmp_path / "a", variants=variants).prepare(Encoder())
    assert len(list((tmp_path / "a").iterdir())) == 3
    monkeypatch.setattr(tensor_store, "SECONDS_PER_FILE", 0.0)
    told = []
    cache = cache_of(folder, tmp_path / "b", variants=variants)
    cache.prepare(Encoder(), progress=lambda done, total: told.append((done, total)))
    assert len(list((tmp_path / "b").iterdir())) == 10
    assert told == [(done, 10) for done in range(1, 11)]


def test_values_are_kept_in_memory_within_the_limit(folder, tmp_path):
    cache_of(folder, tmp_path / "cache").prepare(Encoder())
    item = 8 * 2 * 2 * 4
    cache = cache_of(folder, tmp_path / "cache", memory_limit=2 * item)
    cache.prepare(Encoder())
    kept = [cache.get(sample, 0) is cache.get(sample, 0) for sample in range(5)]
    assert kept == [True, True, False, False, False]
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    torch.testing.assert_close(cache.get(1, 0), expected(folder, 1), rtol=0, atol=0)
    with pytest.raises(DataError, match="1 latents are missing, of fox-3"):
        cache.get(3, 0)


def test_asking_before_preparing_is_refused_at_once(folder, tmp_path):
    start = time.monotonic()
    with pytest.raises(DataError, match="latents are missing"):
        cache_of(folder, tmp_path / "cache").get(0, 0)
    assert time.monotonic() - start < 5


# Damage


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", ["header", "cut", "empty", "text", "values", "metadata", "digest"]
)
def test_damaged_files_are_never_trusted(folder, tmp_path, caplog, damage):
    cache_of(folder, tmp_path / "cache").prepare(Encoder())
    (path,) = (tmp_path / "cache").iterdir()
    data = path.read_bytes()
    if damage == "header":
        flip_byte(path, 2)
    elif damage == "cut":
        path.write_bytes(data[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("hello")
    elif damage == "values":
        flip_byte(path, len(data) - 1)
    elif damage == "metadata":
        path.write_bytes(data.replace(b"digests", b"digestz"))
    else:
        place = data.index(b'\\": \\"') + 8
        path.write_bytes(
            data[:place] + (b"0" if data[place : place + 1] != b"0" else b"1") + data[place + 1 :]
        )
    encode = Encoder()
    with caplog.at_level(logging.WARNING):
        again = cache_of(folder, tmp_path / "cache")
        again.prepare(encode)
    assert encode.calls == (1 if damage in ("values", "digest") else 5)
    assert path.name in caplog.text
    assert "ignored" in caplog.text
    for sample in range(5):
        torch.testing.assert_close(again.get(sample, 0), expected(folder, sample), rtol=0, atol=0)
    third = Encoder()
    cache_of(folder, tmp_path / "cache").prepare(third)
    assert third.calls == 0, "the replacement is found beside the damaged file"


def test_random_damage_never_gets_through(folder, tmp_path):
    cache_of(folder, tmp_path / "cache").prepare(Encoder())
    (path,) = (tmp_path / "cache").iterdir()
    original = path.read_bytes()
    truth = [expected(folder, sample) for sample in range(5)]
    draw = np.random.default_rng(3)
    again = 0
    for _ in range(150):
        data = bytearray(original)
        reach = len(data) if draw.random() < 0.5 else 1200
        for place in draw.integers(0, reach, draw.choice([1, 3, 20])):
            data[place] = draw.integers(256)
        path.write_bytes(data if draw.random() < 0.9 else data[: draw.integers(len(data))])
        cache = cache_of(folder, tmp_path / "cache")
        again += cache.prepare(Encoder())
        assert all(torch.equal(cache.get(sample, 0), truth[sample]) for sample in range(5))
        for left in (tmp_path / "cache").iterdir():
            left.unlink()
    assert again > 150


def test_damage_after_preparing_is_refused(folder, tmp_path):
    cache = cache_of(folder, tmp_path / "cache", memory_limit=0)
    cache.prepare(Encoder())
    (path,) = (tmp_path / "cache").iterdir()
    data = bytearray(path.read_bytes())
    data[-5 * 128 :] = bytes(5 * 128)
    path.write_bytes(data)
    with pytest.raises(DataError, match="latents are missing, of fox-2"):
        cache.get(2, 0)
    path.write_bytes(data[:-10])
    with pytest.raises(DataError, match="latents are missing, of fox-3"):
        cache.get(3, 0)


def test_values_that_are_not_finite_are_refused(folder, tmp_path):
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return Encoder()(pixels) / 0

    with pytest.raises(DataError, match="fox-0: the autoencoder gives values that are not finite"):
        cache_of(folder, tmp_path / "cache").prepare(encode)
    assert not list((tmp_path / "cache").glob("*"))


# Damaged pictures


class Partly:
    """A source of which some pictures read as other bytes, or not at all."""

    def __init__(self, folder: Path, damage: dict[int, bytes | None]) -> None:
        self.whole, self.damage = open_source(folder), damage
        self.records, self.where = self.whole.records, self.whole.where
        self.digest, self.ignored = self.whole.digest, self.whole.ignored
        self.damaged, self.sizes = self.whole.damaged, self.whole.sizes
        self.shapes = self.whole.shapes
        self.asked: list[int] = []

    def read(self, index: int) -> bytes:
        self.asked.append(index)
        if index not in self.damage:
            return self.whole.read(index)
        data = self.damage[index]
        if data is None:
            raise DataError(f"shard 3: {self.records[index].key}: damaged")
        return data

    def read_mask(self, index: int) -> bytes | None:
        return self.whole.read_mask(index)


def partly(folder: Path, cache: Path, damage: dict[int, bytes | None], **options) -> LatentCache:
    settings: dict[str, Any] = {"variants": Variants(), "resolution": 16, "vae_digest": VAE}
    return LatentCache(Partly(folder, damage), cache, **settings | options)


def test_a_picture_that_changed_is_damaged(folder, tmp_path):
    cache = cache_of(folder, tmp_path / "cache")
    (folder / "fox-2.webp").write_bytes(encoded(noise(24, 32, seed=50)))
    assert cache.prepare(Encoder()) == 4
    assert list(cache.damaged) == [2]
    assert "fox-2.webp: changed" in cache.damaged[2]


@pytest.mark.parametrize("threads", [0, 2])
def test_damaged_pictures_are_passed_over_and_noted(folder, tmp_path, threads):
    damage = {3: b"text", 1: None}
    cache = partly(folder, tmp_path / "cache", damage)
    told = []
    count = cache.prepare(Encoder(), threads=threads, progress=lambda *done: told.append(done))
    assert count == 3
    assert told == [(done, 5) for done in range(1, 6)]
    assert list(cache.damaged) == [1, 3]
    assert cache.damaged[1] == "shard 3: fox-1: damaged"
    assert "fox-3: not a JPEG" in cache.damaged[3]
    for sample in (0, 2, 4):
        torch.testing.assert_close(cache.get(sample, 0), expected(folder, sample), rtol=0, atol=0)
    for sample in damage:
        with pytest.raises(DataError) as caught:
            cache.get(sample, 0)
        assert str(caught.value) == cache.damaged[sample]
    assert cache.missing() == 0
    again = partly(folder, tmp_path / "cache", damage)
    assert again.missing() == 2, "nothing is noted on disk"
    assert again.prepare(Encoder(stop_after=0), threads=threads) == 0
    assert again.damaged == cache.damaged
    damage.clear()
    mended = partly(folder, tmp_path / "cache", damage)
    assert mended.prepare(Encoder()) == 2
    assert mended.damaged == {}
    assert again.prepare(Encoder(stop_after=0)) == 0
    torch.testing.assert_close(again.get(3, 0), expected(folder, 3), rtol=0, atol=0)


def test_a_picture_counts_once_whatever_its_versions(folder, tmp_path):
    variants = Variants(crops=3, random=True, flip=True)
    source = Partly(folder, {2: None})
    cache = LatentCache(
        source, tmp_path / "cache", variants=variants, resolution=16, vae_digest=VAE
    )
    assert cache.prepare(Encoder()) == 24
    assert list(cache.damaged) == [2]
    assert source.asked == [0, 1, 2, 3, 4], "all versions of a picture come from one decoding"
    for variant in range(6):
        with pytest.raises(DataError, match="shard 3: fox-2"):
            cache.get(2, variant)


def test_an_intact_copy_serves_for_a_damaged_one(tmp_path):
    folder = tmp_path / "foxes"
    folder.mkdir()
    for name, seed in [("a", 0), ("b", 1), ("c", 0)]:
        (folder / f"{name}.png").write_bytes(encoded(noise(32, 32, seed=seed)))
    cache = partly(folder, tmp_path / "cache", {0: None})
    assert cache.prepare(Encoder()) == 2
    assert cache.damaged == {}
    assert torch.equal(cache.get(0, 0), cache.get(2, 0))
    neither = partly(folder, tmp_path / "other", {0: None, 2: b"text"})
    assert neither.prepare(Encoder()) == 1
    assert list(neither.damaged) == [0, 2]
    assert neither.damaged[0] != neither.damaged[2], "each with its own reason"


def test_moments_that_are_there_need_no_picture(folder, tmp_path):
    cache_of(folder, tmp_path / "cache").prepare(Encoder())
    cache = partly(folder, tmp_path / "cache", {0: None, 4: b"text"})
    assert cache.prepare(Encoder(stop_after=0)) == 0
    assert cache.damaged == {}


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_agree_on_damage_without_waiting(folder, tmp_path, world):
    variants = Variants(crops=2, random=True)
    damage = {0: None, 1: b"text", 4: None}
    caches = [partly(folder, tmp_path / "cache", damage, variants=variants) for _ in range(world)]
    with ThreadPoolExecutor(world) as pool:
        work = [
            pool.submit(cache.prepare, Encoder(), rank=rank, world=world, stall_seconds=30)
            for rank, cache in enumerate(caches)
        ]
        start = time.monotonic()
        assert sum(each.result(20) for each in work) == 4
    assert time.monotonic() - start < 10
    assert all(cache.damaged == caches[0].damaged for cache in caches)
    assert list(caches[0].damaged) == [0, 1, 4]


# Which samples, which precision, how many threads


def test_a_cache_of_some_samples(folder, tmp_path):
    cache = partly(folder, tmp_path / "cache", {0: None, 2: None}, samples=[4, 2, 3])
    assert cache.missing() == 3
    encode = Encoder()
    assert cache.prepare(encode) == 2
    assert list(cache.damaged) == [2], "others are not looked at"
    torch.testing.assert_close(encode(encode.seen[0])[0], expected(folder, 4), rtol=0, atol=0)
    torch.testing.assert_close(cache.get(3, 0), expected(folder, 3), rtol=0, atol=0)
    assert cache_of(folder, tmp_path / "cache").missing() == 3
    backwards = partly(folder, tmp_path / "b", {0: None, 2: None}, samples=[4, 2, 0])
    backwards.prepare(Encoder())
    assert list(backwards.damaged) == [0, 2], "in one order, whoever found them first"


def test_half_precision_halves_the_files(folder, tmp_path):
    whole = cache_of(folder, tmp_path / "cache")
    whole.prepare(Encoder())
    half = cache_of(folder, tmp_path / "cache", precision="float16")
    assert half.prepare(Encoder()) == 5
    for sample in range(5):
        found = half.get(sample, 0)
        assert found.dtype == torch.float16
        assert torch.equal(found, whole.get(sample, 0).half())
    first, second = (files.read_tensors(path) for path in (tmp_path / "cache").iterdir())
    assert not first.keys() & second.keys(), "different content, different keys"
    again = cache_of(folder, tmp_path / "cache", precision="float16", memory_limit=0)
    assert again.prepare(Encoder(stop_after=0)) == 0
    assert torch.equal(again.get(1, 0), half.get(1, 0))
    assert cache_of(folder, tmp_path / "cache").prepare(Encoder(stop_after=0)) == 0


def test_half_precision_stays_finite(folder, tmp_path):
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 8, 2, 2), 1e6) * torch.tensor([1.0, -1.0]).repeat(4).view(8, 1, 1)

    cache = cache_of(folder, tmp_path / "cache", precision="float16")
    cache.prepare(encode)
    assert cache.get(0, 0)[:, 0, 0].tolist() == [65504.0, -65504.0] * 4
    with pytest.raises(DataError, match="not finite"):
        cache_of(folder, tmp_path / "b", precision="float16").prepare(lambda p: encode(p) / 0)


def test_keys_of_earlier_caches_are_still_found(folder, tmp_path):
    record = open_source(folder).records[3]
    key = files.digest_of([3, record.digest, [0.5, 0.5], False, 16, 16, VAE])
    moments = torch.full((8, 2, 2), 7.0)
    head = b"torch.float32 (8, 2, 2) "
    digest = files.sha256_bytes(head + moments.numpy().tobytes())
    path = tmp_path / "cache" / f"{VAE[:12]}-16x16-0123456789abcdef.safetensors"
    files.write_tensors(path, {key: moments}, {"vae": VAE, "digests": json.dumps({key: digest})})
    cache = cache_of(folder, tmp_path / "cache")
    assert cache.prepare(Encoder()) == 4
    assert torch.equal(cache.get(3, 0), moments)


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_change_neither_order_nor_results(folder, tmp_path, threads):
    variants = Variants(crops=2, random=True, flip=True)
    reference, encode = Encoder(), Encoder()
    cache_of(folder, tmp_path / "a", variants=variants).prepare(reference, threads=2)
    cache_of(folder, tmp_path / "b", variants=variants).prepare(encode, threads=threads)
    assert len(encode.seen) == 20
    assert all(map(torch.equal, encode.seen, reference.seen))
    first, second = (
        {
            key: value
            for path in (tmp_path / name).iterdir()
            for key, value in files.read_tensors(path).items()
        }
        for name in ("a", "b")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_threads_decode_ahead_within_bounds(tmp_path):
    folder = make_folder(tmp_path / "foxes", 30)
    source = Partly(folder, {})
    ahead = []

    class Slow(Encoder):
        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            ahead.append(len(source.asked) - self.calls)
            return super().__call__(pixels)

    cache = LatentCache(
        source, tmp_path / "cache", variants=Variants(), resolution=16, vae_digest=VAE
    )
    cache.prepare(Slow(), threads=2)
    assert len(ahead) == 30
    assert 3 <= max(ahead) <= 6, "two items a thread, and the one in hand"


def test_large_jpegs_have_keys_of_their_own(tmp_path):
    folder = tmp_path / "foxes"
    folder.mkdir()
    for name, size in [("a", (64, 128)), ("b", (64, 62))]:
        (folder / f"{name}.jpg").write_bytes(encoded(noise(*size), "JPEG", quality=95))
    encode = Encoder()
    cache = cache_of(folder, tmp_path / "cache")
    cache.prepare(encode)
    (path,) = (tmp_path / "cache").iterdir()
    text = path.read_bytes()
    keys = [
        files.digest_of([version, record.digest, [0.5, 0.5], False, 16, 16, VAE])
        for version, record in zip([4, 3], open_source(folder).records, strict=True)
    ]
    assert all(key.encode() in text for key in keys)
    data = open_source(folder).read(0)
    reduced = images.decode(data, "x", at_least=(16, 16)).pixels
    assert reduced.shape == (32, 64, 3)
    window = torch.from_numpy(fit(reduced, 16, 16)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(encode.seen[0][0], window)


# Several ranks


def rank_main(folder: Path, cache: Path, rank: int, world: int, results) -> None:
    torch.set_num_threads(1)
    encode = Encoder()
    mine = cache_of(folder, cache, variants=Variants(crops=3, random=True))
    mine.prepare(encode, rank=rank, world=world, stall_seconds=60)
    results.put(
        (rank, encode.calls, [mine.get(s, v).sum().item() for s in range(5) for v in range(3)])
    )


def test_ranks_share_the_work(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(folder, tmp_path / "cache", rank, 3, results))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert [calls for _, calls, _ in found] == [5, 5, 5]
    assert found[0][2] == found[1][2] == found[2][2]
    alone = cache_of(folder, tmp_path / "alone", variants=Variants(crops=3, random=True))
    alone.prepare(Encoder())
    assert found[0][2] == [alone.get(s, v).sum().item() for s in range(5) for v in range(3)]


def test_more_ranks_than_pictures(folder, tmp_path):
    ranks = [
        threading.Thread(
            target=cache_of(folder, tmp_path / "cache").prepare,
            args=(Encoder(),),
            kwargs={"rank": rank, "world": 7},
        )
        for rank in range(6)
    ]
    for rank in ranks:
        rank.start()
    idle = cache_of(folder, tmp_path / "cache")
    assert idle.prepare(Encoder(stop_after=0), rank=6, world=7, stall_seconds=30) == 0
    assert idle.missing() == 0
    for rank in ranks:
        rank.join(30)


def test_a_stalled_rank_is_named_by_what_is_missing(folder, tmp_path):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"2 latents are missing, of fox-1, fox-3 \(waited 1 s"):
        cache_of(folder, tmp_path / "cache").prepare(Encoder(), rank=0, world=2, stall_seconds=1)
    assert 0.9 < time.monotonic() - start < 10
    assert cache_of(folder, tmp_path / "cache").missing() == 2, "its own share is kept"


def test_patience_starts_anew_with_progress(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "SECONDS_PER_FILE", 0.0)

    class Slow(Encoder):
        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            time.sleep(0.8)
            return super().__call__(pixels)

    variants = Variants(crops=2, random=True)
    slow = cache_of(folder, tmp_path / "cache", variants=variants)
    other = threading.Thread(target=slow.prepare, args=(Slow(),), kwargs={"rank": 1, "world": 2})
    other.start()
    start = time.monotonic()
    quick = cache_of(folder, tmp_path / "cache", variants=variants)
    quick.prepare(Encoder(), rank=0, world=2, stall_seconds=2.5)
    assert time.monotonic() - start > 2.5
    other.join(30)


def test_a_damaged_item_of_another_rank_is_waited_for(folder, tmp_path):
    cache_of(folder, tmp_path / "cache").prepare(Encoder())
    (path,) = (tmp_path / "cache").iterdir()
    data = bytearray(path.read_bytes())
    data[-5 * 128 :] = bytes(5 * 128)
    path.write_bytes(data)
    cache = cache_of(folder, tmp_path / "cache")
    cache.prepare(Encoder(), rank=0, world=2, stall_seconds=30)
    owner = cache_of(folder, tmp_path / "cache")
    late = threading.Timer(0.5, owner.prepare, (Encoder(),), {"rank": 1, "world": 2})
    late.start()
    torch.testing.assert_close(cache.get(1, 0), expected(folder, 1), rtol=0, atol=0)
    late.join()


def test_too_many_damaged_pictures_end_it_at_once(tmp_path):
    source = make_folder(tmp_path / "foxes", 10)
    index = write_shards(source, tmp_path / "shards")
    (tmp_path / "shards/shard-000000.tar").write_bytes(b"")
    encode = Encoder()
    cache = cache_of(index, tmp_path / "cache", allowed=1)
    with pytest.raises(DataError, match="2 of 10 pictures"):
        cache.prepare(encode, threads=0)
    assert len(cache.damaged) == 2, "it did not go on to the end"
