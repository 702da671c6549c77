"""Build Icon-R (dataloaders/data/icon_r) and, on request, the pictures that the project's backbones are pre-trained on.

    pip install resvg-py==0.5.0 pillow==13.0.0 numpy       # these versions give the same bytes
    python experiments/build_icon_r.py --cache FOLDER [--pretraining FILE.npz]

Icons of the sets in ``sets.tsv`` are matched by name to the concepts in ``icon_r_concepts.txt``, drawn at 64x64
pixels, stripped of near-duplicates, and split into training and test pictures by families of sets (one designer, or
forks of one design). Sums over pixels are integers, exact in float64, so every machine makes the same choices.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import tarfile
import urllib.request
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from zlib import crc32

import numpy as np
import resvg_py
from PIL import Image

DATA = Path(__file__).parents[1] / "dataloaders" / "data" / "icon_r"
SIZE, MARGIN, RENDERED, INK = 64, 2, 128, "#222222"
SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}"
height="{size}" viewBox="{left} {top} {width} {height}">{body}</svg>"""
MAX_PICTURES, TEST_SHARE = 120, 0.25  # a class
SAME_CLASS, OTHER_CLASS, PRETRAINING, REPEAT = 0.85, 0.95, 0.9, 0.98  # correlations above which pictures are twins

# Words in icon names that say how, not what is drawn. Those in TRAILING may also begin a meaningful name.
STYLE = """outline outlined outlines linear fill filled solid bold bolder duotone twotone thin rounded roundish sharp
baseline lined stroke stroked duo duocolor twocolor colored colour remix ios glyph dt lt 24px 16px 20px""".split()
TRAILING = """o f s r l sm md lg xl xs small large big mini micro fil alt black white light flat free two tone round
line lines regular color""".split()
LEADING = {"ic": {"round"}, "ion": {"md", "android"}, "bx": {"bx", "bxs"}, "bxs": {"bx", "bxs"}, "ei": {"sc"}}
NUMBERED = {"material-symbols", "material-symbols-light", "ic", "mdi"}  # a number is part of the name, not a size
SINGULAR = {"leaves": "leaf", "knives": "knife", "wolves": "wolf", "mice": "mouse", "feet": "foot", "teeth": "tooth"}
PLURAL = re.compile(r"(?<=[cs]h)es$|(?<=x)es$|(?<=..[^suia])s$")


def singular(word: str) -> str:
    return SINGULAR.get(word) or (word if word in ("news", "shorts") else PLURAL.sub("", word))


def normal_name(name: str, icon_set: str) -> str:
    """The name without style words and sizes, in the singular: ``baseline-homes-24`` becomes ``home``."""
    name, sized = name.lower(), icon_set not in NUMBERED
    words = [word for word in (re.sub(r"([a-z])(\d)", r"\1-\2", name) if sized else name).split("-") if word]
    if icon_set == "solar" and len(words) > 1 and words[-1] == "broken":
        words.pop()  # a style of that set
    if len(words) > 1 and words[0] in LEADING.get(icon_set, ()):
        words.pop(0)
    while len(words) > 1 and (words[-1] in STYLE + TRAILING or sized and re.fullmatch(r"\d{1,3}", words[-1])):
        words.pop()
    while len(words) > 1 and words[0] in STYLE:
        words.pop(0)
    return "-".join(map(singular, words))


def read_concepts(path: Path) -> dict[str, tuple[str, set[str], tuple[str, ...]]]:
    """``{concept: (mark, normal names, exclusions)}``; the file's head explains the format."""
    concepts = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line[0] != "#":
            concept, *words = line[1:].replace(":", "", 1).split()
            names = {"-".join(map(singular, word.split("-"))) for word in words if word[0] != "!"}
            names |= {re.sub(r"-\d+$", "", name) for name in names}
            concepts[concept] = line[0], names, tuple(word[1:] for word in words if word[0] == "!")
    return concepts


class Icons:
    """The icon sets: names and pictures. An icon is a pair ``(set, name)``."""

    def __init__(self, sets: list[dict[str, str]], cache: Path) -> None:
        self.family = {row["set"]: row["family"] for row in sets}
        self.sets = {row["set"]: download(row, cache) for row in sets}
        self.named = defaultdict(set)  # normal name -> icons
        for icon_set, data in self.sets.items():
            names = {name: name for name in data["icons"]}
            for alias, entry in data.get("aliases", {}).items():
                if entry.keys() <= {"parent", "hidden"} and entry["parent"] in data["icons"]:
                    names[alias] = entry["parent"]
            for name, icon in names.items():
                self.named[normal_name(name, icon_set)].add((icon_set, icon))

    def in_turn(self, icons: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Families in turn, in the order of checksums, so that the first pictures are by many designers."""
        turns, order = Counter(), []
        for icon in sorted(icons, key=lambda icon: (crc32(":".join(icon).encode()), icon)):
            family = self.family[icon[0]]
            order.append((turns[family], crc32((family + icon[1]).encode()), icon))
            turns[family] += 1
        return [icon for _, _, icon in sorted(order)]

    def draw(self, icon: tuple[str, str]) -> np.ndarray:
        """(64, 64, 3) uint8 on white, cropped to the ink; pictures without colour have 16 grey levels."""
        data = self.sets[icon[0]]
        entry = {"left": 0, "top": 0, "width": 16, "height": 16, **data, **data["icons"][icon[1]]}
        svg = SVG.format(size=RENDERED, **entry).replace("currentColor", INK)
        png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED, height=RENDERED, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        canvas = Image.new("RGBA", (SIZE, SIZE), "white")
        if box := image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox():
            image = image.crop(box)
            scale = (SIZE - 2 * MARGIN) / max(image.size)
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.HAMMING)
            canvas.alpha_composite(image, tuple((SIZE - side) // 2 for side in image.size))
        picture = np.asarray(canvas.convert("RGB"))
        if np.ptp(picture, -1).max() <= 8:
            picture = np.repeat((luminance(picture) + 8) // 17 * 17, 3).reshape(SIZE, SIZE, 3).astype(np.uint8)
        return picture


def download(row: dict[str, str], cache: Path) -> dict:
    """The icons of one row of ``sets.tsv``."""
    file = cache / f"{row['set']}-{row['version']}.tgz"
    if not file.is_file():
        url = f"https://registry.npmjs.org/@iconify-json/{row['set']}/-/{file.name}"
        file.write_bytes(urllib.request.urlopen(url, timeout=60).read())
    if hashlib.sha256(file.read_bytes()).hexdigest() != row["sha256"]:
        raise SystemExit(f"{file}: not the archive whose SHA-256 is in sets.tsv; delete it and try again")
    with tarfile.open(file) as archive:
        return json.load(archive.extractfile("package/icons.json"))


def luminance(picture: np.ndarray) -> np.ndarray:
    return (picture.astype(np.int64) @ [299, 587, 114] + 500) // 1000


class Twins:
    """Correlations between pictures of 32x32 pixels' luminance, from exact integer sums."""

    def __init__(self, pictures: list[np.ndarray]) -> None:
        half, n = SIZE // 2, (SIZE // 2) ** 2
        grey = [luminance(picture).reshape(half, 2, half, 2).sum((1, 3)).ravel() for picture in pictures]
        self.pixels = np.asarray(grey, dtype=np.float64)
        self.sums = self.pixels.sum(1)
        self.norms = np.sqrt(np.maximum(n * (self.pixels**2).sum(1) - self.sums**2, 1))  # 1: nothing drawn
        unit = (n * self.pixels - self.sums[:, None]) / (np.sqrt(n) * self.norms[:, None])
        self.unit = unit.astype(np.float32)  # its products are the correlations, faster but not exact

    def correlation(self, rows, columns) -> np.ndarray:
        products = self.pixels.shape[1] * (self.pixels[rows] @ self.pixels[columns].T)
        products -= np.outer(self.sums[rows], self.sums[columns])
        return products / np.outer(self.norms[rows], self.norms[columns])

    def without(self, rows: list[int], threshold: float) -> list[int]:
        """The rows less those that are empty or have a twin among the ones kept before."""
        rows = [row for row in rows if self.norms[row] > 1]
        twin, keep = self.correlation(rows, rows) > threshold, []
        for i in range(len(rows)):
            if not twin[i, keep].any():
                keep.append(i)
        return [rows[i] for i in keep]


def choose(icons: Icons, concepts: dict, found: dict, drawn: list, twins: Twins) -> dict[str, list[int]]:
    """The numbers of each class's pictures: none excluded, of two concepts, or with a twin."""
    number, rows = {icon: i for i, icon in enumerate(drawn)}, {}
    times = Counter(icon for mine in found.values() for icon in mine)
    for concept, (mark, _, exclusions) in concepts.items():
        if mark == "+":
            mine = [icon for icon in found[concept] if times[icon] == 1 and not ":".join(icon).startswith(exclusions)]
            rows[concept] = twins.without([number[icon] for icon in icons.in_turn(mine)], SAME_CLASS)
    every = [i for mine in rows.values() for i in mine]
    owner = np.repeat([*rows], [len(mine) for mine in rows.values()])
    for concept, mine in rows.items():
        ambiguous = ((twins.correlation(mine, every) > OTHER_CLASS) & (owner != concept)).any(1)
        rows[concept] = [i for i, bad in zip(mine, ambiguous, strict=True) if not bad][:MAX_PICTURES]
    return rows


def test_families(families: list[str], concept: str) -> set[str]:
    """Whole families that make up a quarter of a class's pictures."""
    chosen, room = set(), round(TEST_SHARE * len(families))
    for family, size in sorted(Counter(families).items(), key=lambda item: crc32((concept + item[0]).encode())):
        if size <= room:
            chosen.add(family)
            room -= size
    return chosen


def write_icon_r(rows: dict[str, list[int]], drawn: list[tuple[str, str]], pictures: list, family: dict) -> None:
    """``index.tsv``: a line per picture; ``images.zip``: lossless WebP sheets with the pictures in that order."""
    lines = ["label\tclass\tsplit\tsheet\tset\ticon"]
    with zipfile.ZipFile(DATA / "images.zip", "w") as archive:
        for label, concept in enumerate(sorted(rows, key=lambda concept: crc32(concept.encode()))):
            test, sheets = test_families([family[drawn[i][0]] for i in rows[concept]], concept), defaultdict(list)
            for i in rows[concept]:
                sheets[f"{label:03d}_colour.webp" if np.ptp(pictures[i], -1).any() else f"{label:03d}.webp"].append(i)
            for name, entries in sorted(sheets.items()):
                sheet, buffer = Image.fromarray(np.concatenate([pictures[i] for i in entries])), io.BytesIO()
                sheet.save(buffer, "WEBP", lossless=True, quality=90, method=4)
                archive.writestr(zipfile.ZipInfo(name), buffer.getvalue())  # without the time of writing
                for icon in (drawn[i] for i in entries):
                    split = "test" if family[icon[0]] in test else "train"
                    lines.append("\t".join((str(label), concept, split, name, *icon)))
    (DATA / "index.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(rows)} classes, {len(lines) - 1} pictures")


def write_pretraining(icons: Icons, concepts: dict, drawn: set, theirs: Twins, file: Path) -> None:
    """Pictures with none of the candidates' names and no twin among them; a tenth of the names is held out."""
    novel = {name for mark, names, _ in concepts.values() if mark != "=" for name in names}
    label_of = {name: concept for concept, (mark, names, _) in concepts.items() if mark == "=" for name in names}
    named, used = defaultdict(set), set(drawn)
    for name, found in icons.named.items():
        words = name.split("-")
        if novel.isdisjoint("-".join(words[i:j]) for j in range(1, len(words) + 1) for i in range(j)):
            named[label_of.get(name, name)] |= found
    unit, images, labels, kept = theirs.unit.T, [], [], []
    for name, found in sorted(named.items()):
        order = icons.in_turn(found - used)[:40]
        families = [icons.family[icon_set] for icon_set, _ in order]
        if len(order) < 4 or len({*families}) < 3:
            continue
        used.update(order)
        pictures = [icons.draw(icon) for icon in order]
        twins = Twins(pictures)
        near = (twins.unit @ unit).max(1) > PRETRAINING
        keep = twins.without(list(np.flatnonzero(~near)), REPEAT)
        if near.mean() <= 1 / 3 and len(keep) >= 4 and len({families[i] for i in keep}) >= 3:
            images += [pictures[i] for i in keep]
            labels += [len(kept)] * len(keep)
            kept.append(name)  # others are mostly novel classes under another name
    held = np.asarray([crc32(name.encode()) % 10 == 0 for name in kept])
    np.savez_compressed(file, images=np.stack(images), labels=np.asarray(labels), names=np.asarray(kept), held=held)
    print(f"pre-training: {len(images)} pictures of {len(kept)} names, {held.sum()} of them held out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--pretraining", type=Path, help="also write the pre-training pictures to this .npz")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    sets = (DATA / "sets.tsv").read_text(encoding="utf-8").splitlines()
    icons = Icons(list(csv.DictReader(sets, delimiter="\t")), args.cache)
    concepts = read_concepts(Path(__file__).with_name("icon_r_concepts.txt"))
    candidates = {concept: names for concept, (mark, names, _) in concepts.items() if mark != "="}
    found = {concept: {icon for name in names for icon in icons.named[name]} for concept, names in candidates.items()}
    drawn = sorted(set().union(*found.values()))
    pictures = [icons.draw(icon) for icon in drawn]
    twins = Twins(pictures)
    write_icon_r(choose(icons, concepts, found, drawn, twins), drawn, pictures, icons.family)
    if args.pretraining:
        write_pretraining(icons, concepts, {*drawn}, twins, args.pretraining)


if __name__ == "__main__":
    main()
