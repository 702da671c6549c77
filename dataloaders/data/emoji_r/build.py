"""Rebuild the pictures of Emoji-R bit for bit from their npm sources, and the base classes for pre-training.

    cp dataloaders/data/emoji_r/package*.json DIR && (cd DIR && npm ci)
    pip install -r dataloaders/data/emoji_r/requirements.txt
    python dataloaders/data/emoji_r/build.py --node_modules DIR/node_modules --out NEW_DIR [--base base.npz]
    sha256sum NEW_DIR/images.zip && cat dataloaders/data/emoji_r/SHA256SUMS

``index.json`` beside this script is the choice of classes and of test pictures: 200 emoji drawn at random with at
least 8 renditions, none with a median correlation above 0.8 to another one, and whole artist families, 3 renditions
of each class, drawn as test pictures. ``--base`` also writes the renditions of all other emoji that look like none of
them: ``images`` uint8 [n, 64, 64, 4] (straight alpha), ``labels`` int64 [n], ``sets`` [n].

The pixels are made by exact integer arithmetic or by pinned wheels, so they are the same on every machine.
"""

import argparse
import collections
import io
import json
import re
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import resvg_py
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent

SIZE = 64
MARGIN = 2  # pixels left free on the longer side
RENDER_SIZE = 128  # SVGs are rendered at twice the final size, then cropped to their ink and reduced
INK = (34, 34, 34)  # the colour of monochrome sets
MAX_CORRELATION = 0.8
MIN_SHARED_SETS = 3  # a median correlation over fewer sets says nothing

FONT_SET = "noto-emoji-font"
FONT_FILE = "@expo-google-fonts/noto-emoji/400Regular/NotoEmoji_400Regular.ttf"
ICON_SETS = ("twemoji", "noto", "noto-v1", "fxemoji", "emojione", "emojione-monotone")
ICON_SETS += ("fluent-emoji-flat", "fluent-emoji-high-contrast", "streamline-emojis")

ZODIAC = "Aries Taurus Gemini Cancer Leo Virgo Libra Scorpio Sagittarius Capricorn Aquarius Pisces Ophiuchus".split()
# Flags, keycaps, clocks, arrows and plain shapes by name; plain shapes include what is only a sign:
# letters on a button, mathematical and punctuation marks, hearts that differ in colour, moon phases.
EXCLUDED = re.compile(
    r"flag|skin tone|keycap|clock|thirty|arrow|circle$|square|diamond|triangle|medium-small|button|^input "
    r"|heart$|moon|mark$|mark button|dash$|^(plus|minus|multiply|divide|infinity|information)$|equals sign"
    r"|^circled|^(copyright|registered|trade mark)$|curly loop|asterisk|-pointed star$|^sparkle$",
    re.IGNORECASE,
)
KEPT = {"red heart", "broken heart", "anatomical heart", "crescent moon", "moon cake"}

Catalogue = dict[str, dict]  # code point key -> "name" and "group" in Unicode
Renditions = dict[str, dict[str, np.ndarray]]  # code point key -> set -> uint8 [64, 64, 4], straight alpha


def codepoint_key(codepoints: list[str]) -> str:
    """Join hexadecimal code points, without the variation selector that sets write inconsistently."""
    return "-".join(point.lower() for point in codepoints if point.lower() != "fe0f")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def load_catalogue(node_modules: Path) -> Catalogue:
    """All emoji of Unicode, in Unicode's order, by code point key."""
    data = read_json(node_modules / "unicode-emoji-json" / "data-by-emoji.json")
    return {codepoint_key([f"{ord(char):x}" for char in text]): entry for text, entry in data.items()}


def is_eligible(key: str, name: str, group: str) -> bool:
    """Whether the emoji shows a thing: no flag, skin tone, keycap, clock, arrow, plain shape, zodiac, ZWJ."""
    points = [int(point, 16) for point in key.split("-")]
    if group in ("Flags", "Component") or name in ZODIAC or any(p == 0x200D or 0x1F3FB <= p <= 0x1F3FF for p in points):
        return False
    return name in KEPT or not EXCLUDED.search(name)


def squash(name: str) -> str:
    """``Man’s Shoe`` and ``mans-shoe`` compare equal."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", ascii_name.replace("&", "and"))


class IconSet:
    """One iconify package: SVG bodies by icon name, aliases, and code points where the package has them."""

    def __init__(self, folder: Path):
        data = read_json(folder / "icons.json")
        self.icons = data["icons"]
        # An alias may also turn or mirror its parent; those are other pictures, and are left out.
        self.aliases = {
            name: entry["parent"]
            for name, entry in data.get("aliases", {}).items()
            if set(entry) == {"parent"} and entry["parent"] in self.icons
        }
        chars = read_json(folder / "chars.json") if (folder / "chars.json").exists() else {}
        self.key_names = [(codepoint_key(points.split("-")), name) for points, name in chars.items()]
        self.box = {"left": 0, "top": 0, "width": data.get("width", 16), "height": data.get("height", 16)}

    def svg(self, name: str) -> str:
        icon = {**self.box, **self.icons[name]}
        namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        box = f'viewBox="{icon["left"]} {icon["top"]} {icon["width"]} {icon["height"]}"'
        size = f'width="{RENDER_SIZE}" height="{RENDER_SIZE}"'
        return f'<svg {namespaces} {box} {size} color="#{bytes(INK).hex()}">{icon["body"]}</svg>'


def name_table(catalogue: Catalogue, sets: dict[str, IconSet]) -> dict[str, str]:
    """Squashed name -> code point key, by vote: emoji name, character name, names in other sets."""
    votes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for key, emoji in catalogue.items():
        votes[squash(emoji["name"])][key] += 100
        if "-" not in key and (character_name := unicodedata.name(chr(int(key, 16)), "")):
            votes[squash(character_name)][key] += 10
    for icons in sets.values():
        known = [(key, name) for key, name in icons.key_names if key in catalogue]
        key_of = {name: key for key, name in known}
        for key, name in known:
            votes[squash(name)][key] += 3
        for alias, parent in icons.aliases.items():
            if parent in key_of:
                votes[squash(alias)][key_of[parent]] += 1
    ranked = {name: counter.most_common(2) for name, counter in votes.items()}
    return {name: best[0][0] for name, best in ranked.items() if len(best) == 1 or best[1][1] < best[0][1]}


def match_icons(icons: IconSet, catalogue: Catalogue, names: dict[str, str]) -> dict[str, str]:
    """Code point key -> icon name for one set, by code point where the set has them, else by name."""
    targets, matched = {name: name for name in icons.icons}, {}
    targets |= {name: target for name, target in icons.aliases.items() if name not in targets}
    for key, name in icons.key_names:
        if key in catalogue and name in targets:
            matched.setdefault(key, targets[name])
    for name, target in () if icons.key_names else targets.items():
        # Numbered variants of one emoji (streamline's "cloud-1"): take the first.
        if key := names.get(squash(name)) or names.get(squash(re.sub(r"-1$", "", name))):
            matched.setdefault(key, target)
    return matched


def fit(image: Image.Image) -> np.ndarray | None:
    """Crop RGBA to its ink and centre it in uint8 [SIZE, SIZE, 4]; None for an empty picture."""
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
    return np.asarray(canvas)


def render_svg(svg: str) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def render_glyph(char: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    ink = Image.new("L", (320, 320))
    ImageDraw.Draw(ink).text((30, 20), char, font=font, fill=255)
    return Image.merge("RGBA", [Image.new("L", ink.size, level) for level in INK] + [ink])


def render_all(node_modules: Path, catalogue: Catalogue) -> Renditions:
    """All renditions of the eligible emoji; pictures that are empty are left out."""
    renditions: Renditions = {key: {} for key, e in catalogue.items() if is_eligible(key, e["name"], e["group"])}
    sets = {name: IconSet(node_modules / "@iconify-json" / name) for name in ICON_SETS}
    names = name_table(catalogue, sets)
    matched = {name: match_icons(icons, catalogue, names) for name, icons in sets.items()}
    font = ImageFont.truetype(node_modules / FONT_FILE, 200, layout_engine=ImageFont.Layout.BASIC)
    glyphs = TTFont(node_modules / FONT_FILE).getBestCmap()
    for key, found in renditions.items():
        images = {name: render_svg(sets[name].svg(icons[key])) for name, icons in matched.items() if key in icons}
        if "-" not in key and int(key, 16) in glyphs:
            images[FONT_SET] = render_glyph(chr(int(key, 16)), font)
        fitted = {name: fit(image) for name, image in images.items()}
        found.update({name: image for name, image in fitted.items() if image is not None})
    return renditions


def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 [..., 4] straight alpha -> uint8 [..., 3] on white, rounded to nearest."""
    colour, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def median_correlations(keys: list[str], renditions: Renditions) -> np.ndarray:
    """Median over the shared sets of the correlation of two classes [n, n], at every second pixel.

    It is NaN where too few sets are shared.
    """
    stacked = np.full((len(ICON_SETS) + 1, len(keys), len(keys)), np.nan)
    for layer, name in zip(stacked, [*ICON_SETS, FONT_SET], strict=True):
        present = [i for i, key in enumerate(keys) if name in renditions[key]]
        images = np.stack([on_white(renditions[keys[i]][name])[::2, ::2].ravel() for i in present])
        layer[np.ix_(present, present)] = np.corrcoef(images)
    stacked[:, (~np.isnan(stacked)).sum(0) < MIN_SHARED_SETS] = np.nan
    return np.nanmedian(stacked, axis=0)


def write_images(path: Path, images: list[dict], keys: list[str], renditions: Renditions) -> None:
    """Write images.zip (stored, sorted, fixed time stamps)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for image in sorted(images, key=lambda image: image["file"]):
            buffer, rendition = io.BytesIO(), renditions[keys[image["label"]]][image["set"]]
            # A higher quality or method costs minutes for 2 %.
            Image.fromarray(on_white(rendition)).save(buffer, "WEBP", lossless=True, quality=75, method=4)
            entry = zipfile.ZipInfo(image["file"], (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, buffer.getvalue())


def write_base(path: Path, renditions: Renditions, novel: list[str]) -> None:
    """Write the base classes' renditions: from one that looks like a novel class, that class would be learned."""
    keys = [key for key, found in renditions.items() if found]
    alike = (median_correlations(keys, renditions)[:, [keys.index(key) for key in novel]] > MAX_CORRELATION).any(1)
    base = [key for key, excluded in zip(keys, alike, strict=True) if key not in novel and not excluded]
    rows = [(label, name) for label, key in enumerate(base) for name in sorted(renditions[key])]
    np.savez(
        path,
        images=np.stack([renditions[base[label]][name] for label, name in rows]),
        labels=np.array([label for label, _ in rows], np.int64),
        sets=np.array([name for _, name in rows]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--node_modules", type=Path, required=True, help="what `npm ci` installed")
    parser.add_argument("--out", type=Path, required=True, help="folder for images.zip")
    parser.add_argument("--base", type=Path, help="also write the base classes to this .npz")
    args = parser.parse_args()
    index = read_json(HERE / "index.json")
    novel = [entry["codepoint"] for entry in index["classes"]]
    catalogue = load_catalogue(args.node_modules)
    renditions = render_all(args.node_modules, catalogue)
    args.out.mkdir(parents=True, exist_ok=True)
    write_images(args.out / "images.zip", index["images"], novel, renditions)
    if args.base:
        write_base(args.base, renditions, novel)


if __name__ == "__main__":
    main()
