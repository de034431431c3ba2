"""A user's own folder as a stream: what is read, in which order, with which captions, and what is refused."""

from __future__ import annotations

import codecs
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ditscale.dit.data import ImageFolder
from ditscale.dit.data.folder import fitted, read_image
from ditscale.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images whose red channel is their number: two classes, some at the top, every kind of caption."""
    for i in range(10):
        home = tmp_path / ("cats" if i < 4 else "tall_dogs" if i < 8 else ".")
        home.mkdir(exist_ok=True)
        Image.new("RGB", (20, 12), (10 * i, 200, 30)).save(home / f"{i}.png")
    (tmp_path / "cats" / "0.txt").write_text("a cat\n asleep", encoding="utf-8")
    (tmp_path / "captions.jsonl").write_text(
        json.dumps({"file": "tall_dogs/5.png", "caption": "a dog, running"}) + "\n\n", encoding="utf-8"
    )
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "notes.md").write_text("no image", encoding="utf-8")
    return tmp_path


def test_epochs_show_every_image_once_in_fresh_orders(folder: Path) -> None:
    stream = ImageFolder(folder, 8)
    assert stream.unique_images == 10
    epochs = stream.batch(0, 30).images[:, 0, 0, 0].reshape(3, 10) // 10
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    other = ImageFolder(folder, 8, seed=1).batch(0, 10).images[:, 0, 0, 0] // 10
    assert other.tolist() != epochs[0].tolist()


def test_batch_boundaries_do_not_matter(folder: Path) -> None:
    whole = ImageFolder(folder, 8).batch(0, 35)
    stream = ImageFolder(folder, 8, cache_bytes=3 * 8 * 8 * 2)  # keeps two of ten: kept and read images must agree
    for start, count in ((33, 2), (0, 7), (8, 14)):
        piece = stream.batch(start, count)
        assert np.array_equal(piece.images, whole.images[start : start + count])
        assert piece.captions == whole.captions[start : start + count]
        assert np.array_equal(piece.labels, whole.labels[start : start + count])


def test_captions_and_classes(folder: Path) -> None:
    stream = ImageFolder(folder, 8)
    assert stream.classes == ("cats", "tall_dogs")
    batch = stream.batch(0, 10)
    told = {
        int(image[0, 0, 0]) // 10: (caption, int(label))
        for image, caption, label in zip(batch.images, batch.captions, batch.labels, strict=True)
    }
    assert told[0] == ("a cat asleep", 0) and told[1] == ("cats", 0)
    assert told[5] == ("a dog, running", 1) and told[6] == ("tall dogs", 1)
    assert told[9] == ("", -1)
    assert stream.vocabulary.decode(batch.tokens) == batch.captions


def test_splits_are_disjoint_and_stay_when_files_are_added(folder: Path) -> None:
    parts = [set(ImageFolder(folder, 8, split=split, held_out=0.4).names) for split in ("train", "validation")]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 10 and parts[1]
    Image.new("RGB", (9, 9)).save(folder / "cats" / "new.png")
    again = set(ImageFolder(folder, 8, split="validation", held_out=0.4).names)
    assert again - {"cats/new.png"} == parts[1]


def test_identity_follows_bytes_and_captions(folder: Path) -> None:
    first = ImageFolder(folder, 8).sha256
    assert ImageFolder(folder, 8).sha256 == first
    assert ImageFolder(folder, 16).sha256 != first
    Image.new("RGB", (20, 12), (1, 2, 3)).save(folder / "cats" / "1.png")
    changed = ImageFolder(folder, 8).sha256
    assert changed != first
    (folder / "cats" / "1.txt").write_text("another", encoding="utf-8")
    assert ImageFolder(folder, 8).sha256 not in (first, changed)


def test_centre_square_and_transparency(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 4), dtype=np.uint8)
    wide[:, 10:20] = (255, 0, 0, 255)  # the centred square is red, the rest transparent
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert (ImageFolder(tmp_path, 10).batch(0, 1).images[0].transpose(1, 2, 0) == (255, 0, 0)).all()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (ImageFolder(tmp_path, 4).batch(0, 1).images == 255).all()


def test_link_to_a_folder_above_ends(folder: Path) -> None:
    (folder / "cats" / "loop").symlink_to(folder, target_is_directory=True)
    assert ImageFolder(folder, 8).unique_images == 10


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class and its images were missing in silence. Root may read all, so the system's answer is played."""
    scan = os.scandir

    def refuse(path: str) -> object:
        if os.path.basename(path) in ("cats", "lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (folder / "lost+found").mkdir()  # at the root of a disk
    with pytest.raises(InputError, match="cats: expected a folder that can be read, got Permission denied"):
        ImageFolder(folder, size=8)
    (folder / "cats").rename(folder / "birds")
    assert ImageFolder(folder, size=8).unique_images == 10


def test_bad_folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match="path: expected a folder of images"):
        ImageFolder(folder / "nowhere", 8)
    with pytest.raises(InputError, match="path: expected images .* got none"):
        ImageFolder(empty, 8)
    with pytest.raises(InputError, match="held_out"):
        ImageFolder(folder, 8, held_out=1.5)
    with pytest.raises(InputError, match="split: expected images for 'validation', got none"):
        ImageFolder(folder, 8, split="validation", held_out=1e-9)


def test_file_that_is_no_image(folder: Path) -> None:
    (folder / "cats" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"0\.png: expected an image") as error:
        ImageFolder(folder, 8).batch(0, 10)
    assert "\n" not in str(error.value)


def test_avif_by_another_name(folder: Path) -> None:
    """Whatever its name says, PIL reads what a file is; its reader of AVIF fails in its own way."""
    buffer = io.BytesIO()
    try:
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(buffer, "AVIF")
    except (OSError, KeyError):
        pytest.skip("this PIL was built without AVIF")
    whole = buffer.getvalue()
    with pytest.raises(InputError, match=r"a\.jpg: expected an image, got"):
        read_image(io.BytesIO(whole.replace(b"iloc", b"free")), (8, 8), "a.jpg")
    assert read_image(io.BytesIO(whole), (8, 8), "a.jpg").max() < 3


def test_greys_of_16_bits_become_greys_of_8(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    expected = np.broadcast_to(ramp >> 8, (3, 32, 32))
    assert np.array_equal(ImageFolder(tmp_path, 32).batch(0, 1).images[0], expected)
    for mode in ("I;16", "I;16B", "I"):  # older versions of PIL read such a file as "I"
        image = Image.frombytes(mode, (32, 32), ramp.astype({"I;16": "<u2", "I;16B": ">u2", "I": "i4"}[mode]).tobytes())
        assert np.array_equal(fitted(image, (32, 32)), expected), mode
    Image.fromarray(ramp).save(tmp_path / "a.png", transparency=0)
    assert (ImageFolder(tmp_path, 32).batch(0, 1).images[0, :, :, :2] == (255, 2114 >> 8)).all()


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 65536), ("I", -1)])
def test_greys_that_have_no_range_are_refused(mode: str, value: float) -> None:
    with pytest.raises(ValueError, match="grey levels"):
        fitted(Image.new(mode, (4, 4), value), (4, 4))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured_whatever_the_other_tags_hold(tmp_path: Path, orientation: int) -> None:
    """An image whose EXIF cannot be written anew, which PIL's own rotation tries to."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8], pixels[:8, 8:] = 250, 120
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, "hello"
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", exif=exif)
    with Image.open(data) as whole:
        expected = np.asarray(ImageOps.exif_transpose(whole))
    # The text becomes a tag that has to be a table of numbers.
    broken = data.getvalue().replace(b"\x01\x0e\x00\x02", b"\x01\x2d\x00\x02")
    assert broken != data.getvalue()
    (tmp_path / "a.jpg").write_bytes(broken)
    assert np.array_equal(ImageFolder(tmp_path, 16).batch(0, 1).images[0].transpose(1, 2, 0), expected)


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode there")
def test_names_that_are_not_utf8(folder: Path) -> None:
    os.rename(folder / "cats", os.fsencode(folder) + b"/c\xe9")
    name = os.fsencode(folder) + b"/c\xe9/caf\xe9.png"
    try:
        Image.new("RGB", (20, 12)).save(os.fsdecode(name))
    except OSError:
        pytest.skip("this file system takes no such names")
    parts = [ImageFolder(folder, 8, split=split, held_out=0.4) for split in ("train", "validation")]
    assert sum(os.fsdecode(b"c\xe9/caf\xe9.png") in part.names for part in parts) == 1
    for part in parts:
        assert len(part.batch(0, part.unique_images).images) and len(part.sha256) == 64


def test_a_byte_order_mark_is_no_part_of_a_caption(folder: Path) -> None:
    for file in (folder / "cats" / "0.txt", folder / "captions.jsonl"):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    captions = ImageFolder(folder, 8).captions
    assert "a cat asleep" in captions and "a dog, running" in captions


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_caption_lines_end_at_newlines_only(folder: Path, ending: str) -> None:
    """JSON allows these characters inside a string."""
    caption = "one\u2028two\u2029three\x85four"
    rows = [json.dumps({"file": f"cats/{i}.png", "caption": caption}, ensure_ascii=False) for i in range(2)]
    (folder / "captions.jsonl").write_bytes((ending.join(rows) + ending).encode())
    assert ImageFolder(folder, 8).captions.count(caption) == 2


def test_a_second_caption_of_an_image_is_not_taken_in_silence(folder: Path) -> None:
    rows = [json.dumps({"file": "cats/0.png", "caption": caption}) for caption in ("one", "one", "two")]
    (folder / "captions.jsonl").write_text("\n".join(rows[:2]))
    assert "one" in ImageFolder(folder, 8).captions
    (folder / "captions.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match=r"line 3: expected one caption of cats/0.png, got a second, 'two'"):
        ImageFolder(folder, 8)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file": ["a.png"], "caption": "x"}', "the name of an image"),
        ('{"file": {}, "caption": "x"}', "the name of an image"),
        ('{"file": "cats/0.png", "caption": null}', "a caption that is a text"),
    ],
)
def test_caption_line_of_other_types(folder: Path, line: str, said: str) -> None:
    (folder / "captions.jsonl").write_text(line)
    with pytest.raises(InputError, match=f"captions.jsonl, line 1: expected {said}"):
        ImageFolder(folder, 8)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("[" * 100_000, id="nested"),
        "not json",
        '{"file": "cats/0.png"}',
        '{"file": "gone.png", "caption": "x"}',
        "[1]",
    ],
)
def test_bad_caption_lines(folder: Path, line: str) -> None:
    (folder / "captions.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(InputError, match="captions.jsonl, line 1: expected"):
        ImageFolder(folder, 8)


def test_caption_that_is_no_text(folder: Path) -> None:
    (folder / "cats" / "0.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(InputError, match=r"0\.txt: expected a text in UTF-8"):
        ImageFolder(folder, 8)


def test_images_that_are_no_squares_keep_the_middle_of_their_own(tmp_path: Path) -> None:
    """Of a picture of 20 x 40 pixels, 8 x 16 shows all; 8 x 8 its middle columns; 4 x 16 its middle rows."""
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :10, 0] = picture[:, 30:, 0] = 200  # the sides
    picture[:5, :, 1] = picture[15:, :, 1] = 200  # top and bottom
    Image.fromarray(picture).save(tmp_path / "a.png")
    whole, square, flat = (ImageFolder(tmp_path, h, width=w) for h, w in ((8, 16), (8, None), (4, 16)))
    assert (whole.shape, square.shape, flat.shape) == ((3, 8, 16), (3, 8, 8), (3, 4, 16))
    images = [stream.batch(0, 1).images[0] for stream in (whole, square, flat)]
    assert [image.shape for image in images] == [(3, 8, 16), (3, 8, 8), (3, 4, 16)]
    assert images[0][0, 4, 0] > 150 and images[0][1, 0, 8] > 150
    assert images[1][0, 4].max() < 60 and images[1][1, 0, 4] > 150
    assert images[2][0, 2, 0] > 150 and images[2][1].max() < 60
    assert len({stream.sha256 for stream in (whole, square, flat)}) == 3
    assert ImageFolder(tmp_path, 8, width=8).sha256 == square.sha256, "a square by either name"
