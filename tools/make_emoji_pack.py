"""Build the embedded emoji pack (``dit/data/assets``) from three unpacked npm packages.

    npm pack emoji-datasource-google@16.0.0 cldr-annotations-full@48.2.0 cldr-annotations-derived-full@48.2.0
    # unpack each into SOURCE/<package name>/package
    python tools/make_emoji_pack.py SOURCE dit/data/assets

The pictures (64x64 RGBA PNG, Noto Emoji) come from the first package, the English short names from the other
two. Nothing here depends on time, hash seeds or the order of a directory: the same input gives the same bytes
(made with Pillow 13.0 and numpy 2.4; another zlib may pack the same arrays into other bytes).

What it does to the pictures: sRGB to linear light, multiply by alpha, LANCZOS from 64 to 32 px, back to sRGB,
multiply by alpha once more and store as uint8 [N, 32 rows, 4, 32 columns], colour already multiplied by
alpha: what the renderer multiplies.

What it does to the names: CLDR short names in lower case with neither accents nor punctuation, made nouns
where they are none ("plus" becomes "plus sign"), an article where English wants one, and a kind ("fruit",
"animal") from the Unicode subcategory.

What it does to the split: pictures that are variants of each other (skin tone, gender, direction), or nearer
than ``SAME`` in perceptual distance, mirrored or not, are one group, and a group is never divided. About 5 %
of the emoji of every category are held out: groups that are nowhere nearer than ``APART`` to a picture of
another group, in a fixed hash order in which those whose words all occur elsewhere come first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PICTURES = "emoji-datasource-google"
NAMES = ("cldr-annotations-full", "cldr-annotations-derived-full")
VERSIONS = {PICTURES: "16.0.0", NAMES[0]: "48.2.0", NAMES[1]: "48.2.0"}
SIDE = 32
# Root mean square difference over the area that either picture covers, colours in 0..1. Looked at by eye:
# below 0.1 stand the faces of a clock, keycaps and faces that differ by a mouth; at 0.12 a snowman with and
# without snow; at 0.22 tiger and leopard.
SAME = 0.10
APART = 0.15
HELD_OUT = 0.05
LARGEST = 3  # members of a held-out group: a few big families would crowd 95 emoji

SKIN = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}
CATEGORIES = {
    "Smileys & Emotion": "smileys", "People & Body": "people", "Animals & Nature": "nature",
    "Food & Drink": "food", "Travel & Places": "travel", "Activities": "activities", "Objects": "objects",
    "Symbols": "symbols", "Flags": "flags",
}  # fmt: skip
# Unicode subcategory -> kind; every other one is a "symbol".
KINDS = {
    "activities": "activity", "animal-amphibian": "animal", "animal-bird": "bird", "animal-bug": "bug",
    "animal-mammal": "animal", "animal-marine": "sea animal", "animal-reptile": "reptile",
    "arts & crafts": "craft", "award-medal": "award", "book-paper": "paper", "country-flag": "flag",
    "drink": "drink", "event": "celebration", "face-affection": "face", "face-concerned": "face",
    "face-costume": "face", "face-glasses": "face", "face-hand": "face", "face-hat": "face",
    "face-negative": "face", "face-neutral-skeptical": "face", "face-sleepy": "face",
    "face-smiling": "face", "face-tongue": "face", "face-unwell": "face", "cat-face": "face",
    "monkey-face": "face", "family": "people", "flag": "flag", "food-asian": "food", "food-fruit": "fruit",
    "food-prepared": "food", "food-sweet": "food", "food-vegetable": "vegetable", "game": "game",
    "geometric": "shape", "hand-fingers-closed": "hand", "hand-fingers-open": "hand",
    "hand-fingers-partial": "hand", "hand-prop": "hand", "hand-single-finger": "hand", "hands": "hand",
    "body-parts": "body part", "heart": "symbol", "emotion": "symbol", "light & video": "object",
    "musical-instrument": "instrument", "music": "music", "person": "person", "person-activity": "person",
    "person-fantasy": "person", "person-gesture": "person", "person-resting": "person",
    "person-role": "person", "person-sport": "person", "person-symbol": "person",
    "place-building": "building", "place-geographic": "place", "place-map": "place", "place-other": "place",
    "place-religious": "building", "plant-flower": "flower", "plant-other": "plant", "sky & weather": "sky",
    "sport": "sport", "time": "clock", "tool": "tool", "transport-air": "vehicle",
    "transport-ground": "vehicle", "transport-water": "vehicle", "transport-sign": "sign",
    "warning": "sign", "zodiac": "symbol", "clothing": "clothing", "dishware": "kitchen", "hotel": "object",
    "computer": "device", "phone": "device", "household": "household", "mail": "mail",
    "medical": "medicine", "money": "money", "office": "office", "science": "science", "sound": "sound",
    "writing": "pen", "lock": "lock", "other-object": "object",
}  # fmt: skip
# Names that are no noun, or not the noun that a caption needs.
RENAME = {
    "a button blood type": "blood type a button", "ab button blood type": "blood type ab button",
    "antenna bars": "antenna bars button", "b button blood type": "blood type b button",
    "breast feeding": "woman breast feeding", "camping": "camp site", "cinema": "cinema button",
    "collision": "collision spark", "construction": "construction barrier", "cooking": "cooking pan",
    "copyright": "copyright sign", "currency exchange": "currency exchange sign",
    "dashing away": "dashing cloud", "divide": "divide sign", "dizzy": "dizzy star", "e mail": "email",
    "flower playing cards": "flower playing card", "foggy": "foggy bridge", "grey heart": "gray heart",
    "high voltage": "lightning bolt", "infinity": "infinity sign", "information": "information button",
    "input latin letters": "input latin letters button",
    "input latin lowercase": "input latin lowercase button",
    "input latin uppercase": "input latin uppercase button", "input numbers": "input numbers button",
    "input symbols": "input symbols button", "khanda": "khanda symbol", "locked": "lock",
    "locked with key": "lock with key", "locked with pen": "lock with pen", "minus": "minus sign",
    "mobile phone off": "mobile phone off button", "moon viewing ceremony": "moon viewing vase",
    "motorway": "motorway road", "multiply": "multiply sign", "o button blood type": "blood type o button",
    "om": "om symbol", "performing arts": "theater masks", "place of worship": "place of worship sign",
    "plus": "plus sign", "pouring liquid": "glass of pouring liquid", "registered": "registered sign",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "star struck": "star struck face", "trade mark": "trade mark sign", "unlocked": "open lock",
    "vibration mode": "vibration mode button", "wireless": "wireless button", "yin yang": "yin yang symbol",
}  # fmt: skip
SIGNS = {"transport-sign", "warning", "zodiac"}  # their names say what the sign forbids or means
# A mirrored picture must still be what its name says: no letters, digits, hands of a clock, directions, maps.
NO_FLIP_KINDS = {"flag", "symbol", "sign", "clock"}
NO_FLIP_WORDS = re.compile(
    r"\b(left|right|leftwards|rightwards|map|globe|calendar|medal|8|crescent|gibbous|quarter|mahjong|bank"
    r"|hotel|hospital|store|school|post|love|newspaper|tickets?|banknote|keyboard|chart|slot|receipt|label"
    r"|dvd|film|police|ambulance|fire engine|stop|joker|button|symbols)\b"
)
PLURAL = re.compile(r"([^s]s|(ie|x|ss)es|women|men|people|feet|teeth|jeans)$")
SINGULAR_S = {
    "bus", "trolleybus", "minibus", "dress", "cactus", "compass", "octopus", "lotus", "hibiscus",
    "princess", "abacus", "rhinoceros", "hippopotamus", "claus",
}  # fmt: skip
HEAD = re.compile(
    r" (?:with|of|in|on|at|over|behind|without|for|under|showing|from|to|not|facing|holding|lifting"
    r"|getting|playing|fluttering) "
)
NO_ARTICLE = re.compile(
    r"(santa|mrs|mx) claus|mount fuji|bread|baguette bread|bacon|salt|butter|fog|fire|popcorn|sushi|oden"
    r"|sake|spaghetti|cooked rice|curry rice|shaved ice|soft ice cream|ice cream|ice|custard|candy"
    r"|canned food|dna|tennis|badminton|softball|bowling|basketball|field hockey|ice hockey|ping pong"
    r"|rugby football|american football|volleyball|lacrosse|horse racing|yarn|thread|wood|mate|nail polish"
    r"|lipstick|soap|coral|ginger root|garlic|broccoli|luggage|zzz|.* (o'clock|thirty)|bubble tea"
    r"|meat on bone|money with wings|palms up together|people .*|women .*|men .*|fleur de lis"
)
AN = re.compile(r"[aio]|e(?!u|we)|u(?!ni|s|k|t)|8|11|18|hour|x ray|sos|ng ")


def read_json(path: Path) -> Any:
    with path.open(encoding="utf-8") as file:
        return json.load(file)


def short_names(source: Path) -> dict[str, str]:
    """Text of an emoji (variation selectors removed) -> CLDR short name in English."""
    table: dict[str, str] = {}
    for package, kind in zip(NAMES, ("annotations", "annotationsDerived"), strict=True):
        entries = read_json(source / package / "package" / kind / "en" / "annotations.json")[kind]["annotations"]
        for text, entry in entries.items():
            if "tts" in entry:
                table.setdefault(text.replace("\ufe0f", ""), entry["tts"][0])
    return table


def clean(name: str, subcategory: str) -> str:
    """A CLDR short name as the words of a caption: lower case ASCII letters, digits and apostrophes."""
    name = (
        unicodedata.normalize("NFKD", name.replace("’", "'"))
        .encode("ascii", "ignore")
        .decode()
        .lower()
        .replace("u.s.", "us")
    )
    name = name.replace("keycap: #", "keycap hash").replace("keycap: *", "keycap star").replace("&", " and ")
    name = name.replace(": facing right", " facing right").replace("flag: ", "flag of ").replace("keycap: ", "keycap ")
    if match := re.fullmatch(r"(man|woman|person): bald", name):
        name = f"bald {match[1]}"
    if match := re.fullmatch(r"(man|woman|person): (.*)", name):
        name = f"{match[1]} with {match[2]}"
    if match := re.fullmatch(r"(family|kiss|couple with heart): (.*)", name):
        *first, last = match[2].split(", ")
        name = f"{match[1]} of {' '.join(first)} and {last}"
    name = " ".join(re.findall(r"[a-z0-9']+", name))
    name = RENAME.get(name, name)
    return f"{name} sign" if subcategory in SIGNS and not re.search(r"(sign|symbol|room)$", name) else name


def article(name: str) -> str:
    """ "a", "an", "the" or nothing: what stands before the name in a caption."""
    if NO_ARTICLE.fullmatch(name):
        return ""
    if name.startswith("flag of "):
        return "the"
    head = HEAD.split(name)[0].split()[-1]
    if head not in SINGULAR_S and PLURAL.search(head):
        return ""
    return "an" if AN.match(name) and not re.match(r"one\b", name) else "a"


def to_linear(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def to_srgb(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * np.maximum(value, 0.0031308) ** (1 / 2.4) - 0.055)


def shrink(path: Path) -> np.ndarray:
    """uint8 [4, SIDE, SIDE]: sRGB colour multiplied by alpha, and alpha; resampled in linear light."""
    with Image.open(path) as image:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float64) / 255
    planes = np.concatenate([to_linear(rgba[..., :3]) * rgba[..., 3:], rgba[..., 3:]], axis=-1)
    small = np.stack(
        [
            np.asarray(
                Image.fromarray(planes[..., c].astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            )
            for c in range(4)
        ]
    ).astype(np.float64)
    alpha = np.clip(small[3], 0, 1)
    colour = np.clip(small[:3] / np.maximum(alpha, 1e-6), 0, 1)
    return np.rint(255 * np.concatenate([to_srgb(colour) * alpha, alpha[None]])).astype(np.uint8)


def fill_frame(picture: np.ndarray) -> np.ndarray:
    """float32 [4, 16, 16] in 0..1: the picture without its margins, scaled to fill a square and centred in
    it.

    Scenes draw every emoji at any size, so a small black square is the same picture as a large one.
    """
    rows, columns = (np.flatnonzero(picture[3].max(axis=axis) > 16) for axis in (1, 0))
    half = max(rows[-1] - rows[0], columns[-1] - columns[0]) / 2 + 0.5
    middle = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    padded = np.pad(picture, ((0, 0), (SIDE, SIDE), (SIDE, SIDE))).astype(np.float32) / 255
    box = tuple(SIDE + centre + side for side in (-half, half) for centre in middle)
    return np.stack(
        [np.asarray(Image.fromarray(plane).resize((16, 16), Image.Resampling.BILINEAR, box=box)) for plane in padded]
    )


def distances(pixels: np.ndarray) -> np.ndarray:
    """float32 [N, N]: how different two pictures look, the lesser of straight and mirrored; see `SAME` for
    the scale.

    pixels: uint8 [N, 4, 32, 32], premultiplied. Compared on white and on black together, over the area that
        either covers.
    """
    small = np.stack([fill_frame(picture) for picture in pixels])
    results = []
    for other in (small, small[..., ::-1]):
        one, two = (
            np.concatenate([x[:, :3], x[:, :3] + 1 - x[:, 3:]], axis=1).reshape(len(x), -1) for x in (small, other)
        )
        squared = (one**2).sum(1)[:, None] + (two**2).sum(1)[None] - 2 * one @ two.T
        cover, over = (
            small[:, 3].reshape(len(small), -1),
            np.ascontiguousarray(other[:, 3]).reshape(len(small), -1),
        )
        union = cover.sum(1)[:, None] + over.sum(1)[None] - cover @ over.T
        results.append(np.maximum(squared, 0) / (6 * np.maximum(union, 1)))
    return np.sqrt(np.minimum(*results))


def variant_key(name: str, subcategory: str) -> str:
    """Equal for names that differ by gender, hair, direction or family members only."""
    if subcategory in ("family", "person-symbol") or name.startswith("family"):
        return "family"
    if subcategory == "person":
        return "person"
    if subcategory == "time" and re.search(r"clock$|thirty$", name) and "alarm" not in name:
        return "clock"
    key = re.sub(r"\b(woman|man|person|women|men|people)\b ?", "", name)
    key = re.sub(r"mermaid|merman|merperson", "merperson", key)
    key = re.sub(r"prince$|princess$|with crown$", "royalty", key)
    key = re.sub(r"(santa|mrs|mx) claus", "claus", key)
    return re.sub(r" facing right|\b(left|right)(wards| facing)?\b|tilted", "", key).strip()


def group(names: list[str], subcategories: list[str], near: np.ndarray) -> list[int]:
    """Group number of each emoji: same variant key, or nearer than SAME, closed transitively."""
    parent = list(range(len(names)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, (name, subcategory) in enumerate(zip(names, subcategories, strict=True)):
        parent[root(i)] = root(first.setdefault(variant_key(name, subcategory), i))
    for i, j in np.argwhere(near < SAME):
        parent[root(int(i))] = root(int(j))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(names))]


def hold_out(emoji: list[dict[str, Any]], near: np.ndarray) -> set[int]:
    """Groups for validation: HELD_OUT of each category, APART from all others, those of known words first."""
    members: dict[int, list[dict[str, Any]]] = {}
    for entry in emoji:
        members.setdefault(entry["group"], []).append(entry)
    numbers = np.array([entry["group"] for entry in emoji])
    apart = np.where(numbers[:, None] == numbers, np.inf, near).min(axis=1)
    uses = Counter(word for entry in emoji for word in set(entry["name"].split()))
    kind_words = {word for entry in emoji for word in entry["kind"].split()}
    chosen: set[int] = set()
    for category in CATEGORIES.values():
        target = round(HELD_OUT * sum(entry["category"] == category for entry in emoji))
        order = sorted(
            (
                number
                for number, group_ in members.items()
                if group_[0]["category"] == category
                and len(group_) <= LARGEST
                and apart[numbers == number].min() >= APART
            ),
            key=lambda number: hashlib.sha256(f"hold-out {members[number][0]['name']}".encode()).digest(),
        )
        taken = 0
        for known_only in (True, False):
            for number in order:
                group_ = members[number]
                if number in chosen or taken + len(group_) > target:
                    continue
                words = Counter(word for entry in group_ for word in set(entry["name"].split()))
                known = all(uses[word] > count or word in kind_words for word, count in words.items())
                if known or not known_only:
                    chosen.add(number)
                    taken += len(group_)
                    uses -= words
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder that holds <package name>/package of the three npm packages")
    parser.add_argument("out", type=Path, help="folder for emoji.npz and emoji.json")
    arguments = parser.parse_args()
    root = arguments.source / PICTURES / "package"
    for package, version in VERSIONS.items():
        found = read_json(arguments.source / package / "package" / "package.json")["version"]
        if found != version:
            raise SystemExit(f"{package}: expected version {version}, found {found}")
    titles = short_names(arguments.source)

    def title(unified: str) -> str:
        return titles["".join(chr(int(code, 16)) for code in unified.split("-")).replace("\ufe0f", "")]

    emoji: list[dict[str, Any]] = []
    pictures: list[np.ndarray] = []
    subcategories: list[str] = []
    for source in sorted(read_json(root / "emoji.json"), key=lambda entry: entry["sort_order"]):
        if source["category"] == "Component" or not source["has_img_google"]:
            continue
        name, kind = (
            clean(title(source["unified"]), source["subcategory"]),
            KINDS.get(source["subcategory"], "symbol"),
        )
        variants = []
        files = [source["image"]]
        for tones, variant in sorted(source.get("skin_variations", {}).items()):
            if variant["has_img_google"]:
                words = list(dict.fromkeys(SKIN[tone] for tone in tones.split("-")))
                variants.append({"codepoints": variant["unified"], "tone": " and ".join(words) + " skin"})
                files.append(variant["image"])
        entry: dict[str, Any] = {
            "name": name,
            "article": article(name),
            "kind": kind,
            "category": CATEGORIES[source["category"]],
        }
        entry["codepoints"] = source["unified"]
        entry["flip"] = not (kind in NO_FLIP_KINDS or NO_FLIP_WORDS.search(name))
        entry["first"], entry["variants"] = len(pictures), variants
        pictures += [shrink(root / "img" / "google" / "64" / file) for file in files]
        emoji.append(entry)
        subcategories.append(source["subcategory"])

    pixels = np.stack(pictures)
    first = [entry["first"] for entry in emoji]
    near = distances(pixels)
    near = np.minimum.reduceat(np.minimum.reduceat(near, first, axis=0), first, axis=1)
    numbers = group([entry["name"] for entry in emoji], subcategories, near)
    for entry, number in zip(emoji, numbers, strict=True):
        entry["group"] = number
    held = hold_out(emoji, near)
    for entry in emoji:
        entry["split"] = "validation" if entry["group"] in held else "train"

    arguments.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.out / "emoji.npz", sprites=np.ascontiguousarray(pixels.transpose(0, 2, 1, 3)))
    rows = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in emoji)
    head = json.dumps({"schema": 1, "name": "Noto Emoji, 32 px", "sources": VERSIONS})[:-1]
    (arguments.out / "emoji.json").write_text(f'{head}, "emoji": [\n{rows}\n]}}\n', encoding="ascii", newline="\n")
    for file in ("emoji.npz", "emoji.json"):
        print(
            hashlib.sha256((arguments.out / file).read_bytes()).hexdigest(),
            (arguments.out / file).stat().st_size,
            file,
        )
    counts = Counter((entry["category"], entry["split"]) for entry in emoji)
    print(
        f"{len(emoji)} emoji, {len(pixels)} pictures, {len({entry['group'] for entry in emoji})} groups",
        dict(counts),
    )


if __name__ == "__main__":
    main()
