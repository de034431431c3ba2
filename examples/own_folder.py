"""Train a DiT on your own pictures: a folder of them, with captions in captions.jsonl or in a .txt beside each.

Run: python examples/own_folder.py [FOLDER [OUT]]        Without a folder it makes one of 200 emoji scenes and trains a few steps.
"""

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

from ditscale.dit import DiTConfig
from ditscale.dit.data import EmojiScenes, ImageFolder
from ditscale.dit.training import TrainConfig, train

SIZE = 32


def make_folder(folder: Path, count: int = 200) -> None:
    """Pictures and captions as you may have them."""
    scenes = EmojiScenes("train", SIZE).batch(0, count)
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as lines:
        for i, (image, caption) in enumerate(zip(scenes.images, scenes.captions, strict=True)):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:04d}.png")
            lines.write(json.dumps({"file": f"{i:04d}.png", "caption": caption}) + "\n")


def main(folder: Path, out: Path, epochs: float) -> None:
    """A small model of the words that the folder's captions use; give it width and depth as your compute allows."""
    images = ImageFolder(folder, SIZE, split="train")
    model = DiTConfig(
        image_size=SIZE, latent_factor=1, in_channels=3, patch=4, width=64, depth=2, heads=8, learn_sigma=False,
        condition="caption", vocabulary_size=len(images.vocabulary), mup_base_width=64,
    )  # fmt: skip
    config = TrainConfig(
        model=model, data=str(folder), flip=True, batch=16, images=int(epochs * images.unique_images), lr=5e-3,
        prediction="clean", evaluation_images=8,
    )  # fmt: skip
    record = train(config, out)
    print(
        f"{record['images']} images, {record['epochs']:.1f} epochs of {record['dataset_images']}, loss {record['loss']:.4f}"
    )
    if len(sys.argv) > 1:
        print(f"next: ditscale sample {out} --caption '{images.captions[0]}' --out sample.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        if len(sys.argv) > 1:
            main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "run"), epochs=100)
        else:
            pictures = Path(scratch) / "pictures"
            pictures.mkdir()
            make_folder(pictures)
            main(pictures, Path(scratch) / "run", epochs=2)
