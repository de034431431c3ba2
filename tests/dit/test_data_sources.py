"""Shards, data sets and latents as streams, and runs on each kind of data, with its captions or classes."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import subprocess
import tarfile

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image
from training_cases import result, stop_after, tiny, weights_of

from ditscale.dit import DiTConfig
from ditscale.dit.data import HubImages, ImageFolder, ImageShards, LatentShards, Vocabulary, open_source, write_latents
from ditscale.dit.data.finite import MIXED_SHARDS, EpochOrder
from ditscale.dit.rundata import RunData
from ditscale.dit.training import Execution, Stopped, TrainConfig, open_stream, train
from ditscale.dit.training.batches import Feeder
from ditscale.dit.training.ranks import Ranks
from ditscale.errors import InputError

COLOURS = ("red", "green", "blue", "white")


def picture(number):
    """Its red channel is the number, its left half darker: mirrored ones can be told."""
    pixels = np.full((12, 16, 3), (number, 200, 30), dtype=np.uint8)
    pixels[:, :8, 1] = 50
    return Image.fromarray(pixels)


def encoded(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def caption(number):
    return f"a {COLOURS[number % 4]} thing, number {number}"


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path):
    """Thirty samples in three shards: captions as text or in JSON, classes likewise."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"box-{shard}.tar", "w") as tar:
            for i in range(10 * shard, 10 * shard + 10):
                if i % 2:
                    add(tar, f"sub/{i:04d}.json", json.dumps({"caption": caption(i), "label": i % 3}).encode())
                add(tar, f"sub/{i:04d}.png", encoded(i))
                if not i % 2:
                    add(tar, f"sub/{i:04d}.txt", caption(i).encode("utf-8-sig"))  # some editors begin with its mark
                    add(tar, f"sub/{i:04d}.cls", str(i % 3).encode())
            add(tar, "readme.md", b"no sample")
    return folder


@pytest.fixture
def hub(tmp_path):
    """The same thirty as a saved data set."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
        }
    )
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(30)]}
    rows |= {"text": [caption(i) for i in range(30)], "label": [i % 3 for i in range(30)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def latents(tmp_path):
    """The same thirty as latents of three channels, in three shards of different types."""
    numbers = np.arange(30, dtype=np.float32)
    values = numbers[:, None, None, None] + np.zeros((30, 3, 4, 4), np.float32)
    values[:, :, :, :2] += 100
    pieces = [
        {
            "latents": values[10 * s : 10 * s + 10].astype(np.float16 if s else np.float32),
            "flipped": values[10 * s : 10 * s + 10, :, :, ::-1].astype(np.float16 if s else np.float32),
            "labels": np.arange(10 * s, 10 * s + 10, dtype=np.int64) % 3,
            "features": np.repeat(numbers[10 * s : 10 * s + 10], 12).reshape(10, 2, 6),
            "pooled": np.repeat(numbers[10 * s : 10 * s + 10], 5).reshape(10, 5),
        }
        for s in range(3)
    ]
    captions = [[caption(i) for i in range(10 * s, 10 * s + 10)] for s in range(3)]
    write_latents(
        tmp_path / "latents", pieces, captions=captions, latent_factor=8, mean=[1.0, 0.0, 0.0], std=[2.0, 1.0, 1.0]
    )
    return tmp_path / "latents"


def numbers_of(stream, batch):
    """Which of the thirty each sample is."""
    if isinstance(stream, LatentShards):
        return np.rint(batch.images[:, 1].min(axis=(1, 2))).astype(int)
    return batch.images[:, 0, 0, 0].astype(int)


@pytest.fixture(params=["tars", "hub", "latents"])
def stream(request):
    path = request.getfixturevalue(request.param)
    kinds = {"tars": ImageShards, "hub": HubImages, "latents": LatentShards}
    size = {} if request.param == "latents" else {"size": 8}
    return lambda **settings: kinds[request.param](path, **size, **settings)


def test_every_sample_is_seen_once_an_epoch_with_its_caption_and_class(stream):
    source = stream()
    assert source.unique_images == 30
    epochs = [source.batch(30 * epoch, 30) for epoch in range(3)]
    orders = [tuple(numbers_of(source, batch)) for batch in epochs]
    assert all(sorted(order) == list(range(30)) for order in orders) and len(set(orders)) == 3
    for batch in epochs:
        found = numbers_of(source, batch)
        assert batch.captions == [caption(i) for i in found] and batch.labels.tolist() == [i % 3 for i in found]
        assert source.vocabulary.decode(batch.tokens) == batch.captions
    assert len(source.classes) == 3


def test_what_stands_at_an_index_never_changes(stream):
    """In any batch, in another process's copy, at any time."""
    whole = stream(flip=True).batch(0, 45)
    source = pickle.loads(pickle.dumps(stream(flip=True)))
    for start, count in ((44, 1), (0, 7), (20, 20)):
        piece = source.batch(start, count)
        assert np.array_equal(piece.images, whole.images[start : start + count])
        assert piece.captions == whole.captions[start : start + count]
    assert stream().sha256 == stream().sha256 != stream(seed=1).sha256
    assert not np.array_equal(stream(seed=1).batch(0, 30).images, stream().batch(0, 30).images)


def test_mirrored_at_half_of_the_places(stream):
    plain, flipped = stream().batch(0, 300), stream(flip=True).batch(0, 300)
    turned = [not np.array_equal(a, b) for a, b in zip(plain.images, flipped.images, strict=True)]
    assert 110 < sum(turned) < 190
    for i in np.flatnonzero(turned):
        assert np.array_equal(flipped.images[i], plain.images[i][..., ::-1])


def test_splits_share_nothing_but_their_words(stream):
    parts = [stream(split=split, held_out=0.3) for split in ("train", "validation")]
    seen = [set(numbers_of(part, part.batch(0, part.unique_images))) for part in parts]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 30 and seen[1]
    assert parts[0].vocabulary.sha256 == parts[1].vocabulary.sha256
    assert parts[0].name.endswith("/train") and parts[0].sha256 != parts[1].sha256


def test_a_vocabulary_of_the_most_frequent_words(stream):
    source = stream(words=6)
    assert source.vocabulary.words[2:] == (",", "a", "number", "thing")
    batch = source.batch(0, 3)
    assert (batch.tokens == 1).sum() == 6 and batch.captions == stream().batch(0, 3).captions


def test_an_epoch_stays_in_few_shards_at_a_time():
    shards = np.repeat(np.arange(40), 50)
    order = EpochOrder("key", 2000, shards)
    found = order.samples(0, 2000)
    assert sorted(found) == list(range(2000)) and list(found) != list(order.samples(2000, 2000))
    for start in range(0, 2000, 50 * MIXED_SHARDS):
        assert len(set(shards[found[start : start + 50 * MIXED_SHARDS]])) == MIXED_SHARDS
    assert len(set(shards[found[:50]])) > 4  # and they are mixed


def test_latents_are_scaled_and_come_with_features(latents):
    batch = LatentShards(latents).batch(0, 30)
    numbers = np.rint(batch.images[:, 1].min(axis=(1, 2)))
    assert batch.images.dtype == np.float32 and batch.images.shape == (30, 3, 4, 4)
    np.testing.assert_allclose(batch.images[:, 0].min(axis=(1, 2)), (numbers - 1) / 2, atol=1e-6)
    np.testing.assert_array_equal(batch.features, np.repeat(numbers, 12).reshape(30, 2, 6))
    np.testing.assert_array_equal(batch.pooled, np.repeat(numbers, 5).reshape(30, 5))
    data = RunData.of(LatentShards(latents))
    unscaled = data.unscaled(torch.from_numpy(batch.images))
    torch.testing.assert_close(unscaled[:, 0], unscaled[:, 1])


def test_bfloat16_latents_and_a_folder_without_description(tmp_path):
    values = torch.randn(4, 2, 3, 3).bfloat16()
    safetensors.torch.save_file({"latents": values, "labels": torch.tensor([0, 1, 0, 1])}, tmp_path / "a.safetensors")
    source = LatentShards(tmp_path)
    batch = source.batch(0, 4)
    order = [int(np.abs(values.float().numpy() - image).sum(axis=(1, 2, 3)).argmin()) for image in batch.images]
    np.testing.assert_array_equal(batch.images, values.float().numpy()[order])
    assert sorted(order) == [0, 1, 2, 3] and source.classes == ("0", "1") and batch.captions == [""] * 4


def test_lists_of_shards_are_kept_and_noticed_when_a_shard_changes(tars, monkeypatch):
    first = ImageShards(tars, 8)
    monkeypatch.setattr(tarfile, "open", lambda *args: pytest.fail("listed again"))
    assert ImageShards(tars, 8).sha256 == first.sha256
    monkeypatch.undo()
    with tarfile.open(tars / "box-0.tar", "w") as tar:
        add(tar, "one.png", encoded(1))
    assert ImageShards(tars, 8).unique_images == 21


def test_a_shard_that_is_cut_short_is_refused(tars):
    """Wherever: between two members tarfile itself takes it for a shorter one."""
    shard = tars / "box-0.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        headers = [member.offset for member in tar]
        end = tar.offset
    for cut in [place + more for place in headers[1:] for more in (0, 1, 511)] + [headers[2] + 600, end, end + 511]:
        shard.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"box-0\.tar: expected a tar file, .*, got") as error:
            ImageShards(tars, 8)
        assert "\n" not in str(error.value), cut
    shard.write_bytes(whole[: headers[3]] + b"?" * 512 + whole[headers[3] + 512 :])
    with pytest.raises(InputError, match="the file is cut short or damaged"):
        ImageShards(tars, 8)


def test_archives_put_one_behind_the_other_are_refused(tars):
    """Readers end at the first one's end: the samples of the others were missing in silence."""
    whole = (tars / "box-0.tar").read_bytes()
    (tars / "box-0.tar").write_bytes(whole + bytes(3 << 20))  # programs pad as they like
    assert ImageShards(tars, 8).unique_images == 30
    (tars / "box-0.tar").write_bytes(whole + (tars / "box-1.tar").read_bytes())
    with pytest.raises(
        InputError, match=r"box-0\.tar: expected .* behind the end of the archive, \d+ bytes: several in one"
    ):
        ImageShards(tars, 8)


def test_files_that_share_their_bytes_are_all_there(tmp_path):
    """The second and third name of a file stand in a shard as links to the first: samples and captions were missing."""
    (tmp_path / "tars").mkdir()
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "a.txt").write_text("a text")
    for name in ("b", "c"):
        for ending in (".png", ".txt"):
            os.link(tmp_path / f"a{ending}", tmp_path / f"{name}{ending}")
    with tarfile.open(tmp_path / "tars" / "box.tar", "w") as tar:
        for name in ("a.png", "a.txt", "b.png", "b.txt", "c.txt", "c.png"):
            tar.add(tmp_path / name, name)
        assert sum(member.islnk() for member in tar.getmembers()) == 4
    source = ImageShards(tmp_path / "tars", 8)
    assert source.unique_images == 3 and source.captions == ("a text",) * 3
    assert source.batch(0, 3).images[:, 0, 0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("second", ["a.png", "a.PNG", "a.txt"])
def test_a_second_file_of_a_name_is_not_taken_in_silence(tmp_path, second):
    """Shards put one behind the other may number their samples alike: the later ones stood in place of the earlier."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "box.tar", "w") as tar:
        for name in ("a.png", "a.txt", "readme.md", "b.png", "readme.md", second):
            add(tar, name, b"a text" if name.endswith("txt") else encoded(1))
    with pytest.raises(
        InputError, match=rf"box\.tar: expected .*each file once, got two files {second[1:].lower()} of 'a'"
    ):
        ImageShards(tmp_path / "tars", 8)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, "program"])
def test_whole_shards_of_every_form_are_taken(tmp_path, form):
    (tmp_path / ("folder" * 10)).mkdir()
    members = [
        "a.png",
        "b.png",
        f"{'folder' * 10}/{'name' * 20}.png",
    ]  # the last in more than one block, or in two fields
    for number, name in enumerate(members):
        (tmp_path / name).write_bytes(encoded(number))
    (tmp_path / "tars").mkdir()
    if form == "program":
        if shutil.which("tar") is None:
            pytest.skip("there is no program tar")
        subprocess.run(["tar", "-cf", "tars/a.tar", *members], cwd=tmp_path, check=True)
    else:
        with tarfile.open(tmp_path / "tars" / "a.tar", "w", format=form) as tar:
            for name in members:
                tar.add(tmp_path / name, name)
    source = ImageShards(tmp_path / "tars", 8)
    assert sorted(source.batch(0, 3).images[:, 0, 0, 0]) == [0, 1, 2]


def test_damaged_descriptions_are_refused_in_one_line(tars, latents):
    """What is JSON, but not what it should be, or nested without end."""
    nested = "[" * 100_000
    with tarfile.open(tars / "box-3.tar", "w") as tar:
        add(tar, "a.png", encoded(1))
        add(tar, "a.json", nested.encode())
    with pytest.raises(InputError, match=r"box-3\.tar: expected a caption in text"):
        ImageShards(tars, 8)
    shard, description = latents / "latents-00000.safetensors", latents / "latents.json"
    whole = shard.read_bytes()
    for header in ("[1, 2]", nested):
        shard.write_bytes(len(header).to_bytes(8, "little") + header.encode())
        with pytest.raises(InputError, match="expected a shard of latents"):
            LatentShards(latents)
    shard.write_bytes(whole)
    for mean in ('["a", "b", "c"]', "[[0], [0], [0]]", "[NaN, 0, 0]", f"[1{'0' * 400}, 0, 0]", nested):
        description.write_text(f'{{"format": 1, "mean": {mean}}}')
        with pytest.raises(InputError, match=r"latents\.json: expected a description of format 1") as error:
            LatentShards(latents)
        assert "\n" not in str(error.value)
    description.write_text('{"format": 1}')
    (latents / "latents-00000.captions.jsonl").write_text(nested)
    with pytest.raises(InputError, match="expected one JSON string a line"):
        LatentShards(latents)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_captions_of_latents_end_at_newlines_only(latents, ending):
    """JSON allows these characters inside a string."""
    captions = [f"{i} one\u2028two\u2029three\x85four" for i in range(10)]
    lines = ending.join(json.dumps(text, ensure_ascii=False) for text in captions)
    for text in (lines, lines + ending):
        (latents / "latents-00000.captions.jsonl").write_bytes(text.encode())
        assert set(captions) <= set(LatentShards(latents).captions)


def test_a_part_of_a_data_set_is_the_validation_split(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    parts = {
        name: datasets.Dataset.from_dict(
            {"image": [{"bytes": encoded(i), "path": None} for i in rows], "caption": [caption(i) for i in rows]},
            features=features,
        )
        for name, rows in (("train", range(5)), ("validation", range(5, 7)))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "hub"))
    train_part, held, every = (HubImages(tmp_path / "hub", 8, split=s) for s in ("train", "validation", "all"))
    assert [part.unique_images for part in (train_part, held, every)] == [5, 2, 7]
    assert sorted(held.batch(0, 2).images[:, 0, 0, 0]) == [5, 6] and held.classes == ()
    assert train_part.vocabulary.sha256 == held.vocabulary.sha256


def saved(path, **parts):
    """A saved data set of these parts, each of columns beside the image."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    made = {}
    for name, columns in parts.items():
        count = len(next(iter(columns.values()), range(4)))
        rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(count)], **columns}
        made[name] = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(made).save_to_disk(str(path))
    return path


def test_parts_of_a_data_set_agree_on_its_classes(tmp_path):
    path = saved(tmp_path / "few", train={"label": [0, 1, 2, None]}, validation={"label": [0, 1]})
    for split in ("train", "validation"):
        assert HubImages(path, 8, split=split).classes == ("0", "1", "2")
    assert sorted(HubImages(path, 8, split="train").labels) == [-1, 0, 1, 2]
    # A part that has none of a column, as a test part without labels, whichever comes first.
    path = saved(tmp_path / "none", test={}, train={"label": [0, 1, 2]})
    assert HubImages(path, 8, split="train").classes == ("0", "1", "2")
    assert set(HubImages(path, 8, split="validation").labels) == {-1}


def test_parts_that_number_their_classes_apart_are_refused(tmp_path):
    """Each part's labels made into classes by themselves: the second part has no bee, so its cats are the first's bees."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    parts = datasets.load_from_disk(
        str(saved(tmp_path / "words", train={"label": ["ant", "bee", "cat"]}, validation={"label": ["ant", "cat"]}))
    )
    apart = {name: part.class_encode_column("label") for name, part in parts.items()}
    datasets.DatasetDict(apart).save_to_disk(str(tmp_path / "hub"))
    with pytest.raises(
        InputError, match=r"the same classes in every part, got \['ant', 'bee', 'cat'\] and \['ant', 'cat'\]"
    ):
        HubImages(tmp_path / "hub", 8)


@pytest.mark.parametrize("form", [{"type": "torch"}, {"type": "numpy"}, {"columns": ["image"]}])
def test_a_format_that_a_data_set_was_saved_in_is_put_off(tmp_path, form):
    """Pictures of some formats are arrays, and columns that one leaves out cannot be asked for."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    plain = saved(tmp_path / "plain", train={"caption": ["a", "b"], "label": [0, 1]})
    datasets.load_from_disk(str(plain))["train"].with_format(**form).save_to_disk(str(tmp_path / "hub"))
    source = HubImages(tmp_path / "hub", 8)
    assert source.captions == ("a", "b") and source.labels.tolist() == [0, 1]
    assert sorted(source.batch(0, 2).images[:, 0, 0, 0]) == [0, 1]


@pytest.mark.parametrize("label", ["cat", 1.5, [1, 2]])
def test_labels_that_are_no_numbers_are_named(tmp_path, label):
    path = saved(tmp_path / "hub", train={"label": [label] * 3})
    with pytest.raises(InputError, match="whole numbers in column label, got"):
        HubImages(path, 8)


@pytest.mark.parametrize("text", [["a cat", "the cat"], 3, {"en": "a cat"}])
def test_captions_that_are_no_texts_are_named(tmp_path, text):
    """Several captions of an image were one, with Python's brackets and quotation marks among the words."""
    path = saved(tmp_path / "hub", train={"caption": [text] * 3})
    with pytest.raises(InputError, match="expected a text in column caption, got"):
        HubImages(path, 8)
    assert HubImages(saved(tmp_path / "none", train={"caption": [None, "a"]}), 8).captions == ("", "a")


def test_a_data_set_of_no_rows_is_named(tmp_path):
    with pytest.raises(InputError, match="expected a data set that save_to_disk wrote"):
        HubImages(saved(tmp_path / "hub", train={"label": []}), 8)


def test_a_number_that_is_no_class_s_is_named(tars, tmp_path):
    """Each class below it would get a name: of a number such as a sample's own, more than there is memory for."""
    with tarfile.open(tars / "box-3.tar", "w") as tar:
        add(tar, "a.png", encoded(1))
        add(tar, "a.cls", b"1000000000")
    with pytest.raises(InputError, match="below 1,000,000, got 1000000000"):
        ImageShards(tars, 8)
    write_latents(
        tmp_path / "latents", [{"latents": np.zeros((2, 3, 4, 4), np.float32), "labels": np.array([0, 10**12])}]
    )
    with pytest.raises(InputError, match="below 1,000,000, got 1000000000000"):
        LatentShards(tmp_path / "latents")


@pytest.mark.parametrize(
    "tensors",
    [
        {"latents": np.zeros((2,), np.float32)},
        {"latents": np.zeros((0, 3, 4, 4), np.float32)},
        {"latents": np.zeros((2, 3, 4, 4), np.float32), "labels": np.zeros((2, 1), np.int64)},
        {"latents": np.zeros((2, 3, 4, 4), np.float32), "labels": np.array([0.5, np.nan], np.float32)},
        {"latents": np.zeros((2, 3, 4, 4), np.float32), "flipped": np.zeros((2, 3, 4, 2), np.float32)},
    ],
    ids=["numbers", "none", "labels", "fractions", "mirrored"],
)
def test_shards_of_other_shapes_are_refused_before_they_are_read(tmp_path, tensors):
    write_latents(tmp_path / "latents", [tensors])
    with pytest.raises(InputError, match="expected a shard of latents, got"):
        LatentShards(tmp_path / "latents")


def test_what_an_interruption_leaves_of_latents_has_its_scale(tmp_path):
    """The description came last, and failed at numpy's numbers: what lay there by then was read as if it had no scale."""
    values = np.arange(2 * 3 * 16, dtype=np.float32).reshape(2, 3, 4, 4)

    def pieces():
        yield {"latents": values}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(
            tmp_path, pieces(), latent_factor=8, mean=values.mean(axis=(0, 2, 3)), std=values.std(axis=(0, 2, 3))
        )
    source = LatentShards(tmp_path)
    images = source.batch(0, 2).images
    assert source.latent_factor == 8
    assert np.allclose(images.mean(axis=(0, 2, 3)), 0, atol=1e-6) and np.allclose(images.std(axis=(0, 2, 3)), 1)


@pytest.mark.parametrize(
    ("captions", "said"), [([["a", "b"]], "2 for piece 1, .*, got 0"), ([["a"]], "2 for piece 0, .*, got 1")]
)
def test_a_piece_without_its_captions_is_named_as_it_is_written(tmp_path, captions, said):
    """It ended with a StopIteration, or was written and could not be read."""
    pieces = [{"latents": np.zeros((2, 3, 4, 4), np.float32)}] * 2
    with pytest.raises(InputError, match=f"captions: expected {said}"):
        write_latents(tmp_path, pieces, captions=captions)


def test_shards_that_pad_features_apart_are_refused_before_two_of_them_meet(tmp_path):
    """Each shard's captions were padded to the longest of its own."""
    rows = {"latents": np.zeros((2, 3, 4, 4), np.float32)}
    write_latents(
        tmp_path / "latents", [rows | {"features": np.zeros((2, length, 6), np.float32)} for length in (3, 3, 5)]
    )
    with pytest.raises(InputError, match=r"same tensors, of one shape each, .*\(3, 6\).* and .*\(5, 6\)"):
        LatentShards(tmp_path / "latents")


@pytest.mark.parametrize("told", ['"classes": 5', '"classes": "abc"', '"latent_factor": "8"', '"latent_factor": 0'])
def test_descriptions_of_other_types_are_refused(latents, told):
    (latents / "latents.json").write_text("{}")
    with pytest.raises(InputError, match="expected a description of format 1, got format None"):
        LatentShards(latents)
    (latents / "latents.json").write_text("[]")
    with pytest.raises(InputError, match="expected a description of format 1, got"):
        LatentShards(latents)
    (latents / "latents.json").write_text(f'{{"format": 1, {told}}}')
    with pytest.raises(InputError, match="expected a description of format 1, got"):
        LatentShards(latents)


def test_an_image_that_a_data_set_cannot_decode_is_named(tmp_path, monkeypatch):
    """EXIF that PIL cannot write anew, as `datasets` passes it on; a part stands in for the package's own."""

    class Image:
        pass

    class Part:
        features = {"image": Image()}

        def __len__(self):
            return 1

        def __getitem__(self, row):
            raise struct.error("required argument is not an integer")

    monkeypatch.setattr("ditscale.dit.data.hub._load", lambda path: {"train": Part()})
    with pytest.raises(InputError, match="expected an image in row 0 of train, got required argument"):
        HubImages(tmp_path, 8).batch(0, 1)


def test_an_image_of_a_data_set_that_is_too_large_is_named(tmp_path, monkeypatch):
    path = saved(tmp_path / "hub", train={"caption": ["a"] * 3})
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 50)
    with pytest.raises(
        InputError, match=r"expected an image in row \d of train, got Image size \(192 pixels\) exceeds"
    ):
        HubImages(path, 8).batch(0, 1)


def test_what_is_no_data_is_named(tmp_path, tars, latents):
    with pytest.raises(InputError, match="data: expected emoji_scenes, emoji_clips or a folder"):
        open_source(str(tmp_path / "nowhere"), "train", size=8, seed=0, caption_length=4)
    with pytest.raises(InputError, match="flip: expected false for emoji_scenes"):
        open_source("emoji_scenes", "train", size=32, seed=0, caption_length=4, flip=True)
    (tars / "box-3.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match=r"box-3\.tar: expected a tar file, not compressed"):
        ImageShards(tars, 8)
    with tarfile.open(tars / "box-3.tar", "w") as tar:
        add(tar, "a.png", encoded(1))
        add(tar, "a.jpg", encoded(1))
    with pytest.raises(InputError, match="one image a sample"):
        ImageShards(tars, 8)
    with tarfile.open(tars / "box-3.tar", "w") as tar:
        add(tar, "a.png", encoded(1))
        add(tar, "a.cls", b"cat")
    with pytest.raises(InputError, match="whole number as class of 'a'"):
        ImageShards(tars, 8)
    with pytest.raises(InputError, match="without shards"):
        write_latents(latents, [])
    shard = latents / "latents-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="cut short"):
        LatentShards(latents)
    shard.write_bytes(whole)
    (latents / "latents.json").write_text('{"format": 1, "mean": [0.0]}')
    with pytest.raises(InputError, match="for 3 channels"):
        LatentShards(latents)
    (latents / "latents.json").unlink()
    (latents / "latents-00002.captions.jsonl").write_text('"one"\n')
    with pytest.raises(InputError, match="expected 10 captions, got 1"):
        LatentShards(latents)
    safetensors.numpy.save_file({"weights": np.zeros((2, 2), np.float32)}, shard)
    with pytest.raises(InputError, match="expected a shard of latents"):
        LatentShards(latents)


def config_for(path, **model):
    settings = {"image_size": 8, "latent_factor": 1, "in_channels": 3, "patch": 4, "width": 16, "depth": 1, "heads": 2}
    settings |= {"frequency_width": 16, "caption_width": 8, "learn_sigma": False, **model}
    return TrainConfig(
        model=DiTConfig(**settings), data=str(path), flip=True, batch=4, images=80, evaluation_images=4, lr=1e-2
    )


WORDS = {"condition": "caption", "vocabulary_size": 8}
CLASSES = {"condition": "class", "num_classes": 3}
LATENT = {"latent_factor": 8, "image_size": 32, "patch": 2}
FEATURES = {"condition": "caption", "context": "cross-attention", "caption_tokens": 2, "caption_width": 6}


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("tars", WORDS),
        ("hub", CLASSES),
        ("latents", LATENT | CLASSES),
        ("latents", LATENT | WORDS),
        ("latents", LATENT | FEATURES),
        ("latents", LATENT | FEATURES | {"pooled_width": 5}),
    ],
    ids=["shards by caption", "data set by class", "latents by class", "by caption", "by features", "and pooled"],
)
def test_a_run_on_each_kind_of_data(request, tmp_path, kind, model):
    """It resumes to the same bits in the second epoch, and its record counts images, repeats and passes."""
    config = config_for(request.getfixturevalue(kind), **model)
    record = train(config, tmp_path / "whole")
    pool = record["dataset_images"]
    assert 20 < pool < 30 and record["unique_images"] == pool and record["images"] == 80
    assert record["epochs"] == pytest.approx(80 / pool) and record["data"].startswith(kind.replace("tars", "shards"))
    with pytest.raises(Stopped):
        train(config, tmp_path / "parts", should_stop=stop_after(9))
    assert result(train(config, tmp_path / "parts")) == result(record)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    data = RunData.read(tmp_path / "whole")
    assert len(data.vocabulary) == model.get("vocabulary_size", len(data.vocabulary)) and len(data.classes) == 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this process may use cores
def test_workers_prepare_the_same_images(tars, tmp_path):
    config = config_for(tars, **WORDS)
    alone = train(config, tmp_path / "alone")
    with pytest.raises(Stopped):
        train(config, tmp_path / "helped", execution=Execution(data_workers=2), should_stop=stop_after(5))
    helped = train(config, tmp_path / "helped", execution=Execution(data_workers=2))
    assert weights_of(tmp_path / "helped") == weights_of(tmp_path / "alone") and result(helped) == result(alone)
    assert not multiprocessing.active_children()  # they ended with the run, and not with the collector


def test_a_fault_that_a_worker_meets_is_said_in_one_line(tmp_path):
    """The loader put its worker's traceback of thirty lines into the message."""
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    config = config_for(tmp_path, condition="none")
    said = []
    for workers in (0, 1):
        feed = Feeder(config, open_stream(config, "train"), Ranks(Execution()), workers=workers)
        with pytest.raises(InputError, match=r"\.png: expected an image, got") as error:
            feed(0)
        feed.close()
        said.append(str(error.value))
    assert said[0] == said[1]


def test_workers_prepare_no_image_twice(monkeypatch):
    """Each of three, here copies that take turns, reads pieces of several small steps, none of which another reads."""

    def take_turns(pieces, wanted, workers):
        copies = [copy.copy(pieces) for _ in range(workers)]
        return (copies[turn % workers][piece] for turn, piece in enumerate(wanted))

    config, read = tiny(images=4 * 40), []
    stream, ranks = open_stream(config, "train"), Ranks(Execution())
    alone = Feeder(config, open_stream(config, "train"), ranks)
    batch = stream.batch
    monkeypatch.setattr(stream, "batch", lambda start, count: read.append((start, count)) or batch(start, count))
    monkeypatch.setattr("ditscale.dit.training.batches._loader", take_turns)
    helped = Feeder(config, stream, ranks, workers=3, first_step=10)
    for step in range(10, 40):
        for ours, theirs in zip(helped(step), alone(step), strict=True):
            assert torch.equal(ours, theirs)
    assert read == [(0, 64), (64, 64), (128, 64)]


def test_data_that_does_not_fit_the_model_is_named(tars, latents, tmp_path):
    for path, model, named in (
        (tars, WORDS | {"vocabulary_size": 999}, "vocabulary_size: expected at most"),
        (tars, CLASSES | {"num_classes": 4}, "num_classes: expected 3"),
        (tars, LATENT | CLASSES, "model: expected an input of shape"),
        (latents, CLASSES | {"image_size": 4}, "latent_factor"),
        (tars, FEATURES, "expected a text encoder's features"),
    ):
        with pytest.raises(InputError, match=named):
            train(config_for(path, **model), tmp_path / named.split()[0])


def test_a_folder_by_caption_can_be_spoken_to(tmp_path):
    """The words of one's own folder go with the run, so that a prompt can be put to it."""
    from ditscale.dit.image_commands import condition_tensor

    (tmp_path / "x").mkdir()
    for i in range(40):
        picture(i).save(tmp_path / "x" / f"{i}.png")
        (tmp_path / "x" / f"{i}.txt").write_text(caption(i))
    config = config_for(tmp_path / "x", **WORDS)
    train(config, tmp_path / "run")
    words = condition_tensor(config.model, ["a thing"], None, RunData.read(tmp_path / "run"))
    assert words[0, :2].tolist() == [
        Vocabulary(RunData.read(tmp_path / "run").words).words.index(w) for w in ("a", "thing")
    ]
    with pytest.raises(InputError, match=r"expected a run's folder, whose data\.json knows the words"):
        condition_tensor(config.model, ["a thing"])
    assert ImageFolder(tmp_path / "x", 8).unique_images == 40
