"""What the command line can say of what is compiled: the loss, the optimizer, the plan."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from fusetile.cluster import Wire
from fusetile.command_line import check_values, numbers, option
from fusetile.errors import UserError
from fusetile.passes.add_optimizer import Kind, Optimizer
from fusetile.passes.differentiate import MODEL, BoxOptions, ClassOptions, Criterion
from fusetile.rates import Rates, Schedule

Loss = Literal["cross-entropy", "nll", "mse", "l1", "smooth-l1", "bce-with-logits", "dice", "yolov2", "model"]

_training, _plan = (functools.partial(option, panel) for panel in ("Training", "Plan"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is trained and how. Raises UserError for numbers that make no sense."""

    loss: Annotated[
        Loss,
        _training(
            "--loss",
            "cross-entropy (of logits) and nll (of log-probabilities): targets are class numbers, per sample or per "
            "pixel; mse, l1, smooth-l1, bce-with-logits, dice: arrays shaped like the output; yolov2: boxes; model: "
            "the first output is the loss.",
            metavar="LOSS",
        ),
    ] = "cross-entropy"
    loss_model: Annotated[
        Path | None,
        _training(
            "--loss-model",
            "Instead of --loss: an ONNX file whose inputs are the model's outputs, by name or in order, then targets; "
            "its first output is the loss.",
            metavar="LOSS.onnx",
        ),
    ] = None
    loss_weights: Annotated[
        str, _training("--loss-weights", "Factors of the losses, if there are several outputs.", metavar="W0,W1,...")
    ] = ""
    ignore_index: Annotated[
        int | None, _training("--ignore-index", "Label of samples or pixels that do not count.", metavar="LABEL")
    ] = None
    class_weights: Annotated[
        str, _training("--class-weights", "What each class counts, as in PyTorch: 1,0.5,2.", metavar="W0,W1,...")
    ] = ""
    label_smoothing: Annotated[
        float, _training("--label-smoothing", "Part of a label that is spread over all classes.", min=0.0, max=1.0)
    ] = 0.0
    anchors: Annotated[
        str,
        _training(
            "--anchors",
            "Of yolov2: widths and heights in cells of the output's grid. Default: those for Pascal VOC in the paper.",
            metavar="W,H W,H ...",
        ),
    ] = ""
    lambdas: Annotated[
        str,
        _training(
            "--lambdas",
            "Factors of yolov2's terms: place and size, object, no object, class. Default: 5,1,0.5,1.",
            metavar="L,L,L,L",
        ),
    ] = ""
    max_boxes: Annotated[
        int | None,
        _training("--max-boxes", "Room for boxes per image, for yolov2. Default: 30, or what the data need.", min=1),
    ] = None
    batch: Annotated[
        int | None,
        _training("--batch", "Samples per step, over all devices. Default: the model's own, or 1.", min=1),
    ] = None
    optimizer: Annotated[
        Kind, _training("--optimizer", "PyTorch's, with its defaults where no option says otherwise.")
    ] = "sgd"
    learning_rate: Annotated[
        float | None,
        _training("--lr", "Learning rate. Default: 0.01; for adam and adamw 0.001."),
    ] = None
    momentum: Annotated[
        float | None,
        _training("--momentum", "Of sgd (default 0.9) and rmsprop (default 0); 0 keeps no velocity in memory."),
    ] = None
    nesterov: Annotated[bool, _training("--nesterov", "Nesterov's momentum, for sgd.")] = False
    weight_decay: Annotated[
        float | None,
        _training(
            "--weight-decay",
            "Added to the gradient of every parameter, times the parameter; adamw shrinks the parameter itself. "
            "Default: 0; for adamw 0.01.",
        ),
    ] = None
    betas: Annotated[str, _training("--betas", "Of adam and adamw.", metavar="B1,B2")] = "0.9,0.999"
    alpha: Annotated[float, _training("--alpha", "Of rmsprop: what stays of the mean square.", min=0.0, max=1.0)] = 0.99
    epsilon: Annotated[float, _training("--eps", "Of adam, adamw and rmsprop.", min=0.0)] = 1e-8
    clip_norm: Annotated[
        float, _training("--clip-norm", "Scale all gradients down to this norm; 0 for no limit.", min=0.0)
    ] = 0.0
    ema: Annotated[
        float,
        _training(
            "--ema",
            "The result is running averages of the weights, of which this part stays per step.",
            min=0.0,
            max=1.0,
        ),
    ] = 0.0
    freeze: Annotated[str, _training("--freeze", "Initializers that stay as they are.", metavar="PATTERN,...")] = ""
    train: Annotated[str, _training("--train", "Train only these initializers.", metavar="PATTERN,...")] = ""
    schedule: Annotated[
        Schedule,
        _training(
            "--schedule",
            "How the learning rate goes on, step by step: constant, step, multistep, cosine, one-cycle, polynomial.",
            metavar="SCHEDULE",
        ),
    ] = "constant"
    warmup: Annotated[
        int, _training("--warmup", "Steps in which the learning rate rises linearly.", min=0, metavar="STEPS")
    ] = 0
    step_size: Annotated[int, _training("--step-size", "Of schedule step.", min=1, metavar="STEPS")] = 1000
    milestones: Annotated[str, _training("--milestones", "Of schedule multistep.", metavar="STEP,...")] = ""
    gamma: Annotated[float, _training("--gamma", "Factor of schedules step and multistep.", min=0.0)] = 0.1
    power: Annotated[float, _training("--power", "Of schedule polynomial.", min=0.0)] = 1.0
    min_lr: Annotated[float, _training("--min-lr", "Where schedule cosine ends.", min=0.0)] = 0.0
    bn: Annotated[
        Literal["train", "frozen"],
        _training(
            "--bn",
            "BatchNormalization: train uses and updates the statistics of the whole batch; frozen uses the model's.",
        ),
    ] = "train"
    dropout: Annotated[
        float | None,
        _training("--dropout", "Overrides the ratio of every Dropout; 0 turns it off.", min=0.0, max=0.99),
    ] = None
    numerics: Annotated[
        Literal["fast", "strict"],
        _training(
            "--numerics",
            "How 3x3 convolutions may round: strict: direct kernels and Winograd F(2x2), which is as exact; fast: also "
            "F(4x4), whose L2 errors are up to 2.2 times those of direct kernels (weight gradients of small maps: 3.5 "
            "times), some 1e-6 of the values.",
        ),
    ] = "fast"
    seed: Annotated[int, _training("--seed", "Of shuffling, augmentation and dropout masks.", min=0)] = 0
    accumulate: Annotated[
        int,
        _training(
            "--accumulate",
            "Batches per step: the optimizer takes the mean of their gradients; devices exchange them once per step if "
            "memory allows it. BatchNormalization takes the statistics of each batch by itself, which are not those of "
            "one large batch; its running ones move on K times per step.",
            min=1,
            metavar="K",
        ),
    ] = 1
    source: Annotated[
        str,
        _training(
            "--source",
            "The only node that has the data; it sends the others their parts. Default: what cluster.toml says, or all "
            "nodes have the data.",
            metavar="NODE",
        ),
    ] = ""
    validation: Annotated[bool, _training("--validation", "Also compile what --val of fusetile-runtime runs.")] = False
    plan: Annotated[
        str,
        _plan(
            "--plan",
            "How layers are cut over the devices: auto (a search for the fastest), single, batch (samples), "
            "grid:RxC (tiles of the image), channel (output channels), random:SEED, or a plan.json.",
        ),
    ] = "auto"
    halo: Annotated[
        Literal["auto", "exchange", "recompute"],
        _plan(
            "--halo",
            "What tiles need of their neighbours: exchange it, recompute it, or whichever is predicted to be faster.",
        ),
    ] = "auto"
    wire: Annotated[
        Wire,
        _plan(
            "--wire",
            "As what maps and gradients travel between devices: fp16 halves their bytes and rounds every value to 11 "
            "significant bits, at either end of a message only; weights, statistics and losses stay fp32.",
        ),
    ] = "fp32"
    guard: Annotated[
        bool,
        option(
            "Looking inside",
            "--guard",
            "Leave gaps around all buffers, and let the nodes look after every kernel whether it wrote into one: slow.",
        ),
    ] = False

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the losses of several outputs."""
        return numbers("--loss-weights", self.loss_weights)

    @property
    def objective(self) -> str:
        """The loss as the graph has it: that of --loss-model is a part of it."""
        return MODEL if self.loss_model else self.loss

    @property
    def classes(self) -> ClassOptions:
        """What the loss of classes counts how much."""
        weights = numbers("--class-weights", self.class_weights)
        return ClassOptions(ignore=self.ignore_index, weights=weights, smoothing=self.label_smoothing)

    @property
    def boxes(self) -> BoxOptions:
        """What yolov2 goes by."""
        usual = BoxOptions()
        anchors = numbers("--anchors", ",".join(self.anchors.replace(",", " ").split())) or usual.anchors
        factors = numbers("--lambdas", self.lambdas) or usual.factors
        return BoxOptions(anchors=anchors, factors=factors, most=self.max_boxes or usual.most)

    @property
    def criterion(self) -> Criterion:
        """The loss and all about it."""
        return Criterion(loss=self.objective, classes=self.classes, boxes=self.boxes, weights=self.weights)

    @property
    def update(self) -> Optimizer:
        """The optimizer, with the defaults that it has in PyTorch, and momentum 0.9 for sgd."""
        momentum = {"sgd": 0.9}.get(self.optimizer, 0.0) if self.momentum is None else self.momentum
        decay = {"adamw": 0.01}.get(self.optimizer, 0.0) if self.weight_decay is None else self.weight_decay
        return Optimizer(
            kind=self.optimizer,
            momentum=momentum,
            nesterov=self.nesterov,
            weight_decay=decay,
            betas=self._betas,
            alpha=self.alpha,
            epsilon=self.epsilon,
            clip_norm=self.clip_norm,
            ema=self.ema,
        )

    @property
    def rates(self) -> Rates:
        """The learning rate of every step."""
        milestones = numbers("--milestones", self.milestones)
        rate = {"adam": 0.001, "adamw": 0.001}.get(self.optimizer, 0.01)
        return Rates(
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            step_size=self.step_size,
            milestones=tuple(map(int, milestones)),
            gamma=self.gamma,
            power=self.power,
            minimum=self.min_lr,
            betas=self._betas,
        )

    @property
    def _betas(self) -> tuple[float, float]:
        first, second = numbers("--betas", self.betas)
        return first, second

    def __post_init__(self) -> None:
        check_values(self)
        for flag, value in (
            ("--lr", self.learning_rate),
            ("--momentum", self.momentum),
            ("--weight-decay", self.weight_decay),
        ):
            if value is not None and value < 0:
                raise UserError(f"{flag} {value}: must be at least 0")
        betas = numbers("--betas", self.betas)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"--betas {self.betas}: give two numbers from 0 to below 1, such as 0.9,0.999")
        if self.nesterov and (self.optimizer != "sgd" or not self.update.momentum):
            raise UserError("--nesterov needs --optimizer sgd and a momentum above 0")
        if self.momentum and self.optimizer in ("adam", "adamw"):
            raise UserError(f"--momentum {self.momentum}: {self.optimizer} has none; see --betas")
        for name, flag, chosen, fitting in _FITTING:
            value, choice = getattr(self, name), getattr(self, chosen)
            if value != _DEFAULTS[name] and choice not in fitting:
                raise UserError(
                    f"{flag} {value} has no effect with --{chosen} {choice}: it is for {', '.join(fitting)}"
                )
        if any(step < 0 or step % 1 for step in numbers("--milestones", self.milestones)):
            raise UserError(f"--milestones {self.milestones}: steps are whole numbers of at least 0")
        if self.schedule == "multistep" and not self.rates.milestones:
            raise UserError("--schedule multistep needs --milestones")
        if not self.ema < 1:
            raise UserError(f"--ema {self.ema}: must be below 1, or no weight would ever count")
        if self.loss_model and self.loss not in ("cross-entropy", MODEL):
            raise UserError(f"--loss-model {self.loss_model} is the loss: leave out --loss {self.loss}")
        if any(weight < 0 for weight in self.weights):
            raise UserError(f"--loss-weights {self.loss_weights}: must be at least 0")
        boxes = self.boxes
        if len(boxes.anchors) % 2 or min(boxes.anchors) <= 0:
            raise UserError(f"--anchors {self.anchors!r}: give pairs of numbers above 0, such as 1.3,1.7 3.2,4.0")
        if len(boxes.factors) != 4 or min(boxes.factors) < 0:
            raise UserError(f"--lambdas {self.lambdas}: give four numbers of at least 0, such as 5,1,0.5,1")
        weights = self.classes.weights
        if any(weight < 0 for weight in weights) or (weights and not any(weights)):
            raise UserError(f"--class-weights {self.class_weights}: weights must be at least 0, and one of them above")


_FITTING: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("betas", "--betas", "optimizer", ("adam", "adamw")),
    ("alpha", "--alpha", "optimizer", ("rmsprop",)),
    ("epsilon", "--eps", "optimizer", ("adam", "adamw", "rmsprop")),
    ("step_size", "--step-size", "schedule", ("step",)),
    ("milestones", "--milestones", "schedule", ("multistep",)),
    ("gamma", "--gamma", "schedule", ("step", "multistep")),
    ("power", "--power", "schedule", ("polynomial",)),
    ("min_lr", "--min-lr", "schedule", ("cosine",)),
    ("anchors", "--anchors", "loss", ("yolov2",)),
    ("lambdas", "--lambdas", "loss", ("yolov2",)),
    ("max_boxes", "--max-boxes", "loss", ("yolov2",)),
)
"""Fields that count only with some choices of another: (field, its option, the other, those choices)."""
_DEFAULTS = {each.name: each.default for each in fields(Training)}
