"""Decoding, fitting, and the files that must not get through."""

import random
import struct
import time
import zlib

import numpy as np
import pytest
from pictures import encoded, noise, turned
from PIL import Image, ImageCms, ImageOps

from disttrain.data import images
from disttrain.data.window import fit, reduction
from disttrain.errors import DataError


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_pixels_come_back(kind):
    pixels = noise(17, 23)
    picture = images.decode(encoded(pixels, kind), "x")
    assert picture.mask is None
    np.testing.assert_array_equal(picture.pixels, pixels)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {})])
def test_lossy_pixels_come_back_nearly(kind, options):
    pixels = noise(40, 56)
    decoded = images.decode(encoded(pixels, kind, **options), "x").pixels
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).mean() < 16  # unrelated noise: 80


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied(orientation, kind):
    data = encoded(noise(24, 40), kind, exif=turned(orientation))
    with Image.open(images.io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    picture = images.decode(data, "x")
    np.testing.assert_array_equal(picture.pixels, expected)
    assert images.probe(data, "x") == (expected.shape[1], expected.shape[0])


def test_damaged_exif_leaves_the_picture():
    exif = bytearray(turned(6).tobytes())
    exif[6:14] = b"\xff" * 8
    pixels = noise(8, 12)
    data = encoded(pixels, "PNG", exif=bytes(exif))
    np.testing.assert_array_equal(images.decode(data, "x").pixels, pixels)
    assert images.probe(data, "x") == (12, 8)


def test_alpha_is_composited_on_white_and_returned():
    pixels = noise(6, 8, 4)
    pixels[0, 0] = (10, 20, 30, 0)
    pixels[0, 1] = (10, 20, 30, 255)
    pixels[0, 2] = (0, 100, 255, 128)
    picture = images.decode(encoded(pixels), "x")
    assert picture.mask is not None
    np.testing.assert_array_equal(picture.mask, pixels[..., 3])
    opacity = pixels[..., 3:].astype(float) / 255
    expected = pixels[..., :3] * opacity + 255 * (1 - opacity)
    assert np.abs(picture.pixels - expected).max() <= 0.51


def test_alpha_turns_with_the_picture():
    pixels = noise(6, 8, 4)
    picture = images.decode(encoded(pixels, exif=turned(6)), "x")
    assert picture.mask is not None
    np.testing.assert_array_equal(picture.mask, np.rot90(pixels[..., 3], -1))


def test_opaque_alpha_is_no_mask():
    pixels = noise(6, 8, 4)
    pixels[..., 3] = 255
    picture = images.decode(encoded(pixels), "x")
    assert picture.mask is None
    np.testing.assert_array_equal(picture.pixels, pixels[..., :3])


def test_grey_and_grey_alpha():
    grey = noise(6, 8, 1)
    picture = images.decode(encoded(grey), "x")
    np.testing.assert_array_equal(picture.pixels, np.stack([grey] * 3, axis=-1))
    image = Image.fromarray(grey)
    alpha = noise(6, 8, 1, seed=1)
    image.putalpha(Image.fromarray(alpha))
    picture = images.decode(encoded(image), "x")
    np.testing.assert_array_equal(picture.mask, alpha)


def test_sixteen_bit_grey_keeps_its_range():
    values = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1365
    picture = images.decode(encoded(values), "x")
    np.testing.assert_array_equal(picture.pixels[..., 0], (values >> 8).astype(np.uint8))
    assert picture.pixels.max() > 245
    assert len(np.unique(picture.pixels)) > 40


def test_sixteen_bit_grey_with_transparent_value():
    values = np.full((4, 4), 40000, dtype=np.uint16)
    values[0, 0] = 7
    picture = images.decode(encoded(values, transparency=7), "x")
    assert picture.mask is not None
    assert picture.mask[0, 0] == 0
    assert picture.mask[1:].min() == 255
    np.testing.assert_array_equal(picture.pixels[0, 0], [255, 255, 255])


def test_sixteen_bit_colour():
    values = np.arange(2 * 3 * 3, dtype=np.uint16).reshape(2, 3, 3) * 3640

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines))
    picture = images.decode(data + chunk(b"IEND", b""), "x")
    np.testing.assert_array_equal(picture.pixels, (values >> 8).astype(np.uint8))


def test_palette_with_and_without_transparency():
    image = Image.fromarray(noise(12, 16)).quantize(8)
    picture = images.decode(encoded(image), "x")
    np.testing.assert_array_equal(picture.pixels, np.asarray(image.convert("RGB")))
    picture = images.decode(encoded(image, transparency=3), "x")
    np.testing.assert_array_equal(picture.mask == 0, np.asarray(image) == 3)
    assert (picture.pixels[picture.mask == 0] == 255).all()


def test_one_bit():
    bits = noise(8, 8, 1) > 128
    picture = images.decode(encoded(Image.fromarray(bits)), "x")
    np.testing.assert_array_equal(picture.pixels[..., 1], bits * np.uint8(255))


def test_cmyk_is_not_inverted():
    red = Image.new("RGB", (16, 16), (220, 20, 20)).convert("CMYK")
    pixel = images.decode(encoded(red, "JPEG", quality=95), "x").pixels[8, 8]
    assert pixel[0] > 180
    assert pixel[1] < 60


def swapped_profile() -> bytes:
    """An sRGB profile whose red and green primaries are exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = bytearray(bytes(profile).replace(b"s\0R\0G\0B", b"t\0e\0s\0t"))
    (count,) = struct.unpack_from(">I", profile, 128)
    places = {bytes(profile[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(count)}
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def test_profile_is_converted_to_srgb():
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[..., 0] = 255
    decoded = images.decode(encoded(pixels, icc_profile=swapped_profile()), "x").pixels
    assert np.abs(decoded[0, 0].astype(int) - [0, 255, 0]).max() <= 2


def test_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = noise(9, 9)
    decoded = images.decode(encoded(pixels, icc_profile=profile), "x").pixels
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("profile", [b"no profile", b"\0" * 200])
def test_broken_profile_is_ignored(profile):
    pixels = noise(9, 9)
    decoded = images.decode(encoded(pixels, icc_profile=profile), "x").pixels
    np.testing.assert_array_equal(decoded, pixels)


def test_first_frame_of_an_animation():
    first, second = (Image.fromarray(noise(16, 16, seed=n)) for n in (0, 1))
    data = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    np.testing.assert_array_equal(images.decode(data, "x").pixels, np.asarray(first))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "ICO"])
def test_other_formats_are_refused_by_name(kind):
    with pytest.raises(DataError, match=r"folder/fox: not a JPEG, PNG, WebP or BMP"):
        images.decode(encoded(noise(16, 16), kind), "folder/fox")


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"])
def test_non_pictures_are_one_line(data):
    with pytest.raises(DataError, match=r"^folder/fox: ") as caught:
        images.decode(data, "folder/fox")
    assert "\n" not in str(caught.value)


def test_truncated_picture_is_refused():
    data = encoded(noise(64, 64), "JPEG")
    with pytest.raises(DataError, match=r"fox\.jpg: damaged"):
        images.decode(data[: len(data) // 2], "fox.jpg")


def test_pixel_cap_comes_before_decoding():
    head = bytearray(encoded(noise(4, 4)))
    head[16:24] = struct.pack(">II", 60_000, 60_000)
    head[29:33] = struct.pack(">I", zlib.crc32(bytes(head[12:29])))
    start = time.monotonic()
    for read in (images.decode, images.probe):
        with pytest.raises(DataError, match="fox"):
            read(bytes(head), "fox")
    assert time.monotonic() - start < 1
    with pytest.raises(DataError, match="20 x 10 pixels, the limit is 199"):
        images.decode(encoded(noise(10, 20)), "fox", max_pixels=199)
    images.decode(encoded(noise(10, 20)), "fox", max_pixels=200)


def test_run_length_bmp_is_refused():
    data = bytearray(encoded(Image.fromarray(noise(8, 8)).quantize(16), "BMP"))
    data[30:34] = struct.pack("<I", 1)
    with pytest.raises(DataError, match="run-length"):
        images.decode(bytes(data), "fox.bmp")


def test_mask_file_becomes_brightness():
    grey = noise(6, 8, 1)
    np.testing.assert_array_equal(images.decode_mask(encoded(grey), "x"), grey)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` cut, overwritten, shortened or lengthened somewhere."""
    change = bytearray(data)
    place = draw.randrange(len(change))
    how = draw.random()
    if how < 0.2:
        return bytes(change[:place])
    if how < 0.8:
        reach = draw.choice([64, 400, len(change)])
        for _ in range(draw.choice([1, 3, 20])):
            change[draw.randrange(min(reach, len(change)))] = draw.choice(
                [0, 255, draw.randrange(256)]
            )
    elif how < 0.9:
        del change[place : place + draw.randrange(1, 50)]
    else:
        change[place:place] = draw.randbytes(20)
    return bytes(change)


def mutated_png(data: bytes, draw: random.Random) -> bytes:
    """A PNG with one chunk changed and every checksum right, so that the parser goes on."""
    chunks, position = [], 8
    while position < len(data):
        (size,) = struct.unpack_from(">I", data, position)
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + size]))
        position += 12 + size
    which = draw.randrange(len(chunks))
    name, body = chunks[which]
    if body:
        body = mutated(body, draw)
    chunks[which] = (name, body)
    if draw.random() < 0.3:
        extra = draw.choice(
            [b"tRNS", b"iCCP", b"eXIf", b"zTXt", b"iTXt", b"PLTE", b"acTL", b"fcTL"]
        )
        chunks.insert(draw.randrange(1, len(chunks)), (extra, draw.randbytes(draw.randrange(40))))
    packed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return data[:8] + b"".join(packed)


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_decode_or_raise_data_error():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels, clear = noise(40, 56), noise(40, 56, 4)
    small = Image.fromarray(pixels).quantize(16)
    whole = [
        encoded(pixels, "JPEG", exif=turned(6), icc_profile=profile),
        encoded(pixels, "JPEG", progressive=True),
        encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG"),
        encoded(clear, "WEBP", exif=turned(5)),
        encoded(pixels, "WEBP", lossless=True, icc_profile=profile),
        encoded(pixels, "BMP"),
        encoded(small, "BMP"),
    ]
    pngs = [
        encoded(clear, exif=turned(8), icc_profile=profile),
        encoded(small, transparency=3),
        encoded(np.arange(400, dtype=np.uint16).reshape(20, 20)),
    ]
    draw = random.Random(20)
    outcomes = {True: 0, False: 0}
    for number in range(800):
        if number % 3:
            data = mutated(draw.choice(whole + pngs), draw)
        else:
            data = mutated_png(draw.choice(pngs), draw)
        start = time.monotonic()
        for read in (images.decode, images.probe):
            message = None
            try:
                read(data, "fox", max_pixels=1_000_000)
            except DataError as error:
                message = str(error)
            assert message is None or (message.startswith("fox: ") and "\n" not in message)
            outcomes[message is None] += 1
        assert time.monotonic() - start < 2
    assert min(outcomes.values()) > 200, "the mutations must reach both ends"


def test_fit_keeps_the_size_and_the_identity():
    pixels = noise(20, 30)
    np.testing.assert_array_equal(fit(pixels, 20, 30), pixels)
    assert fit(pixels, 7, 50).shape == (7, 50, 3)
    assert fit(pixels[..., 0], 7, 50).shape == (7, 50)
    assert fit(noise(1, 3000), 8, 8).shape == (8, 8, 3)


def test_fit_cuts_the_window_at_the_fractions():
    pixels = noise(20, 50)
    np.testing.assert_array_equal(fit(pixels, 20, 20, (0.3, 0.0)), pixels[:, :20])
    np.testing.assert_array_equal(fit(pixels, 20, 20, (0.3, 0.5)), pixels[:, 15:35])
    np.testing.assert_array_equal(fit(pixels, 20, 20, (0.3, 1.0)), pixels[:, 30:])
    tall = pixels.swapaxes(0, 1)
    np.testing.assert_array_equal(fit(tall, 20, 20, (1.0, 0.3)), tall[30:])
    flipped = fit(pixels, 20, 20, (0.5, 0.0), flip=True)
    np.testing.assert_array_equal(flipped, pixels[:, 19::-1])


def test_fit_keeps_the_aspect():
    rows, columns = np.mgrid[0:120, 0:200]
    disc = ((rows - 60) ** 2 + (columns - 100) ** 2 < 40**2).astype(np.uint8) * 255
    result = fit(disc, 48, 48) > 128
    assert abs(int(result.any(axis=0).sum()) - int(result.any(axis=1).sum())) <= 1
    assert abs(int(result.any(axis=0).sum()) - 32) <= 1


def test_png_text_round_trip(tmp_path):
    pixels = noise(8, 9)
    text = {"parameters": "a fox\nSteps: 20", "note": "Füchse, 狐", "long": "x" * 100_000}
    data = images.encode_png(pixels, text)
    assert data == images.encode_png(pixels, text)
    path = tmp_path / "fox.png"
    path.write_bytes(data)
    assert images.read_png_text(path) == text
    np.testing.assert_array_equal(images.decode(data, "x").pixels, pixels)


def test_png_text_of_other_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing\.png"):
        images.read_png_text(tmp_path / "missing.png")
    (tmp_path / "fox.png").write_bytes(encoded(noise(8, 8), "JPEG"))
    with pytest.raises(DataError, match="a JPEG file"):
        images.read_png_text(tmp_path / "fox.png")


def test_tile_places_pictures_and_labels():
    first, second, third = (noise(40, 60, seed=n) for n in range(3))
    grid = images.tile([[first, second], [third]], gap=3)
    assert grid.shape == (83, 123, 3)
    np.testing.assert_array_equal(grid[:40, 63:], second)
    np.testing.assert_array_equal(grid[43:, :60], third)
    assert (grid[43:, 63:] == 255).all()
    assert (grid[40:43] == 255).all()
    labelled = images.tile(
        [[first, second], [third]], 3, ["step 100", "狐"], ["a very long name of a column", "cfg"]
    )
    gutter = labelled.shape[1] - 123
    assert gutter > 20
    np.testing.assert_array_equal(labelled[images.LABEL_HEIGHT :, gutter:], grid)
    assert labelled[: images.LABEL_HEIGHT, gutter : gutter + 60].min() < 100
    assert labelled[: images.LABEL_HEIGHT, gutter + 63 :].min() < 100
    assert labelled[images.LABEL_HEIGHT :, :gutter].min() < 100


# Large JPEGs


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture whose detail is coarser than that of `noise`, as in a large photo."""
    coarse = noise(height // 4, width // 4, seed=seed)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("size", "at_least", "part"),
    [
        ((800, 1600), (50, 50), 8),
        ((800, 1600), (50, 101), 4),
        ((796, 1600), (50, 50), 4),
        ((798, 1600), (50, 50), 2),
        ((799, 1600), (50, 50), 1),
        ((800, 1600), (201, 50), 1),
        ((800, 1600), (200, 50), 2),
    ],
)
def test_reduction_leaves_twice_the_window_and_no_remainder(size, at_least, part):
    assert reduction(size, at_least) == part
    assert reduction(size[::-1], at_least[::-1]) == part


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_large_jpegs_are_decoded_small_with_the_same_window(options):
    data = encoded(photo(640, 960), "JPEG", quality=92, **options)
    whole = images.decode(data, "x")
    small = images.decode(data, "x", at_least=(64, 80))
    assert whole.pixels.shape == (640, 960, 3)
    assert small.pixels.shape == (160, 240, 3)
    for crop in [(0.5, 0.0), (0.5, 1.0)]:
        windows = [fit(p.pixels, 64, 80, crop).astype(int) for p in (whole, small)]
        difference = np.abs(windows[0] - windows[1])
        assert difference.mean() < 1
        assert difference.max() <= 8
    exact = images.decode(encoded(noise(640, 961), "JPEG"), "x", at_least=(64, 80))
    assert exact.pixels.shape == (640, 961, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_keep_twice_the_upright_window(orientation):
    pixels = photo(320, 640) if orientation < 5 else photo(640, 320)  # upright 320 x 640
    data = encoded(pixels, "JPEG", quality=95, exif=turned(orientation))
    whole = images.decode(data, "x").pixels
    assert whole.shape == (320, 640, 3)
    small = images.decode(data, "x", at_least=(40, 160)).pixels
    assert small.shape == (160, 320, 3), "320 / 2 is twice 160; the sides swapped would say full"
    coarse = np.asarray(Image.fromarray(whole).resize((320, 160), Image.Resampling.BOX))
    assert np.abs(coarse.astype(int) - small).mean() < 2
    assert images.decode(data, "x", at_least=(160, 40)).pixels.shape == (320, 640, 3)


def test_only_jpegs_are_decoded_small():
    for kind in ("PNG", "WEBP", "BMP"):
        picture = images.decode(encoded(noise(128, 128), kind), "x", at_least=(8, 8))
        assert picture.pixels.shape == (128, 128, 3)
    grey = images.decode(encoded(noise(128, 128, 1), "JPEG"), "x", at_least=(8, 8))
    assert grey.pixels.shape == (16, 16, 3)
    cmyk = encoded(Image.new("RGB", (64, 64), (220, 20, 20)).convert("CMYK"), "JPEG", quality=95)
    pixel = images.decode(cmyk, "x", at_least=(8, 8)).pixels[8, 8]
    assert pixel[0] > 180
    assert pixel[1] < 60


def test_pictures_of_several_frames_are_decoded_small():
    first, second = (Image.fromarray(photo(128, 192, seed=n)) for n in (0, 1))
    data = encoded(first, "MPO", quality=95, save_all=True, append_images=[second])
    whole = images.decode(data, "x").pixels
    small = images.decode(data, "x", at_least=(16, 16)).pixels
    assert small.shape == (32, 48, 3)
    coarse = np.asarray(Image.fromarray(whole).resize((48, 32), Image.Resampling.BOX))
    assert np.abs(coarse.astype(int) - small).mean() < 2


def test_damage_is_found_in_jpegs_decoded_small():
    data = encoded(noise(640, 640), "JPEG")
    with pytest.raises(DataError, match=r"fox\.jpg: damaged"):
        images.decode(data[: len(data) // 2], "fox.jpg", at_least=(16, 16))
    with pytest.raises(DataError, match="the limit is 100"):
        images.decode(data, "fox.jpg", 100, at_least=(16, 16))
    draw = random.Random(4)
    outcomes = {True: 0, False: 0}
    for _ in range(150):
        try:
            images.decode(mutated(data, draw), "fox", at_least=(16, 16))
            outcomes[True] += 1
        except DataError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 10
