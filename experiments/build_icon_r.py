"""Build Icon-R (dataloaders/data/icon_r) and, on request, the drawings that the project's backbones are pre-trained on.

    pip install resvg-py==0.5.0 pillow==13.0.0 numpy       # with these versions the same bytes come out
    python experiments/build_icon_r.py --cache FOLDER [--pretraining FILE.npz]

Icons of the sets in ``sets.tsv`` are matched by name to the concepts in ``icon_r_concepts.txt``, drawn in 64x64
pixels, rid of near-duplicates, and split into training and test pictures by families of sets (one designer, or
forks of one design). Sums over pixels are integers, exact in float64, so that every machine decides alike.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import tarfile
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

HERE = Path(__file__).parent
DATA = HERE.parent / "dataloaders" / "data" / "icon_r"
SIZE, MARGIN, RENDERED, INK = 64, 2, 128, "#222222"
MAX_PICTURES, TEST_SHARE = 120, 0.25  # a class
SAME_CLASS, OTHER_CLASS, PRETRAINING, REPEAT = 0.85, 0.95, 0.9, 0.98  # correlations above which pictures are twins

# Words in icon names that say how, not what is drawn. Those in TRAILING may also begin a meaningful name.
TRAILING = set("o f s r l sm md lg xl xs small large big mini micro fil alt black white light flat free".split())
TRAILING |= set("two tone round line lines regular color".split())
STYLE = TRAILING | set("outline outlined outlines linear fill filled solid bold bolder duotone twotone thin".split())
STYLE |= set("rounded roundish sharp baseline lined stroke stroked duo duocolor twocolor colored colour remix".split())
STYLE |= set("ios glyph dt lt 24px 16px 20px".split())
LEADING = {"ic": {"round"}, "ion": {"md", "android"}, "bx": {"bx", "bxs"}, "bxs": {"bx", "bxs"}, "ei": {"sc"}}
NUMBERED = {"material-symbols", "material-symbols-light", "ic", "mdi"}  # a number is part of the name, not a size
IRREGULAR = {"leaves": "leaf", "knives": "knife", "wolves": "wolf", "mice": "mouse", "feet": "foot", "teeth": "tooth"}


def checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def singular(word: str) -> str:
    if word in IRREGULAR or word in ("news", "shorts"):
        return IRREGULAR.get(word, word)
    if word.endswith(("ches", "shes", "xes")):
        return word[:-2]
    plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is", "as"))
    return word[:-1] if plural else word


def normal_name(name: str, icon_set: str) -> str:
    """The name without style words and sizes, in the singular: ``baseline-homes-24`` becomes ``home``."""
    name = name.lower()
    sized = icon_set not in NUMBERED
    words = [word for word in (re.sub(r"([a-z])(\d)", r"\1-\2", name) if sized else name).split("-") if word]
    if icon_set == "solar" and len(words) > 1 and words[-1] == "broken":
        words.pop()  # a style of that set
    if len(words) > 1 and words[0] in LEADING.get(icon_set, ()):
        words.pop(0)
    while len(words) > 1:
        if words[-1] in STYLE or sized and re.fullmatch(r"\d{1,3}", words[-1]):
            words.pop()
        elif words[0] in STYLE - TRAILING:
            words.pop(0)
        else:
            break
    return "-".join(map(singular, words))


def read_concepts(path: Path) -> dict[str, tuple[str, list[str], list[str]]]:
    """``{concept: (mark, normal names, exclusions)}``; the file's head explains the format."""
    concepts = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            head, _, rest = line.partition(":")
            words = rest.split()
            names = ["-".join(map(singular, word.split("-"))) for word in words if word[0] != "!"]
            names = sorted({*names, *(re.sub(r"-\d+$", "", name) for name in names)})
            concepts[head[1:].strip()] = head[0], names, [word[1:] for word in words if word[0] == "!"]
    return concepts


class Icons:
    """The icon sets: names and pictures. An icon is a pair ``(set, name)``."""

    def __init__(self, sets: list[dict[str, str]], cache: Path) -> None:
        self.family = {row["set"]: row["family"] for row in sets}
        self.sets = {row["set"]: self._download(row, cache) for row in sets}
        self.named = defaultdict(set)  # normal name -> icons
        for icon_set, data in self.sets.items():
            aliases = {
                alias: entry["parent"]
                for alias, entry in data.get("aliases", {}).items()
                if set(entry) <= {"parent", "hidden"} and entry["parent"] in data["icons"]
            }
            for name, icon in {**{name: name for name in data["icons"]}, **aliases}.items():
                self.named[normal_name(name, icon_set)].add((icon_set, icon))

    @staticmethod
    def _download(row: dict[str, str], cache: Path) -> dict:
        file = cache / f"{row['set']}-{row['version']}.tgz"
        if not file.is_file():
            url = f"https://registry.npmjs.org/@iconify-json/{row['set']}/-/{file.name}"
            file.write_bytes(urllib.request.urlopen(url, timeout=60).read())
        if hashlib.sha256(file.read_bytes()).hexdigest() != row["sha256"]:
            raise SystemExit(f"{file}: not the archive whose SHA-256 is in sets.tsv; delete it and try again")
        with tarfile.open(file) as archive:
            return json.load(archive.extractfile("package/icons.json"))

    def in_turn(self, icons: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Families in turn, in the order of checksums, so that the first pictures are by many designers."""
        turns, order = Counter(), []
        for icon in sorted(icons, key=lambda icon: (checksum(":".join(icon)), icon)):
            family = self.family[icon[0]]
            order.append((turns[family], checksum(family + icon[1]), icon))
            turns[family] += 1
        return [icon for _, _, icon in sorted(order)]

    def draw(self, icon: tuple[str, str]) -> np.ndarray:
        """(64, 64, 3) uint8 on white, cropped to the ink; pictures without colour have 16 grey levels."""
        data = self.sets[icon[0]]
        entry = data["icons"][icon[1]]
        defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
        view = " ".join(str(entry.get(key, data.get(key, default))) for key, default in defaults.items())
        body = entry["body"].replace("currentColor", INK)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{RENDERED}" '
            f'height="{RENDERED}" viewBox="{view}">{body}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED, height=RENDERED, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        canvas = Image.new("RGBA", (SIZE, SIZE), "white")
        box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
        if box:
            image = image.crop(box)
            scale = (SIZE - 2 * MARGIN) / max(image.size)
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.HAMMING)
            canvas.alpha_composite(image, tuple((SIZE - side) // 2 for side in image.size))
        picture = np.asarray(canvas.convert("RGB"))
        if not coloured(picture):
            picture = np.repeat((luminance(picture) + 8) // 17 * 17, 3).reshape(SIZE, SIZE, 3).astype(np.uint8)
        return picture


def luminance(picture: np.ndarray) -> np.ndarray:
    return (picture.astype(np.int64) @ [299, 587, 114] + 500) // 1000


def coloured(picture: np.ndarray) -> bool:
    return bool((picture.max(-1).astype(int) - picture.min(-1)).max() > 8)


class Twins:
    """Correlations between pictures of 32x32 pixels' luminance, from exact integer sums."""

    def __init__(self, pictures: list[np.ndarray]) -> None:
        half = SIZE // 2
        grey = [luminance(picture).reshape(half, 2, half, 2).sum((1, 3)).ravel() for picture in pictures]
        self.pixels = np.asarray(grey, dtype=np.float64)  # integers: every sum below is exact
        self.sums = self.pixels.sum(1)
        self.norms = np.sqrt(len(grey[0]) * (self.pixels**2).sum(1) - self.sums**2)
        self.empty = self.norms == 0
        self.norms[self.empty] = 1

    def correlation(self, rows, columns) -> np.ndarray:
        products = self.pixels.shape[1] * (self.pixels[rows] @ self.pixels[columns].T)
        return (products - np.outer(self.sums[rows], self.sums[columns])) / np.outer(
            self.norms[rows], self.norms[columns]
        )

    def unit(self) -> np.ndarray:
        """float32 vectors whose products are the correlations, fast but not exact."""
        n = self.pixels.shape[1]
        return ((n * self.pixels - self.sums[:, None]) / (np.sqrt(n) * self.norms[:, None])).astype(np.float32)

    def without(self, rows: list[int], threshold: float) -> list[int]:
        """The rows less those that are empty or have a twin among the ones kept before."""
        rows = [row for row in rows if not self.empty[row]]
        twin, keep = self.correlation(rows, rows) > threshold, []
        for i in range(len(rows)):
            if not twin[i, keep].any():
                keep.append(i)
        return [rows[i] for i in keep]


class Candidates:
    """The pictures of all concepts that are, or might have been, classes of Icon-R."""

    def __init__(self, icons: Icons, concepts: dict) -> None:
        self.concepts = {concept: entry for concept, entry in concepts.items() if entry[0] in "+-"}
        self.names = defaultdict(set)  # (concept, icon) -> normal names
        for concept, (_, names, _) in self.concepts.items():
            for name in names:
                for icon in icons.named[name]:
                    self.names[concept, icon].add(name)
        self.icons = sorted({icon for _, icon in self.names})
        self.row = {icon: row for row, icon in enumerate(self.icons)}
        self.pictures = [icons.draw(icon) for icon in self.icons]
        self.twins = Twins(self.pictures)

    def chosen(self, icons: Icons, marks: str) -> dict[str, list[int]]:
        """Rows of the classes' pictures: none excluded, of two classes, or with a twin."""
        classes = Counter(icon for _, icon in self.names)
        rows = {}
        for concept, (mark, _, exclusions) in self.concepts.items():
            if mark in marks:
                mine = [icon for other, icon in self.names if other == concept and classes[icon] == 1]
                starts = tuple(exclusion if ":" in exclusion else exclusion + ":" for exclusion in exclusions)
                mine = [icon for icon in mine if not ":".join(icon).startswith(starts)]
                rows[concept] = self.twins.without([self.row[icon] for icon in icons.in_turn(mine)], SAME_CLASS)
        every = [row for mine in rows.values() for row in mine]
        owner = np.repeat(range(len(rows)), [len(mine) for mine in rows.values()])
        ambiguous = set()
        for label, mine in enumerate(rows.values()):
            twin = (self.twins.correlation(mine, every) > OTHER_CLASS) & (owner != label)
            ambiguous |= {row for row, bad in zip(mine, twin.any(1), strict=True) if bad}
        return {concept: [row for row in mine if row not in ambiguous][:MAX_PICTURES] for concept, mine in rows.items()}


def test_families(families: list[str], concept: str) -> set[str]:
    """Whole families that make up a quarter of a class's pictures."""
    chosen, room = set(), round(TEST_SHARE * len(families))
    for family, size in sorted(Counter(families).items(), key=lambda item: checksum(concept + item[0])):
        if size <= room:
            chosen.add(family)
            room -= size
    return chosen


def sheet(pictures: list[np.ndarray]) -> bytes:
    """Pictures one above the other as a lossless WebP."""
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(pictures)).save(buffer, "WEBP", lossless=True, quality=90, method=4)
    return buffer.getvalue()


def write_icon_r(icons: Icons, candidates: Candidates, out: Path) -> None:
    """``index.tsv``: a line per picture; ``images.zip``: sheets with the pictures in that order."""
    lines = ["label\tclass\tsplit\tsheet\tset\ticon"]
    rows = candidates.chosen(icons, "+")
    with zipfile.ZipFile(out / "images.zip", "w") as archive:
        for label, concept in enumerate(sorted(rows, key=checksum)):
            families = [icons.family[candidates.icons[row][0]] for row in rows[concept]]
            test, sheets = test_families(families, concept), defaultdict(list)
            for row, family in zip(rows[concept], families, strict=True):
                colour = "_colour" if coloured(candidates.pictures[row]) else ""
                sheets[f"{label:03d}{colour}.webp"].append((row, "test" if family in test else "train"))
            for name, entries in sorted(sheets.items()):
                data = sheet([candidates.pictures[row] for row, _ in entries])
                archive.writestr(zipfile.ZipInfo(name), data)  # without the time of writing
                for row, split in entries:
                    lines.append("\t".join((str(label), concept, split, name, *candidates.icons[row])))
    (out / "index.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    splits = Counter(line.split("\t")[2] for line in lines[1:])
    print(f"{len(rows)} classes, {splits['train']} training and {splits['test']} test pictures")


def write_pretraining(icons: Icons, candidates: Candidates, concepts: dict, file: Path) -> None:
    """Pictures with none of the candidates' names and no twin among them; a tenth of the names is held out."""
    novel = {name for _, names, _ in candidates.concepts.values() for name in names}
    longest = max(name.count("-") for name in novel) + 1
    label_of = {name: concept for concept, (mark, names, _) in concepts.items() if mark == "=" for name in names}
    named = defaultdict(set)
    for name, found in icons.named.items():
        words = name.split("-")
        runs = {"-".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words))}
        if not runs & novel:
            named[label_of.get(name, name)] |= {icon for icon in found if icon not in candidates.row}
    theirs, images, labels, names = candidates.twins.unit(), [], [], []
    used = set()
    for name, found in sorted(named.items()):
        order = icons.in_turn([icon for icon in found if icon not in used])
        if len({icons.family[icon[0]] for icon in order}) < 3 or len(order) < 4:
            continue
        order = order[:40]
        used |= set(order)
        pictures = [icons.draw(icon) for icon in order]
        twins = Twins(pictures)
        near = (twins.unit() @ theirs.T).max(1) > PRETRAINING
        if near.mean() > 1 / 3:
            continue  # such a name is a novel class under another name
        keep = twins.without([row for row in range(len(order)) if not near[row]], REPEAT)
        if len(keep) >= 4 and len({icons.family[order[row][0]] for row in keep}) >= 3:
            images += [pictures[row] for row in keep]
            labels += [len(names)] * len(keep)
            names.append(name)
    held = np.asarray([checksum(name) % 10 == 0 for name in names])
    np.savez_compressed(file, images=np.stack(images), labels=np.asarray(labels), names=np.asarray(names), held=held)
    print(f"pre-training: {len(images)} pictures of {len(names)} names, {held.sum()} of them held out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder for the packages; missing ones are downloaded"
    )
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--pretraining", type=Path, help="also write the pre-training pictures to this .npz")
    args = parser.parse_args()
    for folder in (args.cache, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    with (DATA / "sets.tsv").open(encoding="utf-8", newline="") as file:
        icons = Icons(list(csv.DictReader(file, delimiter="\t")), args.cache)
    concepts = read_concepts(HERE / "icon_r_concepts.txt")
    candidates = Candidates(icons, concepts)
    write_icon_r(icons, candidates, args.out)
    if args.pretraining:
        write_pretraining(icons, candidates, concepts, args.pretraining)


if __name__ == "__main__":
    main()
