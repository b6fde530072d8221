"""Train a convolutional network on real images with four nodes on this computer, and score it in ONNX Runtime.

python -m examples.digits            # about a minute on two cores; files go to out/digits
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from sklearn.datasets import load_digits

from fusetile.cli import main as fusetile
from models import vgg_small

HELD_BACK = 360  # of 1797 scans: never trained on
ENLARGED = 4  # 8x8 scans become 32x32 images
GOAL = 0.97


def main() -> int:
    """Run the demo; the exit status is 0 if the accuracy is over the goal."""
    options = argparse.ArgumentParser(description="Train on real images with local nodes, score in ONNX Runtime.")
    options.add_argument("--nodes", type=int, default=4, help="node processes (default 4)")
    options.add_argument("--plan", default="auto", help="how layers are cut over the nodes (default auto)")
    options.add_argument("--seed", type=int, default=0, help="of the split, the first weights and the shuffling")
    options.add_argument("-o", "--out", type=Path, default=Path("out/digits"), help="where files go")
    chosen = options.parse_args()
    start, out = time.monotonic(), chosen.out
    out.mkdir(parents=True, exist_ok=True)

    say("1. The data: handwritten digits, scans from scikit-learn's own package")
    train, test = split_digits(chosen.seed)
    np.savez(out / "train.npz", x=train["x"], y=train["y"])
    print(f"{len(train['y'])} images of 32x32 to train on: {out / 'train.npz'}; {len(test['y'])} held back.")
    print("One of them:")
    print(picture(test["x"][0, 0]))

    say("2. The network: six convolutions with BatchNorm, weights random")
    model = out / "vgg_small.onnx"
    onnx.save(vgg_small.build(size=32, channels=1, classes=10, seed=chosen.seed), model)
    print(f"{model}; untrained, it reads {100 * accuracy(model, test):.1f} % of the held-back digits.")

    say(f"3. Compile it for {chosen.nodes} nodes and train: {chosen.nodes} processes that talk over TCP")
    command = ["train", model, "--data", out / "train.npz", "--nodes", chosen.nodes, "--plan", chosen.plan]
    command += ["--batch", 32, "--epochs", 8, "--lr", 0.05, "--weight-decay", 1e-4, "--seed", chosen.seed, "-o", out]
    arguments = [str(part) for part in command]
    print("$ fusetile", " ".join(arguments), flush=True)
    fusetile(arguments)

    say("4. Score the result in ONNX Runtime, which knows nothing of fusetile")
    reached = accuracy(out / "trained.onnx", test)
    print(f"{out / 'trained.onnx'} reads {100 * reached:.1f} % of the {len(test['y'])} held-back digits.")
    print(f"The whole demo took {time.monotonic() - start:.0f} s.")
    return 0 if reached > GOAL else 1


def split_digits(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What is trained on and what is held back: images x [M,1,32,32] of 0 to 1, and their digits y [M]."""
    digits = load_digits()
    images = np.kron(digits.images / 16, np.ones((ENLARGED, ENLARGED)))
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = images[order, None].astype(np.float32), digits.target[order]
    return {"x": x[HELD_BACK:], "y": y[HELD_BACK:]}, {"x": x[:HELD_BACK], "y": y[:HELD_BACK]}


def accuracy(model: Path, data: dict[str, np.ndarray]) -> float:
    """The share of images whose largest output is the right digit."""
    session = onnxruntime.InferenceSession(model)
    (logits,) = session.run(None, {"x": data["x"]})
    return float((logits.argmax(axis=1) == data["y"]).mean())


def picture(image: np.ndarray) -> str:
    """An image [32,32] in letters."""
    shades = " .:-=+*#%@"
    rows = image[::ENLARGED, ::ENLARGED]
    return "\n".join("    " + "".join(2 * shades[round(9 * value)] for value in row) for row in rows)


def say(title: str) -> None:
    print(f"\n{title}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
