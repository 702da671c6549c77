"""Rebuild Emoji-R bit for bit from its npm sources, and the base classes for pre-training.

    cp dataloaders/data/emoji_r/package*.json DIR && (cd DIR && npm ci)
    pip install -r dataloaders/data/emoji_r/requirements.txt
    python dataloaders/data/emoji_r/build.py --node_modules DIR/node_modules --out NEW_DIR [--base base.npz]

Writes ``images.zip`` and ``index.json`` to ``--out`` and compares them with ``SHA256SUMS`` beside this
script (exit code 1 if they differ; ``--write_checksums`` records them instead). ``--base`` also writes
the renditions of the base classes, which only pre-training uses and which the repository does not hold:
``images`` uint8 [n, 64, 64, 4] (straight alpha), ``labels`` int64 [n], ``names`` and ``codepoints``
[classes], ``sets`` [n].

Every step is exact integer or correctly rounded arithmetic (or a pinned wheel's), so that the selection
and the pixels do not depend on the machine.
"""

import argparse
import collections
import hashlib
import io
import json
import logging
import re
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

LOG = logging.getLogger("emoji_r")
HERE = Path(__file__).resolve().parent

SIZE = 64
MARGIN = 2  # pixels left free on the longer side
RENDER_SIZE = 128  # SVGs are rendered at twice the final size, then cropped to their ink and reduced
INK = (34, 34, 34)  # the colour of monochrome sets
SEED = 0

NUM_NOVEL = 200
MIN_RENDITIONS = 8
TEST_RENDITIONS = 3
MAX_CORRELATION = 0.8
MIN_SHARED_SETS = 3  # a median correlation over fewer sets says nothing
# Faces, people and signs are many and alike: cap them, so that most novel classes are things.
GROUP_CAPS = {"Smileys & Emotion": 20, "People & Body": 25, "Symbols": 10}


class Source(NamedTuple):
    """A set of renditions; sets of one ``family`` are the work of the same artists."""

    name: str
    package: str
    family: str


FONT_SET = "noto-emoji-font"
FONT_FILE = "400Regular/NotoEmoji_400Regular.ttf"
SOURCES = (
    Source("twemoji", "@iconify-json/twemoji", "twemoji"),
    Source("noto", "@iconify-json/noto", "noto"),
    Source("noto-v1", "@iconify-json/noto-v1", "noto-v1"),
    Source("fxemoji", "@iconify-json/fxemoji", "fxemoji"),
    Source("emojione", "@iconify-json/emojione", "emojione"),
    Source("emojione-monotone", "@iconify-json/emojione-monotone", "emojione"),
    Source("fluent-emoji-flat", "@iconify-json/fluent-emoji-flat", "fluent"),
    Source("fluent-emoji-high-contrast", "@iconify-json/fluent-emoji-high-contrast", "fluent"),
    Source("streamline-emojis", "@iconify-json/streamline-emojis", "streamline"),
    Source(FONT_SET, "@expo-google-fonts/noto-emoji", "noto"),
)
FAMILY = {source.name: source.family for source in SOURCES}

ZODIAC = set("Aries Taurus Gemini Cancer Leo Virgo Libra Scorpio Sagittarius Capricorn Aquarius Pisces "
             "Ophiuchus".split())
# Flags, keycaps, clocks, arrows and plain shapes by name; plain shapes include what is only a sign:
# letters on a button, mathematical and punctuation marks, hearts that differ in colour, moon phases.
EXCLUDED = re.compile(
    r"flag|skin tone|keycap|clock|thirty|arrow|circle$|square|diamond|triangle|medium-small|button|^input "
    r"|heart$|moon|mark$|mark button|dash$|^(plus|minus|multiply|divide|infinity|information)$|equals sign"
    r"|^circled|^(copyright|registered|trade mark)$|curly loop|asterisk|-pointed star$|^sparkle$",
    re.IGNORECASE,
)
KEPT = {"red heart", "broken heart", "anatomical heart", "crescent moon", "moon cake"}


class Emoji(NamedTuple):
    """A class: its Unicode name, its group, and its code points as ``1f1e6-1f1e8`` without variation."""

    key: str
    name: str
    group: str


def codepoint_key(codepoints: list[str]) -> str:
    """Join hexadecimal code points, without the variation selector that sets write inconsistently."""
    return "-".join(point.lower() for point in codepoints if point.lower() != "fe0f")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def load_catalogue(node_modules: Path) -> dict[str, Emoji]:
    """All emoji of Unicode, in Unicode's order, by code point key."""
    data = read_json(node_modules / "unicode-emoji-json" / "data-by-emoji.json")
    catalogue = {}
    for text, entry in data.items():
        key = codepoint_key([f"{ord(char):x}" for char in text])
        catalogue[key] = Emoji(key, entry["name"], entry["group"])
    return catalogue


def is_eligible(emoji: Emoji) -> bool:
    """Whether the emoji shows a thing: no flag, skin tone, keycap, clock, arrow, plain shape, zodiac, ZWJ."""
    points = emoji.key.split("-")
    if emoji.group in ("Flags", "Component") or emoji.name in ZODIAC or "200d" in points:
        return False
    if any(0x1F3FB <= int(point, 16) <= 0x1F3FF for point in points):
        return False
    return emoji.name in KEPT or not EXCLUDED.search(emoji.name)


def squash(name: str) -> str:
    """``Man’s Shoe`` and ``mans-shoe`` compare equal."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", ascii_name.replace("&", "and"))


class IconSet:
    """One iconify package: SVG bodies by icon name, aliases, and code points where the package has them."""

    def __init__(self, folder: Path):
        data = read_json(folder / "icons.json")
        chars = folder / "chars.json"
        self.icons: dict[str, dict] = data["icons"]
        # An alias may also turn or mirror its parent; those are other pictures, and are left out.
        self.aliases = {
            name: entry["parent"]
            for name, entry in data.get("aliases", {}).items()
            if set(entry) == {"parent"} and entry["parent"] in self.icons
        }
        self.chars: dict[str, str] = read_json(chars) if chars.exists() else {}
        self.width, self.height = data.get("width", 16), data.get("height", 16)

    def svg(self, name: str) -> str:
        icon = self.icons[name]
        box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", self.width),
               icon.get("height", self.height))
        colour = "#" + bytes(INK).hex()
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box[0]} {box[1]} {box[2]} {box[3]}" width="{RENDER_SIZE}" height="{RENDER_SIZE}" '
            f'color="{colour}">{icon["body"]}</svg>'
        )


def name_table(catalogue: dict[str, Emoji], sets: dict[str, IconSet]) -> dict[str, str]:
    """Squashed name -> code point key, by vote: emoji name, character name, names in other sets."""
    votes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for key, emoji in catalogue.items():
        votes[squash(emoji.name)][key] += 100
        if "-" not in key:
            character_name = unicodedata.name(chr(int(key, 16)), None)
            if character_name:
                votes[squash(character_name)][key] += 10
    for icons in sets.values():
        key_of = {}
        for points, name in icons.chars.items():
            key = codepoint_key(points.split("-"))
            if key in catalogue:
                key_of[name] = key
                votes[squash(name)][key] += 3
        for alias, parent in icons.aliases.items():
            if parent in key_of:
                votes[squash(alias)][key_of[parent]] += 1
    table = {}
    for name, counter in votes.items():
        (best, count), *rest = counter.most_common(2)
        if not rest or rest[0][1] < count:
            table[name] = best
    return table


def match_icons(icons: IconSet, catalogue: dict[str, Emoji], names: dict[str, str]) -> dict[str, str]:
    """Code point key -> icon name for one set, by code point where the set has them, else by name."""
    matched: dict[str, str] = {}
    for points, name in icons.chars.items():
        key = codepoint_key(points.split("-"))
        target = name if name in icons.icons else icons.aliases.get(name)
        if key in catalogue and target:
            matched.setdefault(key, target)
    if icons.chars:
        return matched
    candidates = [(name, name) for name in icons.icons] + list(icons.aliases.items())
    for name, target in candidates:
        # Numbered variants of one emoji (streamline's "cloud-1"): take the first.
        key = names.get(squash(name)) or names.get(squash(re.sub(r"-1$", "", name)))
        if key:
            matched.setdefault(key, target)
    return matched


def fit(image: Image.Image) -> Image.Image | None:
    """Crop RGBA to its ink and centre it in SIZE x SIZE; None for an empty picture."""
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = (SIZE - 2 * MARGIN) / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # Pillow premultiplies RGBA for resizing, so no dark fringe appears; a filter without negative lobes
    # leaves no ringing, which would make the lossless files a third larger.
    image = image.resize((width, height), Image.Resampling.HAMMING)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - width) // 2, (SIZE - height) // 2))
    return canvas


def render_svg(svg: str) -> Image.Image:
    png = bytes(resvg_py.svg_to_bytes(
        svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def render_glyph(char: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    ink = Image.new("L", (320, 320))
    ImageDraw.Draw(ink).text((30, 20), char, font=font, fill=255)
    return Image.merge("RGBA", [Image.new("L", ink.size, level) for level in INK] + [ink])


Renditions = dict[str, dict[str, np.ndarray]]  # code point key -> set -> uint8 [64, 64, 4], straight alpha


def render_all(node_modules: Path, catalogue: dict[str, Emoji]) -> Renditions:
    """All renditions of the eligible emoji; pictures that are empty are left out."""
    eligible = [emoji.key for emoji in catalogue.values() if is_eligible(emoji)]
    renditions: Renditions = {key: {} for key in eligible}
    sets = {source.name: IconSet(node_modules / source.package)
            for source in SOURCES if source.name != FONT_SET}
    names = name_table(catalogue, sets)
    for set_name, icons in sets.items():
        matched = match_icons(icons, catalogue, names)
        for key in eligible:
            image = fit(render_svg(icons.svg(matched[key]))) if key in matched else None
            if image is not None:
                renditions[key][set_name] = np.asarray(image)
        LOG.info("%-28s %4d of %d icons matched, %4d eligible", set_name, len(matched), len(icons.icons),
                 sum(set_name in found for found in renditions.values()))
    path = node_modules / SOURCES[-1].package / FONT_FILE
    glyphs = TTFont(path).getBestCmap()
    font = ImageFont.truetype(path, 200, layout_engine=ImageFont.Layout.BASIC)
    for key in eligible:
        if "-" in key or int(key, 16) not in glyphs:
            continue
        image = fit(render_glyph(chr(int(key, 16)), font))
        if image is not None:
            renditions[key][FONT_SET] = np.asarray(image)
    return renditions


def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 [..., 4] straight alpha -> uint8 [..., 3] on white, rounded to nearest."""
    colour, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def correlations(images: np.ndarray) -> np.ndarray:
    """Pearson correlations [n, n] of uint8 images [n, 64, 64, 3], at every second pixel.

    All sums are integers below 2^53, exact in float64 in any order of summation.
    """
    pixels = images[:, ::2, ::2].reshape(len(images), -1).astype(np.float64)
    count, sums = pixels.shape[1], pixels.sum(1)
    covariance = count * (pixels @ pixels.T) - np.outer(sums, sums)
    deviation = np.sqrt(np.maximum(np.diag(covariance), 1.0))
    return covariance / np.outer(deviation, deviation)


def median_correlations(keys: list[str], renditions: Renditions) -> np.ndarray:
    """Median over the shared sets of the correlation of two classes [n, n]; -1 where too few are shared."""
    stacked = np.full((len(SOURCES), len(keys), len(keys)), np.nan)
    for layer, source in enumerate(SOURCES):
        present = [i for i, key in enumerate(keys) if source.name in renditions[key]]
        images = np.stack([on_white(renditions[keys[i]][source.name]) for i in present])
        stacked[layer][np.ix_(present, present)] = correlations(images)
    stacked.sort(axis=0)  # NaN goes last
    shared = (~np.isnan(stacked)).sum(0)
    low = np.take_along_axis(stacked, np.maximum((shared - 1) // 2, 0)[None], 0)[0]
    high = np.take_along_axis(stacked, np.maximum(shared // 2, 0).clip(max=len(SOURCES) - 1)[None], 0)[0]
    median = np.where(shared >= MIN_SHARED_SETS, (low + high) / 2, -1.0)
    np.fill_diagonal(median, -1.0)
    return median


def split_renditions(sets: list[str], rng: np.random.RandomState) -> set[str] | None:
    """Draw whole families until exactly TEST_RENDITIONS sets are test sets; None if no draw can."""
    families: dict[str, list[str]] = {}
    for name in sets:
        families.setdefault(FAMILY[name], []).append(name)
    for _ in range(20):
        test: list[str] = []
        for family in rng.permutation(sorted(families)):
            if len(test) + len(families[family]) <= TEST_RENDITIONS:
                test += families[family]
        if len(test) == TEST_RENDITIONS:
            return set(test)
    return None


def choose_novel(catalogue: dict[str, Emoji], renditions: Renditions, similar: np.ndarray,
                 keys: list[str], rng: np.random.RandomState) -> dict[str, set[str]]:
    """Draw the novel classes: code point key -> test sets, in label order."""
    groups: collections.Counter = collections.Counter()
    novel: dict[str, set[str]] = {}
    taken: list[int] = []
    candidates = [i for i, key in enumerate(keys) if len(renditions[key]) >= MIN_RENDITIONS]
    for i in rng.permutation(candidates):
        emoji = catalogue[keys[i]]
        if any(similar[i, j] > MAX_CORRELATION for j in taken):
            continue
        taken.append(i)
        if len(novel) == NUM_NOVEL or groups[emoji.group] >= GROUP_CAPS.get(emoji.group, len(keys)):
            continue
        test = split_renditions(list(renditions[emoji.key]), rng)
        if test is not None:
            groups[emoji.group] += 1
            novel[emoji.key] = test
    LOG.info("%d candidates with %d renditions, %d distinct, %d novel: %s", len(candidates), MIN_RENDITIONS,
             len(taken), len(novel), dict(groups))
    order = rng.permutation(list(novel))
    return {str(key): novel[key] for key in order}


def write_novel(folder: Path, catalogue: dict[str, Emoji], renditions: Renditions,
                novel: dict[str, set[str]]) -> None:
    """Write images.zip (stored, sorted, fixed time stamps) and index.json."""
    images, blobs = [], {}
    for label, (key, test) in enumerate(novel.items()):
        for set_name in sorted(renditions[key]):
            name = f"{label:03d}/{set_name}.webp"
            buffer = io.BytesIO()
            Image.fromarray(on_white(renditions[key][set_name])).save(
                buffer, "WEBP", lossless=True, quality=75, method=4)  # effort: more costs minutes for 2 %
            blobs[name] = buffer.getvalue()
            images.append({"file": name, "label": label, "set": set_name,
                           "split": "test" if set_name in test else "train"})
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(blobs):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, blobs[name])
    classes = [json.dumps({"name": catalogue[key].name, "codepoint": key}, ensure_ascii=False)
               for key in novel]
    rows = [json.dumps(image) for image in images]
    text = '{"classes": [\n' + ",\n".join(classes) + '\n],\n"images": [\n' + ",\n".join(rows) + "\n]}\n"
    (folder / "index.json").write_text(text, encoding="utf-8", newline="\n")
    splits = collections.Counter(image["split"] for image in images)
    LOG.info("novel: %s; archive of %d bytes", dict(splits), (folder / "images.zip").stat().st_size)


def write_base(path: Path, catalogue: dict[str, Emoji], renditions: Renditions, keys: list[str]) -> None:
    """Write the base classes' renditions for pre-training."""
    rows = [(label, name) for label, key in enumerate(keys) for name in sorted(renditions[key])]
    np.savez(
        path,
        images=np.stack([renditions[keys[label]][name] for label, name in rows]),
        labels=np.array([label for label, _ in rows], np.int64),
        sets=np.array([name for _, name in rows]),
        names=np.array([catalogue[key].name for key in keys]),
        codepoints=np.array(keys),
    )
    LOG.info("base: %d classes, %d images", len(keys), len(rows))


def checksums(folder: Path) -> str:
    """The contents of SHA256SUMS for the two files that are built."""
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
             for name in ("images.zip", "index.json")]
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--node_modules", type=Path, required=True, help="what `npm ci` installed")
    parser.add_argument("--out", type=Path, required=True, help="folder for images.zip and index.json")
    parser.add_argument("--base", type=Path, help="also write the base classes to this .npz")
    parser.add_argument("--write_checksums", action="store_true",
                        help="record SHA256SUMS instead of checking it")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(SEED)

    catalogue = load_catalogue(args.node_modules)
    renditions = render_all(args.node_modules, catalogue)
    keys = [key for key, found in renditions.items() if found]
    similar = median_correlations(keys, renditions)
    novel = choose_novel(catalogue, renditions, similar, keys, rng)
    write_novel(args.out, catalogue, renditions, novel)
    if args.base:
        rows = [i for i, key in enumerate(keys) if key in novel]
        # A base class that looks like a novel class would let pre-training see the novel class.
        base = [key for i, key in enumerate(keys)
                if key not in novel and not (similar[i, rows] > MAX_CORRELATION).any()]
        write_base(args.base, catalogue, renditions, base)

    if args.write_checksums:
        (HERE / "SHA256SUMS").write_text(checksums(args.out), newline="\n")
    elif checksums(args.out) != (HERE / "SHA256SUMS").read_text():
        LOG.error("the result differs from SHA256SUMS: check the versions in requirements.txt and "
                  "package-lock.json")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
