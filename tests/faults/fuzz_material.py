"""What the fuzz run starts from, and how it is harmed: small pictures of all kinds, captions, tars.

Everything is drawn from the random generator that it is given, so a case is its seed and number.
"""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from pictures import encoded, noise, turned
from PIL import Image, ImageCms

EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
HUGE = 10**4000


def originals() -> dict[str, bytes]:
    """Whole pictures by file name: orientation, profiles, alpha, palettes, grey, 16 bits, CMYK."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colour, alpha = noise(20, 28, seed=1), noise(24, 18, 4, seed=2)
    grey = Image.fromarray(noise(18, 22, 1, seed=3))
    deep = Image.fromarray(noise(16, 16, 1, seed=4).astype(np.uint16) * 257)
    palette = Image.fromarray(noise(20, 20, seed=5)).quantize(40)
    cyan = Image.fromarray(noise(16, 24, 4, seed=6), "CMYK")
    text_exif = turned(8).tobytes()
    return {
        "p00.jpg": encoded(colour, "JPEG", exif=turned(6), icc_profile=srgb),
        "p01.jpg": encoded(noise(26, 26, seed=7), "JPEG", progressive=True, comment=b"fox"),
        "p02.jpg": encoded(cyan, "JPEG"),
        "p03.jpg": encoded(grey, "JPEG", exif=turned(3)),
        "p04.png": encoded(alpha, exif=text_exif, icc_profile=srgb),
        "p05.png": encoded(deep),
        "p06.png": encoded(palette, transparency=3),
        "p07.png": encoded(noise(22, 17, seed=8), icc_profile=profile, compress_level=0),
        "p08.webp": encoded(colour, "WEBP", exif=turned(5), icc_profile=srgb),
        "p09.webp": encoded(alpha, "WEBP", lossless=True),
        "p10.bmp": encoded(noise(15, 21, seed=9), "BMP"),
        "p11.bmp": encoded(palette, "BMP"),
    }


def harmed(data: bytes, draw: random.Random) -> bytes:
    """Bytes with one kind of damage, whatever they are."""
    result = bytearray(data)
    place = draw.randrange(len(result))
    span = draw.choice([1, 4, 60, 512, 3000])
    how = draw.randrange(9)
    if how == 0:
        result[place] ^= 1 << draw.randrange(8)
    elif how == 1:
        for _ in range(draw.choice([4, 30])):
            result[draw.randrange(len(result))] = draw.choice([0, 32, 48, 255, draw.randrange(256)])
    elif how == 2:
        result = result[:place]
    elif how == 3:
        result[place:place] = draw.randbytes(span)
    elif how == 4:
        del result[place : place + span]
    elif how == 5:
        result[place:place] = result[: draw.choice([1, 512, len(result)])]
    elif how == 6:
        result[place : place + span] = bytes(len(result[place : place + span]))
    elif how == 7:
        order = draw.choice([">", "<"])
        result[place : place + 4] = struct.pack(order + "I", draw.choice(EXTREMES))
    else:
        blocks = [bytes(result[n : n + span]) for n in range(0, len(result), span)]
        first, second = draw.randrange(len(blocks)), draw.randrange(len(blocks))
        blocks[first], blocks[second] = blocks[second], blocks[first]
        result = bytearray(b"".join(blocks))
    return bytes(result)


def harmed_tar(data: bytes, draw: random.Random) -> bytes:
    """A tar with damage of any kind, or header fields that are wrong under a right checksum."""
    if draw.random() < 0.5:
        return harmed(data, draw)
    result = bytearray(data)
    headers = [n for n in range(0, len(result), 512) if result[n + 257 : n + 262] == b"ustar"]
    start = draw.choice(headers)
    fields = [(0, 100), (100, 8), (124, 12), (156, 1), (257, 8), (345, 155), (512, 60)]
    for _ in range(draw.choice([1, 1, 3])):
        offset, length = draw.choice(fields)
        value = draw.choice(
            [
                b"\x80" + draw.randbytes(11),
                b"%011o\0" % draw.choice([0, 1, 511, 512, 4000, 8**10]),
                b"../../outside.png\0",
                b"/outside.png\0",
                b"a\nb\x1b[31m.png\0",
                b"p00.jpg\0",
                b"75 path=" + b"x" * 66 + b"\n",
                bytes([draw.randrange(256)]) * draw.choice([1, length]),
            ]
        )[:length]
        place = start + offset + (draw.randrange(length) if len(value) == 1 else 0)
        result[place : place + len(value)] = value
    head = result[start : start + 512]
    total = sum(head[:148]) + sum(head[156:]) + 256
    result[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(result[: len(data)])


def foreign_tar(path: Path, members: dict[str, bytes], draw: random.Random) -> Path:
    """A tar as other programs write them: GNU or pax, long names."""
    form = draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 8
    while place < len(data):
        size = struct.unpack_from(">I", data, place)[0]
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        place += size + 12


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def rebuilt_png(data: bytes, draw: random.Random) -> bytes:
    """A PNG whose damage lies under right checksums."""
    chunks = list(_chunks(data))
    number = draw.randrange(len(chunks))
    kind, body = chunks[number]
    how = draw.randrange(4)
    if how == 0 and body:
        chunks[number] = kind, harmed(body, draw)
    elif how == 1:
        chunks.insert(number, draw.choice(chunks))
    elif how == 2:
        size = draw.choice([0, 1, 3, 7, 8, 20, 60_000, 2**31 - 1, 2**32 - 1])
        header = struct.pack(">II", *draw.sample([size, draw.choice([1, 20, 60_000])], 2))
        chunks[0] = b"IHDR", header + chunks[0][1][8:]
    else:
        header = bytearray(chunks[0][1])
        header[8 + draw.randrange(5)] = draw.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
        chunks[0] = b"IHDR", bytes(header)
    return _png(chunks)


def bombs() -> dict[str, bytes]:
    """Small files that would take much memory or time if they were believed."""
    ten_meg = zlib.compress(bytes(80 * 2**20), 1)
    base = list(_chunks(encoded(noise(8, 8))))
    head = struct.pack(">II", 12_000, 12_000) + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(12_000 * 1501), 1)
    scans = encoded(Image.new("L", (2500, 2500)), "JPEG", progressive=True)
    last = scans.rfind(b"\xff\xda")
    webp = bytearray(encoded(noise(8, 8, 4), "WEBP", exif=turned(1)))
    webp[24:30] = b"\xff\x3f\x00\xff\x3f\x00"  # a canvas of 16384 x 16384
    run_length = bytearray(encoded(Image.new("P", (64, 64)), "BMP"))
    run_length[30:34] = struct.pack("<I", 1)
    wide = bytearray(encoded(noise(8, 8), "BMP"))
    wide[18:26] = struct.pack("<ii", 2**31 - 1, -(2**31))
    self_reference = turned(6).tobytes()[:-4] + struct.pack("<I", 8)
    return {
        "pixels.png": _png([(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]),
        "text.png": _png([*base[:1], (b"zTXt", b"a\0\0" + ten_meg), *base[1:]]),
        "texts.png": _png([*base[:1], *[(b"zTXt", b"a\0\0" + ten_meg[:99_999])] * 3, *base[1:]]),
        "profile.png": _png([*base[:1], (b"iCCP", b"a\0\0" + ten_meg), *base[1:]]),
        "chunks.png": _png([*base[:1], *[(b"tEXt", b"a\0b")] * 20_000, *base[1:]]),
        "scans.jpg": scans[:last] + scans[last:-2] * 4000 + b"\xff\xd9",
        "canvas.webp": bytes(webp),
        "runs.bmp": bytes(run_length),
        "sides.bmp": bytes(wide),
        "exif.jpg": encoded(noise(8, 8), "JPEG", exif=self_reference),
        "empty.png": b"",
        "gif.png": encoded(noise(8, 8), "GIF"),
        "tiff.jpg": encoded(noise(8, 8), "TIFF"),
    }


_WORDS = ("a fox, red, grass", "Füchse 狐", "x", "[filewords]", "{caption} {token} [name]", "")


def strange_text(draw: random.Random) -> bytes:
    """A caption as bytes: often not text, sometimes far too much of it."""
    return draw.choice(
        [
            lambda: draw.choice(_WORDS).encode(),
            lambda: draw.randbytes(draw.choice([1, 40, 5000])),
            lambda: b"\xef\xbb\xbf a fox\r\n\r\n",
            lambda: b"\xed\xa0\x80 half a pair",
            lambda: b"\0" * draw.choice([1, 3000]),
            lambda: "a fox".encode("utf-16"),
            lambda: b"fox, " * draw.choice([100, 10_000, 200_000]),
            lambda: b"x" * (2**16 + draw.choice([-1, 0, 1])),
            lambda: draw.choice([b"[filewords]", b"{caption}", b"{token}"]) * 5_000,
            lambda: b"a\x1b[31mb\r\nc\x85d\xe2\x80\xa8e",
        ]
    )()


def strange_json(draw: random.Random) -> bytes:
    """The text of one JSON value, or something like it."""
    name = json.dumps(f"p{draw.randrange(12):02d}.jpg").encode()
    deep = draw.choice([50, 900, 950, 980, 990, 1000, 100_000])
    values: list[Callable[[], bytes]] = [
        lambda: json.dumps(draw.choice(_WORDS)).encode(),
        lambda: b'"\\ud800 half"',
        lambda: b'"a\\u0000b\\nc"',
        lambda: b"[" * deep + b"]" * deep,
        lambda: b'{"a":' * deep + b"1" + b"}" * deep,
        lambda: b"9" * draw.choice([30, 4000, 5000]),
        lambda: b"-1e999",
        lambda: b"NaN",
        lambda: b"null",
        lambda: b"[1,2,3]",
        lambda: b'"' + b"y" * draw.choice([10, 2**20 + 5]) + b'"',
    ]
    value = draw.choice(values)()
    key = draw.choice([b'"text"', b'"text"', b'"caption"', b'"' + b"k" * 5000 + b'"'])
    strange = [b'"../p00.jpg"', b'"\\ud800"', b'"' + b"n" * 9000 + b'"']
    file_name = draw.choice([name, name, name, *strange])
    line = b'{"file_name":' + file_name + b"," + key + b":" + value + b"}"
    return harmed(line, draw) if draw.random() < 0.2 else line


def strange_table(draw: random.Random) -> tuple[str, bytes]:
    """A metadata file of one of the two kinds: its name and bytes."""
    if draw.random() < 0.5:
        lines = [b'{"file_name":"p10.bmp","text":"whole"}'] if draw.random() < 0.7 else []
        lines += [strange_json(draw) for _ in range(draw.choice([1, 1, 3]))]
        return "metadata.jsonl", draw.choice([b"\n", b"\n\n", b"\r\n"]).join(lines)
    table = b"file_name,text\np10.bmp,whole\n" + draw.choice(
        [
            b'p00.jpg,"a ""red"" fox, on\ngrass"\n',
            b'p00.jpg,"never closed\n',
            b'p00.jpg,a"b\np01.jpg,"c"d\n',
            b"p00.jpg,a,b,c\n",
            b"p00.jpg," + b"y" * draw.choice([100_000, 200_000]) + b"\n",
            b"p00.jpg,a\0b\n",
            b"p00.jpg,\xff\xfe\n",
            b"," * 100_000 + b"\n",
            b"p00.jpg,a\rp01.jpg,b\r",
            b"../p00.jpg,a\n",
        ]
    )
    if draw.random() < 0.2:
        table = table.replace(b"text", b"t" * 7000, 1)
    return "metadata.csv", harmed(table, draw) if draw.random() < 0.4 else table
