"""Train a small YOLOv2 to find and read digits, with four nodes on this computer; look at what it finds.

python -m examples.detection         # 2 to 5 minutes on two cores; files go to out/detection
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from PIL import Image, ImageDraw, ImageFont
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from fusetile.cli import main as fusetile
from fusetile.runtime.precision import RIGHT_iou, detections, mean_average_precision, suppressed, true_boxes
from fusetile.yolo import box_iou
from models import yolov2

SIZE, CELL = 208, 16  # pixels
SCENES, TESTED = 1024, 96
SCANS_HELD_BACK = 360  # of 1797: only in the test scenes
DIGITS = (3, 7)  # per scene
ENLARGED = (3, 7)  # 8x8 scans become 24x24 to 48x48 pixels
ANCHORS = 3
BATCH, EPOCHS, LEARNING_RATE = 16, 10, 0.004
GOAL = 0.8
SHOWN_score = 0.3
PIXEL = 3  # how large pixels of scenes are drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0 if the precision is over the goal."""
    options = argparse.ArgumentParser(description="Train a detector on digits with local nodes, score and draw it.")
    options.add_argument("--nodes", type=int, default=4, help="node processes (default 4)")
    options.add_argument("--plan", default="auto", help="how layers are cut over the nodes (default auto)")
    options.add_argument("--scenes", type=int, default=SCENES, help=f"to train on (default {SCENES})")
    options.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the scenes (default {EPOCHS})")
    options.add_argument("--seed", type=int, default=0, help="of the scenes, the first weights and the shuffling")
    options.add_argument("-o", "--out", type=Path, default=Path("out/detection"), help="where files go")
    chosen = options.parse_args(arguments)
    start, out = time.monotonic(), chosen.out
    scenes = {"train": chosen.scenes, "test": min(chosen.scenes, TESTED)}

    say("1. The data: scans of handwritten digits, placed in scenes, as a folder in YOLO's format")
    sizes = write_scenes(out, scenes, chosen.seed)
    print(f"{scenes['train']} scenes to train on: {out / 'train'}; {scenes['test']} held back: {out / 'test'}.")
    anchors = clusters(sizes / CELL)
    text = " ".join(f"{w:.2f},{h:.2f}" for w, h in anchors)
    print(f"{len(sizes)} digits; their {ANCHORS} typical sizes, in cells of {CELL} pixels, are the anchors: {text}")

    say("2. The network: a tiny YOLOv2, weights random")
    model = out / "tiny.onnx"
    onnx.save(
        yolov2.build(tiny=True, anchors=ANCHORS, size=SIZE, channels=1, classes=10, width=0.5, seed=chosen.seed), model
    )

    say(f"3. Compile it for {chosen.nodes} nodes and train: {chosen.nodes} processes that talk over TCP")
    command = ["train", model, "--data", out / "train", "--loss", "yolov2", "--anchors", text]
    command += ["--val", out / "test", "--val-every", 2 * scenes["train"] // BATCH]
    command += ["--nodes", chosen.nodes, "--plan", chosen.plan, "--batch", BATCH, "--epochs", chosen.epochs]
    command += ["--optimizer", "adam", "--lr", LEARNING_RATE, "--schedule", "one-cycle", "--seed", chosen.seed]
    words = [str(part) for part in [*command, "-o", out]]
    print("$ fusetile", " ".join(words), flush=True)
    fusetile(words)

    say("4. Score the result in ONNX Runtime, and draw what it finds")
    images, true = read_scenes(out / "test")
    found = detect(out / "trained.onnx", images, anchors.reshape(-1))
    precision = mean_average_precision(found, true)
    print(f"mAP@0.5 of the {len(true)} digits in the {len(images)} held-back scenes: {precision:.3f}")
    print(f"Green: found and right; red: found and wrong, or missed: {draw(out, found, true)}")
    print(f"The whole demo took {time.monotonic() - start:.0f} s.")
    return 0 if precision > GOAL else 1


# -- the data ----------------------------------------------------------------------------------------------------------


def write_scenes(out: Path, scenes: Mapping[str, int], seed: int) -> np.ndarray:
    """So many scenes to train on and to test; returns the widths and heights, in pixels, of the digits to train on."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(digits.images))
    parts = {"test": order[:SCANS_HELD_BACK], "train": order[SCANS_HELD_BACK:]}
    sizes = []
    for name, scans in parts.items():
        shutil.rmtree(out / name, ignore_errors=True)  # of another run
        for kind in ("images", "labels"):
            (out / name / kind).mkdir(parents=True, exist_ok=True)
        for number in range(scenes[name]):
            chosen = rng.choice(scans, rng.integers(*DIGITS, endpoint=True))
            scene, boxes = compose(digits.images[chosen] / 16, rng)
            Image.fromarray(scene).save(out / name / "images" / f"{number:04}.png")
            lines = [
                f"{digits.target[scan]} {' '.join(f'{value / SIZE:.6f}' for value in box)}\n"
                for scan, box in zip(chosen, boxes, strict=True)
            ]
            (out / name / "labels" / f"{number:04}.txt").write_text("".join(lines))
            sizes += [box[2:] for box in boxes] if name == "train" else []
    return np.array(sizes)


def compose(scans: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """A scene [208,208] of bytes, uneven and noisy, with the scans [n,8,8] in it, side by side; and the boxes around
    their ink: centre x, centre y, width, height in pixels."""
    across = np.linspace(-1, 1, SIZE)
    slope = rng.uniform(-30, 30, 2)
    scene = 70 + slope[0] * across[:, None] + slope[1] * across + rng.normal(0, 8, (SIZE, SIZE))
    taken, boxes = np.zeros((SIZE, SIZE), bool), []
    for scan in scans:
        factor = int(rng.integers(*ENLARGED))
        side = 8 * factor
        while True:
            x, y = rng.integers(0, SIZE - side, 2, endpoint=True)
            place = np.s_[y : y + side, x : x + side]
            if not taken[place].any():
                break
        taken[place] = True
        smooth = Image.fromarray((255 * scan).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(smooth) / 255
        scene[place] += rng.uniform(90, 150) * ink
        rows, columns = (np.flatnonzero(ink.max(axis) > 0.25) for axis in (1, 0))
        (top, bottom), (left, right) = ((line[0], line[-1] + 1) for line in (rows, columns))
        boxes.append(np.array([x + (left + right) / 2, y + (top + bottom) / 2, right - left, bottom - top]))
    return np.clip(scene, 0, 255).astype(np.uint8), boxes


def clusters(sizes: np.ndarray) -> np.ndarray:
    """Typical widths and heights [anchors, 2], small ones first."""
    centres = KMeans(ANCHORS, n_init=4, random_state=0).fit(sizes).cluster_centers_
    return centres[np.argsort(centres.prod(1))].round(2)


def read_scenes(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [M,1,208,208] of 0 to 1, and the true boxes as rows."""
    images, rows = [], []
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        images.append(np.asarray(Image.open(path), np.float32)[None] / 255)
        boxes = np.loadtxt(folder / "labels" / f"{path.stem}.txt", ndmin=2)
        rows.append(true_boxes(boxes[None], np.array([number])))
    return np.stack(images), np.concatenate(rows)


# -- the result --------------------------------------------------------------------------------------------------------


def detect(model: Path, images: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """What the model finds in the images, as rows."""
    session = onnxruntime.InferenceSession(model)
    (output,) = session.run(None, {"x": images})
    found = detections(output, anchors.tolist(), (SIZE // CELL, SIZE // CELL), np.arange(len(images)))
    return suppressed(found)


def draw(out: Path, found: np.ndarray, true: np.ndarray, *, across: int = 3, down: int = 2) -> Path:
    """A sheet with the first scenes, and what is found in them."""
    side = SIZE * PIXEL
    sheet = Image.new("RGB", (across * side, down * side))
    for number, path in enumerate(sorted((out / "test" / "images").iterdir())[: across * down]):
        picture = Image.open(path).convert("RGB").resize((side, side))
        pen = ImageDraw.Draw(picture)
        mine, theirs = found[(found[:, 0] == number) & (found[:, 2] > SHOWN_score)], true[true[:, 0] == number]
        for row in mine:
            right = any(same(row, other) for other in theirs)
            outline(pen, row, f"{row[1]:.0f}  {row[2]:.2f}", "lime" if right else "red")
        for row in theirs:
            if not any(same(row, other) for other in mine):
                outline(pen, row, f"missed: {row[1]:.0f}", "red")
        sheet.paste(picture, (number % across * side, number // across * side))
    path = out / "found.png"
    sheet.save(path)
    return path


def same(row: np.ndarray, other: np.ndarray) -> bool:
    """Whether two boxes are of the same class and place."""
    return bool(row[1] == other[1] and box_iou(row[3:, None], other[3:, None])[0] >= RIGHT_iou)


def outline(pen: ImageDraw.ImageDraw, row: np.ndarray, label: str, color: str) -> None:
    """A box with its label above, or in it where there is no room."""
    x, y, w, h = row[3:] * SIZE * PIXEL
    left, top = x - w / 2, y - h / 2
    pen.rectangle((left, top, left + w, top + h), outline=color, width=2)
    pen.text((left, top - 18 if top > 18 else top + 2), label, fill=color, font=ImageFont.load_default(size=15))


def say(title: str) -> None:
    print(f"\n{title}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
