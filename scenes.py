"""The embedded data set: an endless series of small painted scenes with captions, no download needed.

Each scene is a subject in a colour at a place, for example "a red sports car on the road", with its own
position, size, facing, light and wording; a caption that does not say the colour or the place means the usual
one of its subject, so that "a red sports car" is on the road. Scene number `index` of series `seed` is a pure
function of the two, so nothing has to be stored, any two machines paint the same picture, and because the
painter knows what it painted, prompt-following can be measured (evaluate.py).

What it is not: a model of the real world. It is here so that the three commands work on a fresh machine
within minutes; nobody who trains on photographs needs to read this file.

Coordinates: a subject is painted in a box x, y in [-1, 1], y pointing down, its feet at y = 1;
a place is painted in [0, 1] x [0, 1].
"""

import hashlib
import itertools
import random
import re
import sys
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 38, 42),
    "orange": (245, 135, 25),
    "yellow": (250, 218, 50),
    "green": (40, 150, 65),
    "blue": (35, 95, 215),
    "purple": (135, 60, 185),
    "white": (244, 244, 246),
    "black": (42, 42, 48),
}
INK, GLASS, CREAM, METAL, BROWN = (34, 30, 40), (190, 226, 240), (248, 236, 208), (120, 124, 132), (120, 78, 46)
BEAK, FLAME = (250, 160, 30), (255, 150, 40)

SUPERSAMPLING = 3  # pictures are painted this much larger, then reduced: Pillow does not smooth edges
OMIT_COLOUR, OMIT_PLACE = 0.15, 0.15  # shares of captions that leave unsaid what is usual of their subject


@dataclass(frozen=True)
class Scene:
    """What is in one picture; `caption` may leave out a usual colour or place, the fields never do."""

    subject: str
    colour: str
    place: str
    caption: str
    x: float  # centre of the subject, in picture widths from the left edge
    y: float  # feet of the subject, in picture heights from the top edge
    size: float  # half the subject's width, in picture widths
    facing: int  # 1 = right, -1 = left
    light: tuple  # factor on the red, green and blue of the finished picture
    decoration: int  # seed of the place's random details


def make_scene(seed, index, combinations=None):
    """Scene `index` of the endless series `seed`; any integers.

    combinations: a set of (subject, colour, place), the only ones that may be painted; None: all. What is drawn is
    thrown away until it is one of them, so a scene that is allowed anyway is the same with or without the set.
    """
    rng = random.Random(f"scene {seed} {index}")
    while True:
        subject, colour, place, colour_said, place_said = _draw_attributes(rng)
        if combinations is None or (subject, colour, place) in combinations:
            break
    brightness, warmth = rng.uniform(0.88, 1.06), rng.uniform(-0.04, 0.04)
    return Scene(
        subject,
        colour,
        place,
        caption=_word(rng, subject, colour if colour_said else "", place if place_said else ""),
        x=rng.uniform(0.45, 0.55),
        y=rng.uniform(0.86, 0.92),
        size=rng.uniform(0.33, 0.37),
        facing=rng.choice((-1, 1)),
        light=(brightness * (1 + warmth), brightness, brightness * (1 - warmth)),
        decoration=rng.getrandbits(32),
    )


def _draw_attributes(rng):
    """-> subject, colour, place as they are painted, and whether the caption says the colour and the place."""
    subject, colour, place = (rng.choice(list(table)) for table in (SUBJECTS, COLOURS, PLACES))
    _, usual_colour, usual_place = SUBJECTS[subject]
    colour_said, place_said = rng.random() >= OMIT_COLOUR, rng.random() >= OMIT_PLACE
    colour, place = colour if colour_said else usual_colour, place if place_said else usual_place
    return subject, colour, place, colour_said, place_said


@cache
def split_combinations(held_out):
    """All (subject, colour, place), in two frozensets: those to train on, and `held_out` others.

    Which ones is decided by a hash of the three words alone, and a larger number holds out the same ones and more. A
    subject in its usual colour at its usual place is never held out: captions that say neither colour nor place mean it.
    """
    every = list(itertools.product(SUBJECTS, COLOURS, PLACES))
    free = [c for c in every if c[1:] != SUBJECTS[c[0]][1:]]
    if held_out > len(free):
        raise ValueError(f"{held_out} of {len(free)} combinations cannot be held out")
    chosen = sorted(free, key=lambda c: hashlib.sha256(" ".join(c).encode()).digest())[:held_out]
    return frozenset(every) - frozenset(chosen), frozenset(chosen)


def full_caption(subject, colour, place):
    """The plain wording with all three attributes: "a red sports car on the road"."""
    return f"{_article(colour)} {colour} {subject} {place}"


def unknown_words(prompt):
    """Words of a prompt that are in no caption, and so are noise to a U-Net trained on scenes."""
    known = re.findall(r"\w+", " ".join(("a an picture of", *SUBJECTS, *COLOURS, *PLACES)))
    return [word for word in dict.fromkeys(re.findall(r"\w+", prompt.lower())) if word not in known]


def _word(rng, subject, colour, place):
    thing = f"{colour} {subject}".strip()
    thing = f"{_article(thing)} {thing}"
    if not place:
        return rng.choice(("{}", "a picture of {}")).format(thing)
    return rng.choice(("{0} {1}", "{0} {1}", "a picture of {0} {1}", "{1}, {0}")).format(thing, place)


def _article(words):
    return "an" if words[0] in "aeiou" else "a"


def paint(scene, size):
    """Paint a Scene as an RGB picture of size x size pixels."""
    canvas = Image.new("RGB", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    PLACES[scene.place](PlaceBrush(canvas), random.Random(scene.decoration))
    brush = SubjectBrush(canvas, scene)
    brush.shadow()
    SUBJECTS[scene.subject][0](brush)
    bands = canvas.resize((size, size), Image.Resampling.BOX).split()
    lit = [band.point([min(255, round(v * f)) for v in range(256)]) for band, f in zip(bands, scene.light)]
    return Image.merge("RGB", lit)


def mix(a, b, share):
    """The colour `share` of the way from a to b."""
    return tuple(round(u + (v - u) * share) for u, v in zip(a, b))


class PlaceBrush:
    """Paints on the unit square, (0, 0) the upper left corner."""

    def __init__(self, canvas):
        self.canvas, self.draw, self.side = canvas, ImageDraw.Draw(canvas), canvas.width

    def gradient(self, top, bottom, upper, lower):
        """Fill the rows from `top` to `bottom` with a vertical gradient from `upper` to `lower`."""
        first, last = round(top * self.side), round(bottom * self.side)
        column = Image.new("RGB", (1, 8))
        column.putdata([mix(upper, lower, i / 7) for i in range(8)])
        self.canvas.paste(column.resize((self.side, last - first), Image.Resampling.BILINEAR), (0, first))

    def polygon(self, points, fill):
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill)

    def ellipse(self, x, y, rx, ry, fill):
        s = self.side
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill)

    def box(self, x0, y0, x1, y1, fill):
        self.draw.rectangle([v * self.side for v in (x0, y0, x1, y1)], fill)

    def cloud(self, x, y, r, fill):
        for dx, dy, share in ((-1.2, 0.2, 0.7), (0, 0, 1), (1.2, 0.2, 0.75)):
            self.ellipse(x + dx * r, y + dy * r, r * share * 1.2, r * share * 0.75, fill)


class SubjectBrush:
    """Paints in the subject's box, mirrored when it faces left; a shape is outlined in the
    darkened colour of its subject unless told otherwise."""

    def __init__(self, canvas, scene):
        self.draw, self.scene, self.side = ImageDraw.Draw(canvas), scene, canvas.width
        self.base = COLOURS[scene.colour]
        self.dark, self.pale = mix(self.base, INK, 0.3), mix(self.base, (255, 255, 255), 0.35)
        self.ink = mix(self.base, INK, 0.5)
        self.line = max(1, round(0.03 * scene.size * 2 * self.side))

    def at(self, x, y):
        s = self.scene
        return (s.x + s.facing * x * s.size) * self.side, (s.y + (y - 1) * s.size) * self.side

    def polygon(self, points, fill, outline=True):
        self.draw.polygon([self.at(x, y) for x, y in points], fill, self.ink if outline else None, self.line)

    def ellipse(self, x, y, rx, ry, fill, outline=True):
        (ax, ay), (bx, by) = self.at(x - rx, y - ry), self.at(x + rx, y + ry)
        self.draw.ellipse((min(ax, bx), ay, max(ax, bx), by), fill, self.ink if outline else None, self.line)

    def box(self, x0, y0, x1, y1, fill, outline=True):
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outline)

    def stroke(self, points, fill, width):
        self.draw.line([self.at(x, y) for x, y in points], fill, round(width * self.scene.size * self.side), "curve")

    def dome(self, x, y, rx, ry, fill):
        """The upper half of an ellipse around (x, y)."""
        (ax, ay), (bx, by) = self.at(x - rx, y - ry), self.at(x + rx, y + ry)
        self.draw.chord((min(ax, bx), ay, max(ax, bx), by), 180, 360, fill, self.ink, self.line)

    def eye(self, x, y, r=0.07):
        self.ellipse(x, y, r, r, (255, 255, 255) if self.scene.colour == "black" else INK, outline=False)

    def wheel(self, x, r):
        self.ellipse(x, 1 - r, r, r, (30, 30, 34))
        self.ellipse(x, 1 - r, r * 0.45, r * 0.45, (200, 200, 205))

    def shadow(self):
        ground = mix(self.draw.im.getpixel(tuple(map(round, self.at(0, 1.0))))[:3], (10, 10, 30), 0.35)
        self.ellipse(0, 1.0, 0.95, 0.11, ground, outline=False)


# ---- Subjects -------------------------------------------------------------------------------------------


def _dog(b):
    b.stroke([(-0.75, 0.1), (-0.98, -0.4)], b.base, 0.16)
    for x in (-0.62, -0.3, 0.2, 0.48):
        b.box(x, 0.3, x + 0.2, 1.0, b.dark if x in (-0.3, 0.2) else b.base)
    b.ellipse(-0.08, 0.15, 0.78, 0.36, b.base)
    b.ellipse(0.62, -0.38, 0.38, 0.36, b.base)
    b.ellipse(0.88, -0.24, 0.2, 0.16, b.pale)
    b.ellipse(1.0, -0.3, 0.08, 0.07, INK, False)
    b.ellipse(0.38, -0.38, 0.15, 0.34, b.dark)
    b.eye(0.7, -0.48)


def _cat(b):
    b.stroke([(0.45, 0.85), (0.85, 0.75), (0.9, 0.25), (0.75, 0.0)], b.base, 0.17)
    b.ellipse(0, 0.45, 0.5, 0.55, b.base)
    b.ellipse(0, 0.6, 0.26, 0.34, b.pale, False)
    for s in (-1, 1):
        b.polygon([(s * 0.52, -1.0), (s * 0.5, -0.35), (s * 0.1, -0.65)], b.dark)
    b.ellipse(0, -0.32, 0.56, 0.44, b.base)
    for s in (-1, 1):
        b.ellipse(s * 0.22, -0.38, 0.12, 0.13, (170, 225, 90))
        b.ellipse(s * 0.22, -0.38, 0.04, 0.1, INK, False)
        b.ellipse(s * 0.24, 0.93, 0.17, 0.1, b.pale)
    b.polygon([(-0.08, -0.18), (0.08, -0.18), (0, -0.08)], (240, 130, 140), False)


def _duck(b):
    for x in (-0.2, 0.12):
        b.box(x, 0.7, x + 0.1, 0.96, BEAK)
        b.ellipse(x + 0.12, 0.96, 0.16, 0.06, BEAK)
    b.polygon([(-1.0, -0.15), (-0.55, 0.1), (-0.6, 0.5)], b.dark)
    b.ellipse(-0.12, 0.35, 0.72, 0.42, b.base)
    b.ellipse(0.5, -0.4, 0.36, 0.38, b.base)
    b.ellipse(-0.2, 0.32, 0.4, 0.22, b.dark)
    b.polygon([(0.8, -0.5), (1.15, -0.32), (0.8, -0.2)], BEAK)
    b.eye(0.58, -0.5)


def _sports_car(b):
    b.polygon([(-0.62, 0.42), (-0.3, 0.0), (0.25, 0.0), (0.62, 0.42)], b.base)
    b.polygon([(-0.46, 0.4), (-0.24, 0.1), (-0.05, 0.1), (-0.05, 0.4)], GLASS)
    b.polygon([(0.03, 0.4), (0.03, 0.1), (0.2, 0.1), (0.45, 0.4)], GLASS)
    b.polygon([(-1.1, 0.12), (-0.8, 0.12), (-0.86, 0.4), (-1.0, 0.4)], b.dark)
    b.polygon([(-1.05, 0.4), (0.6, 0.38), (1.08, 0.55), (1.12, 0.84), (-1.08, 0.84)], b.base)
    b.box(-0.35, 0.66, 0.4, 0.78, b.dark, False)
    b.ellipse(0.98, 0.6, 0.1, 0.07, (255, 244, 170))
    b.wheel(-0.62, 0.26)
    b.wheel(0.64, 0.26)


def _bus(b):
    b.polygon([(-1.08, -0.6), (1.0, -0.6), (1.1, -0.4), (1.1, 0.82), (-1.08, 0.82)], b.base)
    for x in (-0.95, -0.5, -0.05):
        b.box(x, -0.42, x + 0.36, 0.05, GLASS)
    b.box(0.45, -0.42, 1.08, 0.12, GLASS)
    b.box(-1.05, 0.28, 1.07, 0.42, b.dark, False)
    b.ellipse(1.0, 0.6, 0.09, 0.09, (255, 244, 170))
    b.wheel(-0.6, 0.25)
    b.wheel(0.6, 0.25)


def _sailboat(b):
    b.box(-0.06, -1.15, 0.04, 0.5, BROWN)
    b.polygon([(0.1, -1.05), (0.1, 0.35), (0.95, 0.35)], b.base)
    b.polygon([(-0.12, -0.8), (-0.12, 0.35), (-0.7, 0.35)], b.pale)
    b.polygon([(-1.05, 0.5), (1.1, 0.5), (0.75, 1.0), (-0.75, 1.0)], b.dark)


def _rocket(b):
    b.polygon([(-0.18, 0.7), (0.18, 0.7), (0.0, 1.1)], FLAME)
    for s in (-1, 1):
        b.polygon([(s * 0.3, 0.1), (s * 0.68, 0.75), (s * 0.3, 0.65)], b.dark)
    b.polygon([(0, -1.25), (0.27, -0.8), (0.36, -0.3), (0.3, 0.72),
               (-0.3, 0.72), (-0.36, -0.3), (-0.27, -0.8)], b.base)  # fmt: skip
    b.polygon([(0, -1.25), (0.27, -0.8), (-0.27, -0.8)], b.dark)
    b.ellipse(0, -0.3, 0.19, 0.19, GLASS)


def _house(b):
    b.box(0.4, -0.95, 0.62, -0.3, (150, 84, 70))
    b.box(-0.8, -0.12, 0.8, 1.0, b.base)
    b.polygon([(-1.02, -0.1), (0, -0.95), (1.02, -0.1)], b.dark)
    b.box(-0.18, 0.38, 0.2, 1.0, BROWN)
    for x in (-0.62, 0.34):
        b.box(x, 0.1, x + 0.28, 0.4, GLASS)


def _mushroom(b):
    b.polygon([(-0.28, 0.1), (0.28, 0.1), (0.38, 1.0), (-0.38, 1.0)], CREAM)
    b.dome(0, 0.2, 0.95, 1.05, b.base)
    spots = CREAM if b.scene.colour not in ("white", "yellow") else BROWN
    for x, y, r in ((-0.5, -0.1, 0.15), (0.0, -0.5, 0.19), (0.5, -0.12, 0.16)):
        b.ellipse(x, y, r, r * 0.85, spots, False)


def _balloon(b):
    for s in (-1, 1):
        b.stroke([(s * 0.5, -0.1), (s * 0.17, 0.62)], INK, 0.05)
    b.ellipse(0, -0.48, 0.8, 0.78, b.base)
    b.ellipse(0, -0.48, 0.34, 0.78, b.pale)
    b.box(-0.24, 0.58, 0.24, 0.95, BROWN)


SUBJECTS = {  # the painter, and the usual colour and place: those of a scene whose caption does not say them
    "dog": (_dog, "orange", "on the grass"),
    "cat": (_cat, "black", "on the grass"),
    "duck": (_duck, "yellow", "on the beach"),
    "sports car": (_sports_car, "red", "on the road"),
    "bus": (_bus, "yellow", "on the road"),
    "sailboat": (_sailboat, "blue", "on the beach"),
    "rocket": (_rocket, "white", "at night"),
    "house": (_house, "white", "in the snow"),
    "mushroom": (_mushroom, "red", "on the grass"),
    "balloon": (_balloon, "green", "in the desert"),
}


# ---- Places ---------------------------------------------------------------------------------------------


def _grass(b, rng):
    b.gradient(0, 0.64, (110, 185, 245), (205, 233, 250))
    b.cloud(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.18), 0.07, (240, 248, 255))
    b.ellipse(rng.uniform(0.2, 0.8), 0.72, 0.7, 0.17, (120, 190, 95))
    b.gradient(0.64, 1, (125, 200, 85), (70, 155, 55))
    for _ in range(5):
        b.ellipse(rng.random(), rng.uniform(0.7, 0.98), 0.012, 0.012, (215, 230, 120))


def _beach(b, rng):
    b.gradient(0, 0.5, (80, 180, 240), (190, 230, 250))
    b.ellipse(rng.uniform(0.1, 0.9), 0.13, 0.07, 0.07, (255, 240, 150))
    b.gradient(0.5, 0.7, (20, 120, 180), (60, 185, 205))
    b.gradient(0.7, 1, (246, 224, 165), (225, 190, 125))
    b.ellipse(rng.uniform(0.2, 0.8), 0.7, 0.7, 0.025, (225, 240, 235))


def _snow(b, rng):
    b.gradient(0, 0.62, (165, 182, 202), (214, 222, 232))
    for x in (0.08, 0.92):
        x, h = x + rng.uniform(-0.06, 0.06), rng.uniform(0.24, 0.34)
        b.polygon([(x - 0.11, 0.64), (x, 0.64 - h), (x + 0.11, 0.64)], (92, 128, 124))
    b.gradient(0.62, 1, (238, 243, 250), (208, 219, 234))
    for _ in range(8):
        b.ellipse(rng.random(), rng.uniform(0, 0.6), 0.011, 0.011, (240, 245, 250))


def _desert(b, rng):
    b.gradient(0, 0.62, (250, 190, 110), (255, 226, 170))
    b.ellipse(rng.uniform(0.1, 0.9), 0.13, 0.08, 0.08, (255, 245, 210))
    b.ellipse(rng.uniform(0.2, 0.8), 0.7, 0.6, 0.16, (222, 152, 84))
    b.gradient(0.62, 1, (226, 158, 86), (190, 112, 58))
    x = rng.choice((0.06, 0.94))
    b.box(x - 0.025, 0.42, x + 0.025, 0.7, (96, 128, 74))


def _road(b, rng):
    b.gradient(0, 0.6, (170, 190, 215), (222, 226, 226))
    for i in range(5):
        b.box(i * 0.2, rng.uniform(0.28, 0.44), i * 0.2 + 0.2, 0.6, mix((140, 132, 148), (172, 156, 156), rng.random()))
    b.box(0, 0.6, 1, 0.66, (176, 174, 170))
    b.gradient(0.66, 1, (92, 94, 102), (66, 68, 76))
    b.box(0, 0.94, 1, 0.965, (200, 196, 180))


def _night(b, rng):
    b.gradient(0, 0.66, (14, 18, 58), (52, 54, 116))
    for _ in range(8):
        b.ellipse(rng.random(), rng.uniform(0, 0.6), 0.009, 0.009, (190, 190, 200))
    b.ellipse(rng.uniform(0.1, 0.9), 0.13, 0.07, 0.07, (248, 242, 205))
    b.gradient(0.66, 1, (34, 62, 72), (20, 40, 52))


PLACES = {
    "on the grass": _grass,
    "on the beach": _beach,
    "in the snow": _snow,
    "in the desert": _desert,
    "on the road": _road,
    "at night": _night,
}


def main():
    """python scenes.py --words, or python scenes.py contact_sheet.png"""
    if sys.argv[1:] == ["--words"]:
        for table in (SUBJECTS, COLOURS, PLACES):
            print(", ".join(table))
    elif len(sys.argv) == 2 and sys.argv[1].endswith(".png"):
        sheet = Image.new("RGB", (8 * 96, 4 * 96))
        for i in range(32):
            sheet.paste(paint(make_scene(0, i), 96), (i % 8 * 96, i // 8 * 96))
        try:
            sheet.save(sys.argv[1])
        except OSError as e:
            sys.exit(f"error: {sys.argv[1]}: {e.strerror}; check the path and its permissions")
    else:
        print("error: scenes.py: takes --words or a file ending in .png; give one of them", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
