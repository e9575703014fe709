"""The embedded data set: an endless series of small painted scenes with captions; nothing to download.

A scene is a subject in a colour at a place, such as "a red sports car on the road", with its own position, size,
facing, light and wording. A caption may leave out the colour or the place and then means the subject's usual one: "a
red sports car" is on the road. A scene depends on the seed of its series and on its index alone: nothing is stored, and
every machine paints the same pictures. evaluate.py measures whether pictures show what their prompts say.

What it is not: a model of the real world. Nobody who trains on photographs needs to read this file.
"""

import hashlib
import itertools
import random
import re
import sys
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

from support.errors import run_script, usage_error

COLOURS = {
    "red": (214, 38, 42), "orange": (245, 135, 25), "yellow": (250, 218, 50), "green": (40, 150, 65),
    "blue": (35, 95, 215), "purple": (135, 60, 185), "white": (244, 244, 246), "black": (42, 42, 48),
}  # fmt: skip
WHITE, INK, GLASS, CREAM, BROWN = (255, 255, 255), (34, 30, 40), (190, 226, 240), (248, 236, 208), (120, 78, 46)
BEAK, FLAME, LAMP = (250, 160, 30), (255, 150, 40), (255, 244, 170)
SUPERSAMPLING = 3  # pictures are painted this much larger, then reduced: Pillow does not smooth edges
OMIT_COLOUR, OMIT_PLACE = 0.15, 0.15  # shares of captions that leave out the colour, the place


@dataclass(frozen=True)
class Scene:
    """What is in one picture. `caption` may leave out a usual colour or place, the fields never do."""

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
    """Scene `index` of the series `seed`; any integers.

    combinations: the only (subject, colour, place) that may be painted; None: all. Attributes are drawn again until
    they are among them, so a scene that is allowed anyway is the same with and without the set.
    """
    rng = random.Random(f"scene {seed} {index}")
    while True:
        subject, colour, place = (rng.choice(list(table)) for table in (SUBJECTS, COLOURS, PLACES))
        colour_said, place_said = rng.random() >= OMIT_COLOUR, rng.random() >= OMIT_PLACE
        _, usual_colour, usual_place = SUBJECTS[subject]
        colour, place = colour if colour_said else usual_colour, place if place_said else usual_place
        if combinations is None or (subject, colour, place) in combinations:
            break
    brightness, warmth = rng.uniform(0.88, 1.06), rng.uniform(-0.04, 0.04)
    light = brightness * (1 + warmth), brightness, brightness * (1 - warmth)
    wordings = ("{0} {1}", "{0} {1}", "a picture of {0} {1}", "{1}, {0}") if place_said else ("{0}", "a picture of {0}")
    caption = rng.choice(wordings).format(full_caption(subject, colour if colour_said else ""), place)
    x, y, size = rng.uniform(0.45, 0.55), rng.uniform(0.86, 0.92), rng.uniform(0.33, 0.37)
    facing, decoration = rng.choice((-1, 1)), rng.getrandbits(32)
    return Scene(subject, colour, place, caption, x, y, size, facing, light, decoration)


def full_caption(subject, colour="", place=""):
    """The plain wording: "a red sports car on the road"."""
    words = f"{colour} {subject} {place}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def unknown_words(prompt):
    """Words of a prompt that are in no caption, and so are noise to a U-Net trained on scenes."""
    known = re.findall(r"\w+", " ".join(("a an picture of", *SUBJECTS, *COLOURS, *PLACES)))
    return [word for word in dict.fromkeys(re.findall(r"\w+", prompt.lower())) if word not in known]


def warn_of_unknown_words(prompt, cfg, warn):
    """warn(line) if a prompt asks a run on scenes for what none has."""
    words = ", ".join(unknown_words(prompt))[:100]
    if cfg.dataset == "scenes" and words:
        warn(f"no painted scene has {words!r}; python scenes.py --words lists all words")


@cache
def split_combinations(held_out):
    """All (subject, colour, place) in two frozensets: those to train on, and `held_out` others.

    A hash of the words chooses the latter; a larger number holds out the same ones and more. A subject in its usual
    colour at its usual place is never held out: captions that leave out both mean it.
    """
    every = frozenset(itertools.product(SUBJECTS, COLOURS, PLACES))
    free = [c for c in every if c[1:] != SUBJECTS[c[0]][1:]]
    if held_out > len(free):
        raise ValueError(f"{held_out} of {len(free)} combinations cannot be held out")
    chosen = frozenset(sorted(free, key=lambda c: hashlib.sha256(" ".join(c).encode()).digest())[:held_out])
    return every - chosen, chosen


def paint(scene, size):
    """Paint a Scene as an RGB picture of size x size pixels."""
    canvas = Image.new("RGB", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    PLACES[scene.place](Painter(canvas), random.Random(scene.decoration))
    painter = SubjectPainter(canvas, scene)
    ground = canvas.getpixel(tuple(map(round, painter.at(0, 1))))
    painter.ellipses(mix(ground, (10, 10, 30), 0.35), (0, 1, 0.95, 0.11), outline=False)  # shadow
    SUBJECTS[scene.subject][0](painter)
    lit = [min(255, round(value * factor)) for factor in scene.light for value in range(256)]
    return canvas.resize((size, size), Image.Resampling.BOX).point(lit)


def mix(a, b, share):
    """The colour `share` of the way from a to b."""
    return tuple(round(u + (v - u) * share) for u, v in zip(a, b))


class Painter:
    """Paints places; the whole picture is x, y from 0 to 1, y pointing down. rng: draws a place's details."""

    def __init__(self, canvas):
        self.canvas, self.draw, self.side = canvas, ImageDraw.Draw(canvas), canvas.width
        self.ink, self.line = None, 1  # colour of the outlines (None: there are none), and their width [pixels]

    def at(self, x, y):
        """Coordinates -> pixels."""
        return x * self.side, y * self.side

    def polygon(self, fill, *corners, outline=True):
        self.draw.polygon([self.at(x, y) for x, y in corners], fill, self.ink if outline else None, self.line)

    def boxes(self, fill, *boxes, outline=True):
        for x0, y0, x1, y1 in boxes:
            self.polygon(fill, (x0, y0), (x1, y0), (x1, y1), (x0, y1), outline=outline)

    def ellipses(self, fill, *ellipses, outline=True):
        for x, y, rx, ry in ellipses:
            (ax, ay), (bx, by) = self.at(x - rx, y - ry), self.at(x + rx, y + ry)
            self.draw.ellipse((min(ax, bx), ay, max(ax, bx), by), fill, self.ink if outline else None, self.line)

    def gradient(self, top, bottom, upper, lower):
        """Fill the rows from `top` to `bottom` with a vertical gradient from `upper` to `lower`."""
        first, last = round(top * self.side), round(bottom * self.side)
        column = Image.new("RGB", (1, 8))
        column.putdata([mix(upper, lower, i / 7) for i in range(8)])
        self.canvas.paste(column.resize((self.side, last - first), Image.Resampling.BILINEAR), (0, first))

    def specks(self, rng, count, fill, top, bottom, r):
        self.ellipses(fill, *((rng.random(), rng.uniform(top, bottom), r, r) for _ in range(count)))

    def grass(self, rng):
        self.gradient(0, 0.64, (110, 185, 245), (205, 233, 250))
        x, y = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.18)
        cloud = (x - 0.084, y + 0.014, 0.0588, 0.03675), (x, y, 0.084, 0.0525), (x + 0.084, y + 0.014, 0.063, 0.039375)
        self.ellipses((240, 248, 255), *cloud)
        self.ellipses((120, 190, 95), (rng.uniform(0.2, 0.8), 0.72, 0.7, 0.17))
        self.gradient(0.64, 1, (125, 200, 85), (70, 155, 55))
        self.specks(rng, 5, (215, 230, 120), 0.7, 0.98, 0.012)

    def beach(self, rng):
        self.gradient(0, 0.5, (80, 180, 240), (190, 230, 250))
        self.ellipses((255, 240, 150), (rng.uniform(0.1, 0.9), 0.13, 0.07, 0.07))
        self.gradient(0.5, 0.7, (20, 120, 180), (60, 185, 205))
        self.gradient(0.7, 1, (246, 224, 165), (225, 190, 125))
        self.ellipses((225, 240, 235), (rng.uniform(0.2, 0.8), 0.7, 0.7, 0.025))

    def snow(self, rng):
        self.gradient(0, 0.62, (165, 182, 202), (214, 222, 232))
        for x in (0.08, 0.92):
            x, height = x + rng.uniform(-0.06, 0.06), rng.uniform(0.24, 0.34)
            self.polygon((92, 128, 124), (x - 0.11, 0.64), (x, 0.64 - height), (x + 0.11, 0.64))
        self.gradient(0.62, 1, (238, 243, 250), (208, 219, 234))
        self.specks(rng, 8, (240, 245, 250), 0, 0.6, 0.011)

    def desert(self, rng):
        self.gradient(0, 0.62, (250, 190, 110), (255, 226, 170))
        self.ellipses((255, 245, 210), (rng.uniform(0.1, 0.9), 0.13, 0.08, 0.08))
        self.ellipses((222, 152, 84), (rng.uniform(0.2, 0.8), 0.7, 0.6, 0.16))
        self.gradient(0.62, 1, (226, 158, 86), (190, 112, 58))
        x = rng.choice((0.06, 0.94))
        self.boxes((96, 128, 74), (x - 0.025, 0.42, x + 0.025, 0.7))

    def road(self, rng):
        self.gradient(0, 0.6, (170, 190, 215), (222, 226, 226))
        for x in range(5):
            top, wall = rng.uniform(0.28, 0.44), mix((140, 132, 148), (172, 156, 156), rng.random())
            self.boxes(wall, (x * 0.2, top, x * 0.2 + 0.2, 0.6))
        self.boxes((176, 174, 170), (0, 0.6, 1, 0.66))
        self.gradient(0.66, 1, (92, 94, 102), (66, 68, 76))
        self.boxes((200, 196, 180), (0, 0.94, 1, 0.965))

    def night(self, rng):
        self.gradient(0, 0.66, (14, 18, 58), (52, 54, 116))
        self.specks(rng, 8, (190, 190, 200), 0, 0.6, 0.009)
        self.ellipses((248, 242, 205), (rng.uniform(0.1, 0.9), 0.13, 0.07, 0.07))
        self.gradient(0.66, 1, (34, 62, 72), (20, 40, 52))


class SubjectPainter(Painter):
    """Paints a scene's subject in a box of its own: x, y from -1 to 1, the feet at y = 1, mirrored if it faces left."""

    def __init__(self, canvas, scene):
        super().__init__(canvas)
        self.scene, self.base = scene, COLOURS[scene.colour]
        self.dark, self.pale = mix(self.base, INK, 0.3), mix(self.base, WHITE, 0.35)
        self.ink, self.line = mix(self.base, INK, 0.5), max(1, round(0.03 * scene.size * 2 * self.side))
        self.pupil = WHITE if scene.colour == "black" else INK

    def at(self, x, y):
        s = self.scene
        return (s.x + s.facing * x * s.size) * self.side, (s.y + (y - 1) * s.size) * self.side

    def stroke(self, fill, width, *points):
        self.draw.line([self.at(x, y) for x, y in points], fill, round(width * self.scene.size * self.side), "curve")

    def wheels(self, r, *xs):
        for x in xs:
            self.ellipses((30, 30, 34), (x, 1 - r, r, r))
            self.ellipses((200, 200, 205), (x, 1 - r, r * 0.45, r * 0.45))

    def dog(self):
        self.stroke(self.base, 0.16, (-0.75, 0.1), (-0.98, -0.4))
        self.boxes(self.base, (-0.62, 0.3, -0.42, 1.0), (0.48, 0.3, 0.68, 1.0))
        self.boxes(self.dark, (-0.3, 0.3, -0.1, 1.0), (0.2, 0.3, 0.4, 1.0))
        self.ellipses(self.base, (-0.08, 0.15, 0.78, 0.36), (0.62, -0.38, 0.38, 0.36))
        self.ellipses(self.pale, (0.88, -0.24, 0.2, 0.16))
        self.ellipses(INK, (1.0, -0.3, 0.08, 0.07), outline=False)
        self.ellipses(self.dark, (0.38, -0.38, 0.15, 0.34))
        self.ellipses(self.pupil, (0.7, -0.48, 0.07, 0.07), outline=False)

    def cat(self):
        self.stroke(self.base, 0.17, (0.45, 0.85), (0.85, 0.75), (0.9, 0.25), (0.75, 0.0))
        self.ellipses(self.base, (0, 0.45, 0.5, 0.55))
        self.ellipses(self.pale, (0, 0.6, 0.26, 0.34), outline=False)
        self.polygon(self.dark, (-0.52, -1.0), (-0.5, -0.35), (-0.1, -0.65))
        self.polygon(self.dark, (0.52, -1.0), (0.5, -0.35), (0.1, -0.65))
        self.ellipses(self.base, (0, -0.32, 0.56, 0.44))
        self.ellipses((170, 225, 90), (-0.22, -0.38, 0.12, 0.13), (0.22, -0.38, 0.12, 0.13))
        self.ellipses(INK, (-0.22, -0.38, 0.04, 0.1), (0.22, -0.38, 0.04, 0.1), outline=False)
        self.ellipses(self.pale, (-0.24, 0.93, 0.17, 0.1), (0.24, 0.93, 0.17, 0.1))
        self.polygon((240, 130, 140), (-0.08, -0.18), (0.08, -0.18), (0, -0.08), outline=False)

    def duck(self):
        self.boxes(BEAK, (-0.2, 0.7, -0.1, 0.96), (0.12, 0.7, 0.22, 0.96))
        self.ellipses(BEAK, (-0.08, 0.96, 0.16, 0.06), (0.24, 0.96, 0.16, 0.06))
        self.polygon(self.dark, (-1.0, -0.15), (-0.55, 0.1), (-0.6, 0.5))
        self.ellipses(self.base, (-0.12, 0.35, 0.72, 0.42), (0.5, -0.4, 0.36, 0.38))
        self.ellipses(self.dark, (-0.2, 0.32, 0.4, 0.22))
        self.polygon(BEAK, (0.8, -0.5), (1.15, -0.32), (0.8, -0.2))
        self.ellipses(self.pupil, (0.58, -0.5, 0.07, 0.07), outline=False)

    def sports_car(self):
        self.polygon(self.base, (-0.62, 0.42), (-0.3, 0.0), (0.25, 0.0), (0.62, 0.42))
        self.polygon(GLASS, (-0.46, 0.4), (-0.24, 0.1), (-0.05, 0.1), (-0.05, 0.4))
        self.polygon(GLASS, (0.03, 0.4), (0.03, 0.1), (0.2, 0.1), (0.45, 0.4))
        self.polygon(self.dark, (-1.1, 0.12), (-0.8, 0.12), (-0.86, 0.4), (-1.0, 0.4))
        self.polygon(self.base, (-1.05, 0.4), (0.6, 0.38), (1.08, 0.55), (1.12, 0.84), (-1.08, 0.84))
        self.boxes(self.dark, (-0.35, 0.66, 0.4, 0.78), outline=False)
        self.ellipses(LAMP, (0.98, 0.6, 0.1, 0.07))
        self.wheels(0.26, -0.62, 0.64)

    def bus(self):
        self.polygon(self.base, (-1.08, -0.6), (1.0, -0.6), (1.1, -0.4), (1.1, 0.82), (-1.08, 0.82))
        self.boxes(GLASS, (-0.95, -0.42, -0.59, 0.05), (-0.5, -0.42, -0.14, 0.05), (-0.05, -0.42, 0.31, 0.05))
        self.boxes(GLASS, (0.45, -0.42, 1.08, 0.12))
        self.boxes(self.dark, (-1.05, 0.28, 1.07, 0.42), outline=False)
        self.ellipses(LAMP, (1.0, 0.6, 0.09, 0.09))
        self.wheels(0.25, -0.6, 0.6)

    def sailboat(self):
        self.boxes(BROWN, (-0.06, -1.15, 0.04, 0.5))
        self.polygon(self.base, (0.1, -1.05), (0.1, 0.35), (0.95, 0.35))
        self.polygon(self.pale, (-0.12, -0.8), (-0.12, 0.35), (-0.7, 0.35))
        self.polygon(self.dark, (-1.05, 0.5), (1.1, 0.5), (0.75, 1.0), (-0.75, 1.0))

    def rocket(self):
        self.polygon(FLAME, (-0.18, 0.7), (0.18, 0.7), (0.0, 1.1))
        self.polygon(self.dark, (-0.3, 0.1), (-0.68, 0.75), (-0.3, 0.65))
        self.polygon(self.dark, (0.3, 0.1), (0.68, 0.75), (0.3, 0.65))
        right = (0.27, -0.8), (0.36, -0.3), (0.3, 0.72)
        self.polygon(self.base, (0, -1.25), *right, *((-x, y) for x, y in reversed(right)))
        self.polygon(self.dark, (0, -1.25), (0.27, -0.8), (-0.27, -0.8))
        self.ellipses(GLASS, (0, -0.3, 0.19, 0.19))

    def house(self):
        self.boxes((150, 84, 70), (0.4, -0.95, 0.62, -0.3))
        self.boxes(self.base, (-0.8, -0.12, 0.8, 1.0))
        self.polygon(self.dark, (-1.02, -0.1), (0, -0.95), (1.02, -0.1))
        self.boxes(BROWN, (-0.18, 0.38, 0.2, 1.0))
        self.boxes(GLASS, (-0.62, 0.1, -0.34, 0.4), (0.34, 0.1, 0.62, 0.4))

    def mushroom(self):
        self.polygon(CREAM, (-0.28, 0.1), (0.28, 0.1), (0.38, 1.0), (-0.38, 1.0))
        (ax, ay), (bx, by) = self.at(-0.95, -0.85), self.at(0.95, 1.25)
        self.draw.chord((min(ax, bx), ay, max(ax, bx), by), 180, 360, self.base, self.ink, self.line)
        spots = (-0.5, -0.1, 0.15, 0.1275), (0.0, -0.5, 0.19, 0.1615), (0.5, -0.12, 0.16, 0.136)
        self.ellipses(BROWN if self.scene.colour in ("white", "yellow") else CREAM, *spots, outline=False)

    def balloon(self):
        self.stroke(INK, 0.05, (-0.5, -0.1), (-0.17, 0.62))
        self.stroke(INK, 0.05, (0.5, -0.1), (0.17, 0.62))
        self.ellipses(self.base, (0, -0.48, 0.8, 0.78))
        self.ellipses(self.pale, (0, -0.48, 0.34, 0.78))
        self.boxes(BROWN, (-0.24, 0.58, 0.24, 0.95))


SUBJECTS = {  # painter, usual colour, usual place
    "dog": (SubjectPainter.dog, "orange", "on the grass"),
    "cat": (SubjectPainter.cat, "black", "on the grass"),
    "duck": (SubjectPainter.duck, "yellow", "on the beach"),
    "sports car": (SubjectPainter.sports_car, "red", "on the road"),
    "bus": (SubjectPainter.bus, "yellow", "on the road"),
    "sailboat": (SubjectPainter.sailboat, "blue", "on the beach"),
    "rocket": (SubjectPainter.rocket, "white", "at night"),
    "house": (SubjectPainter.house, "white", "in the snow"),
    "mushroom": (SubjectPainter.mushroom, "red", "on the grass"),
    "balloon": (SubjectPainter.balloon, "green", "in the desert"),
}
PLACES = {
    "on the grass": Painter.grass, "on the beach": Painter.beach, "in the snow": Painter.snow,
    "in the desert": Painter.desert, "on the road": Painter.road, "at night": Painter.night,
}  # fmt: skip


def main():
    """python scenes.py --words, or python scenes.py contact_sheet.png"""
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        print(main.__doc__)
    elif words == ["--words"]:
        print(*map(", ".join, (SUBJECTS, COLOURS, PLACES)), sep="\n")
    elif len(words) == 1 and words[0].endswith(".png"):
        sheet = Image.new("RGB", (8 * 96, 4 * 96))
        for i in range(32):
            sheet.paste(paint(make_scene(0, i), 96), (i % 8 * 96, i // 8 * 96))
        sheet.save(words[0])
    else:
        usage_error("scenes.py: takes --words or a file ending in .png; give one of them")


if __name__ == "__main__":
    run_script(main)
