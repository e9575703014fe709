"""Promises of support/pictures.py: colours as they were meant, and what nobody reads makes no picture unreadable."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from conftest import assert_one_line_error
from PIL import Image, ImageCms, PngImagePlugin
from test_folders import TRAIN, VERIFY, cfg_of, mine

from data import open_dataset, read_pictures, read_square
from support.pictures import FORMATS, MAX_PROFILE, read_rgb
from support.show import progress_bar

ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))  # D50, by the ICC
PROPHOTO = ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def fixed(*values):
    return b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def profile(primaries, gamma, padding=0):
    """An ICC profile of three primaries (XYZ at D50) and a gamma, or of grey if primaries is None."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249),
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(80),
    }
    tags |= {b"cprt": b"text" + bytes(4) + np.random.RandomState(0).bytes(padding).hex().encode() + b"\0"}
    if primaries is None:
        tags[b"kTRC"] = curve
    for channel, xyz in zip((b"r", b"g", b"b"), primaries or ()):
        tags |= {channel + b"XYZ": b"XYZ " + bytes(4) + fixed(*xyz), channel + b"TRC": curve}
    table, content, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(content), len(data))
        content += data
    kind = b"GRAY" if primaries is None else b"RGB "
    head = struct.pack(">I", at + len(content)) + b"lcms" + bytes([2, 16, 0, 0]) + b"mntr" + kind + b"XYZ "
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + table + content


def linear(values):
    values = np.asarray(values, float) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def in_profile(colour, primaries, gamma):
    """An sRGB colour as a file with that profile holds it."""
    xyz = linear(colour) @ np.array(SRGB)
    return tuple(
        (255 * np.clip(xyz @ np.linalg.inv(np.array(primaries)), 0, 1) ** (1 / gamma)).round().astype(int).tolist()
    )


COLOURS = [(200, 120, 60), (90, 160, 110), (60, 80, 190), (128, 128, 128)]


@pytest.mark.parametrize("primaries, gamma", [(ADOBE, 2.19921875), (PROPHOTO, 1.80078125), (P3, 2.2)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "P", "RGBA"])
def test_colours_are_those_that_were_meant(tmp_path, primaries, gamma, kind):
    meant = COLOURS
    x = Image.new("RGB", (64, 16))
    for i, colour in enumerate(meant):
        x.paste(in_profile(colour, primaries, gamma), (16 * i, 0, 16 * i + 16, 16))
    path, options = (
        tmp_path / "x",
        {"quality": 100} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {},
    )
    x = x.quantize(8) if kind == "P" else x.convert("RGBA") if kind == "RGBA" else x
    x.save(path, kind if kind in FORMATS else "PNG", icc_profile=profile(primaries, gamma), **options)
    seen = read_rgb(path)
    for i, colour in enumerate(meant):
        assert np.abs(np.subtract(seen.getpixel((16 * i + 8, 8)), colour)).max() <= 6, (
            i,
            seen.getpixel((16 * i + 8, 8)),
        )


def test_a_square_and_a_training_see_the_colours_that_were_meant_and_verify_counts_them(tmp_path, run_here):
    root, data = mine(tmp_path), profile(ADOBE, 2.19921875)
    for i in range(14):
        Image.new("RGB", (40, 40), in_profile((200, 120, 60), ADOBE, 2.2)).save(
            root / f"images/p{i:03}.jpg", quality=100, icc_profile=data
        )
    pixels, _ = read_pictures(open_dataset(cfg_of(root))[0], cfg_of(root), progress_bar("read"))
    assert np.abs(pixels[0, :, 16, 16].numpy().astype(int) - (200, 120, 60)).max() <= 4
    result = run_here(*VERIFY, cwd=tmp_path)
    assert result.returncode == 0 and "14 pictures with a colour profile other than sRGB" in result.stdout


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_grey_with_a_profile_of_grey_is_converted(tmp_path, mode):
    x = (
        Image.fromarray(np.full((8, 8), 128 << 8, np.uint16))
        if mode == "I;16"
        else Image.new("L", (8, 8), 128).convert(mode)
    )
    x.save(tmp_path / "x.png", icc_profile=profile(None, 1.0))
    value = read_rgb(tmp_path / "x.png").getpixel((3, 3))
    assert len(set(value)) == 1 and (mode == "1" or abs(value[0] - 188) <= 2)  # half the light


@pytest.mark.parametrize("mode, of", [("L", ADOBE), ("CMYK", ADOBE), ("RGB", None)])
def test_a_profile_of_other_channels_spoils_nothing(tmp_path, mode, of):
    x = Image.new("RGB", (16, 16), (90, 90, 90)).convert(mode)
    x.save(tmp_path / "x.jpg", quality=100, icc_profile=profile(of, 2.2))
    assert max(abs(v - 90) for v in read_rgb(tmp_path / "x.jpg").getpixel((8, 8))) <= 6


@pytest.mark.parametrize(
    "data",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        profile(SRGB, 2.2)[:200],
        b"no profile",
        profile(SRGB, 2.2)[:-40],
    ],
)
def test_pictures_in_srgb_and_with_damaged_profiles_keep_their_bits(tmp_path, data):
    noise = np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png", icc_profile=data)
    assert np.array_equal(read_rgb(tmp_path / "x.png"), noise) or data.startswith(profile(SRGB, 2.2)[:200])


# ---- What nobody reads ----


def noise_of(bytes_):
    return np.random.RandomState(0).bytes(bytes_ // 2).hex()


def text_png(path, texts, after=False, colours=None):
    info = PngImagePlugin.PngInfo()
    for i, text in enumerate(texts):
        info.add_text(f"t{i}", text, zip=True)
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 90, 200)).save(data, "PNG", pnginfo=info, icc_profile=colours)
    data = data.getvalue()
    if after:  # the texts stand behind the pixels
        head, chunks, at = data[:33], [], 33
        while at < len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4])
            chunks.append(data[at:end])
            at = end
        chunks.sort(key=lambda c: (c[4:8] == b"IEND", c[4:8] == b"zTXt"))
        data = head + b"".join(chunks)
    path.write_bytes(data)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("sizes", [[1_400_000], [MAX_PROFILE + 10], [9 << 20] * 9])
def test_texts_of_any_size_make_no_png_unreadable(tmp_path, sizes, after):
    """The last one is more than Pillow takes in all; zeros, so that they are small on the disk."""
    text_png(tmp_path / "x.png", ["0" * size for size in sizes], after)
    assert read_rgb(tmp_path / "x.png").getpixel((3, 3)) == (9, 90, 200)


def test_a_large_profile_is_used(tmp_path):
    large = profile(ADOBE, 2.19921875, padding=800_000)
    assert len(large) > 1_600_000
    text_png(tmp_path / "x.png", ["0" * (MAX_PROFILE + 10)], colours=large)
    text_png(tmp_path / "same.png", [], colours=profile(ADOBE, 2.19921875))
    assert np.array_equal(read_rgb(tmp_path / "x.png"), read_rgb(tmp_path / "same.png"))
    assert read_rgb(tmp_path / "x.png").getpixel((3, 3)) != (9, 90, 200)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "note", [b"garbage, no TIFF", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\1\7\0\xff\xff\xff\xff" * 3, b""]
)
def test_a_damaged_exif_note_makes_no_picture_unreadable(tmp_path, kind, note):
    Image.new("RGB", (20, 10), (200, 100, 50)).save(tmp_path / "x", kind, exif=b"Exif\0\0" + note)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_rgb(tmp_path / "x").size == (20, 10)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_set_upright_as_pillow_does(tmp_path, orientation):
    from PIL import ImageOps

    x = Image.fromarray(np.random.RandomState(0).randint(0, 256, (5, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    x.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as theirs:
        assert np.array_equal(read_rgb(tmp_path / "x.png"), ImageOps.exif_transpose(theirs))


def test_a_damaged_png_is_still_refused(tmp_path):
    text_png(tmp_path / "x.png", ["0" * (MAX_PROFILE + 10)])
    data = bytearray((tmp_path / "x.png").read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(Exception):  # noqa: B017
        read_rgb(tmp_path / "x.png")
    header = struct.pack(">I", 4) + b"tEXt" + b"a\0bc" + struct.pack(">I", zlib.crc32(b"tEXta\0bc"))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 2**32 - 1))
    with pytest.raises(OSError):
        read_rgb(tmp_path / "x.png")


# ---- Nearly black ----


@pytest.mark.parametrize("most", [1023, 4095, 16383])
def test_deep_pictures_that_use_little_of_their_range_are_warned_of(tmp_path, run_here, most):
    root = mine(tmp_path)
    values = np.linspace(0, most, 1600).astype(np.uint16).reshape(40, 40)
    for i in range(14):
        (root / f"images/p{i:03}.jpg").unlink()
        Image.fromarray(values).save(root / f"images/p{i:03}.png")
    train = [*TRAIN, "--cache_dir", "kept"]
    for command in (train, [*train, "--overwrite"]):  # the second reads what the first has prepared
        result = run_here(*command, cwd=tmp_path)
        assert result.returncode == 0 and result.stderr.count("warning: ") == 2  # training pictures, held-out ones
        assert f"values from 0 to {most} of 65535" in result.stderr and "stretch" in result.stderr
    seen = run_here(*VERIFY, cwd=tmp_path)
    assert (
        seen.returncode == 0 and "14 pictures that are nearly black" in seen.stdout and f"to {most} of" in seen.stdout
    )


@pytest.mark.parametrize("most, deep", [(65535, True), (40_000, True), (255, False), (90, False)])
def test_what_is_bright_somewhere_is_not_warned_of(tmp_path, run_here, most, deep):
    root = mine(tmp_path)
    values = np.linspace(0, most, 1600).astype(np.uint16 if deep else np.uint8).reshape(40, 40)
    for i in range(14):
        Image.fromarray(values).save(root / f"images/p{i:03}.jpg", "PNG")
    result = run_here(*TRAIN, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr.count("warning") == 0, result.stderr


# ---- Squares ----


@pytest.mark.parametrize("resize, corner", [("crop", (0, 0, 255)), ("pad", (255, 255, 255)), ("squeeze", (255, 0, 0))])
def test_pictures_become_square_in_three_ways(tmp_path, run_here, resize, corner):
    x = Image.new("RGB", (90, 30), (0, 0, 255))
    x.paste((255, 0, 0), (0, 0, 30, 30))
    x.save(tmp_path / "x.png")
    square = read_square(tmp_path / "x.png", 30, resize)
    assert square.size == (30, 30) and square.getpixel((2, 2)) == corner
    mine(tmp_path)
    result = run_here(*TRAIN, "--resize", resize, cwd=tmp_path)
    assert result.returncode == 0 and f"--resize {resize}" in result.stdout
    assert_one_line_error(run_here(*TRAIN, "--resize", "stretch", cwd=tmp_path), 2, "--resize")


def test_coco_keeps_the_colours_that_its_runs_began_with(tmp_path):
    colour = in_profile((200, 120, 60), ADOBE, 2.2)
    Image.new("RGB", (40, 40), colour).save(tmp_path / "x.png", icc_profile=profile(ADOBE, 2.19921875))
    for profiles in (True, False):
        seen = read_square(tmp_path / "x.png", 8, "crop", profiles).getpixel((4, 4))
        assert (seen == colour) == (not profiles)
