"""Train a network to take noise out of photographs, every image cut into tiles for four nodes on this computer.

python -m examples.denoise            # one to two minutes on two cores; files go to out/denoise

It learns from the left parts of scikit-learn's two photographs, and is shown their right parts afterwards.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from PIL import Image
from sklearn.datasets import load_sample_image

from examples.digits import say
from fusetile.cli import main as fusetile
from models import dncnn

PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # of 640x427 pixels
SEEN = 320  # columns of each that it learns from
NOISE = 25  # standard deviation, of 255
PIECES = (3, 3)  # rows and columns that these are cut into
COPIES = 4  # of each piece, with other noise
PATCH = 48  # pixels, of what is trained on
GOAL_db = 4.0  # above the noisy photographs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0 if the photograph has become better by the goal."""
    options = argparse.ArgumentParser(description="Learn to take noise out of photographs, in tiles on local nodes.")
    options.add_argument("--nodes", type=int, default=4, help="node processes (default 4)")
    options.add_argument("--plan", default="grid:2x2", help="how layers are cut over the nodes (default grid:2x2)")
    options.add_argument("--steps", type=int, default=450, help="training steps (default 450)")
    options.add_argument("--seed", type=int, default=0, help="of the noise, the first weights and the patches")
    options.add_argument("-o", "--out", type=Path, default=Path("out/denoise"), help="where files go")
    chosen = options.parse_args(arguments)
    start, out, random = time.monotonic(), chosen.out, np.random.default_rng(chosen.seed)

    say("1. The data: pieces of photographs, and the same pieces with noise")
    photographs = {name: load_sample_image(name) for name in PHOTOGRAPHS}
    count = write_pairs(out / "pairs", [image[:, :SEEN] for image in photographs.values()], random)
    print(f"{count} pairs of images in {out / 'pairs'}/input and target.")

    say("2. The network: DnCNN, smaller than in the paper; weights random")
    model = out / "dncnn.onnx"
    onnx.save(dncnn.build(size=PATCH, layers=6, width=3 / 8, seed=chosen.seed), model)
    print(f"{model}: six convolutions, BatchNorm, and a shortcut from input to output.")

    say(f"3. Train it with {chosen.nodes} processes that talk over TCP, plan {chosen.plan}")
    command = ["train", model, "--data", out / "pairs", "--nodes", chosen.nodes, "--plan", chosen.plan]
    command += ["--loss", "mse", "--batch", 16, "--optimizer", "adam", "--lr", 0.003, "--schedule", "cosine"]
    command += ["--augment", "flip,crop", "--steps", chosen.steps, "--seed", chosen.seed, "-o", out]
    words = [str(part) for part in command]
    print("$ fusetile", " ".join(words), flush=True)
    fusetile(words)

    say("4. What it has never seen, the rest of the photographs, in ONNX Runtime")
    better = [improve(out, name, image[:, SEEN:], random) for name, image in photographs.items()]
    print(f"The whole demo took {time.monotonic() - start:.0f} s.")
    return 0 if min(better) > GOAL_db else 1


def improve(out: Path, name: str, clean: np.ndarray, random: np.random.Generator) -> float:
    """Add noise to an image and take it out; by how many dB that makes it better. Draws both, beside the clean one."""
    noisy = with_noise(clean, random)
    after = denoised(out / "trained.onnx", noisy)
    before_db, after_db = psnr_db(noisy, clean), psnr_db(after, clean)
    path = (out / name).with_suffix(".png")
    Image.fromarray(np.concatenate([noisy, after, clean], axis=1)).save(path)
    print(f"{path}: noisy, PSNR {before_db:.1f} dB; what the network makes of it, {after_db:.1f} dB; without noise.")
    return after_db - before_db


def with_noise(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An image of bytes as a bad camera sees it."""
    return (image + random.normal(0, NOISE, image.shape)).round().clip(0, 255).astype(np.uint8)


def write_pairs(folder: Path, photographs: Sequence[np.ndarray], random: np.random.Generator) -> int:
    """Pieces of photographs as targets, with noise as inputs; how many there are."""
    rows = [row for photograph in photographs for row in np.array_split(photograph, PIECES[0])]
    pieces = [piece for row in rows for piece in np.array_split(row, PIECES[1], axis=1)]
    for name in ("input", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, piece in enumerate(COPIES * pieces):
        Image.fromarray(with_noise(piece, random)).save(folder / "input" / f"{number:02}.png")
        Image.fromarray(piece).save(folder / "target" / f"{number:02}.png")
    return COPIES * len(pieces)


def denoised(model: Path, image: np.ndarray) -> np.ndarray:
    """What a model makes of an image [H,W,3] of bytes, of any size: the network is nothing but convolutions."""
    network = onnx.load(model)
    for end in (*network.graph.input, *network.graph.output):
        for side, name in zip(end.type.tensor_type.shape.dim[2:], ("height", "width"), strict=True):
            side.dim_param = name
    session = onnxruntime.InferenceSession(network.SerializeToString())
    (found,) = session.run(None, {"x": image.transpose(2, 0, 1)[None].astype(np.float32) / 255})
    return (found[0].transpose(1, 2, 0) * 255).round().clip(0, 255).astype(np.uint8)


def psnr_db(image: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal to noise ratio."""
    return 10 * math.log10(255**2 / np.square(image.astype(float) - clean).mean())


if __name__ == "__main__":
    sys.exit(main())
