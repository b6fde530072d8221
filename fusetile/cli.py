"""The command `fusetile`: compile, train, export, explain."""

from __future__ import annotations

import signal
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fusetile.cluster import Cluster, local_cluster, read_cluster
from fusetile.compile import PASSES, Training, compile_model
from fusetile.errors import FusetileError, UserError
from fusetile.explain import devices_table, explain_build, read_plan
from fusetile.local import RunOptions, export_run, free_ports, train_locally
from fusetile.progress import CompileProgress
from fusetile.trace import Stopped, Trace

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train convolutional networks on a handful of small computers, with no server.",
    epilog="Example: fusetile train model.onnx --data digits.npz --nodes 4 --batch 32 --epochs 5 -o out",
)


class Loss(StrEnum):
    cross_entropy = "cross-entropy"
    mse = "mse"


class Optimizer(StrEnum):
    sgd = "sgd"


class Bn(StrEnum):
    train = "train"
    frozen = "frozen"


class HaloChoice(StrEnum):
    auto = "auto"
    exchange = "exchange"
    recompute = "recompute"


Model = Annotated[
    Path, typer.Argument(help="The network: an ONNX file, as exported by PyTorch and others.", metavar="MODEL.onnx")
]
LossOption = Annotated[
    Loss,
    typer.Option(
        "--loss",
        help="cross-entropy: targets are class numbers; mse: arrays shaped like the output.",
        rich_help_panel="Training",
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch",
        min=1,
        help="Samples per step, over all devices. Default: the model's own, or 1.",
        rich_help_panel="Training",
    ),
]
OptimizerOption = Annotated[
    Optimizer,
    typer.Option("--optimizer", help="sgd is PyTorch's: v = momentum*v + g; w -= lr*v.", rich_help_panel="Training"),
]
RateOption = Annotated[float, typer.Option("--lr", help="Learning rate.", rich_help_panel="Training")]
MomentumOption = Annotated[
    float, typer.Option("--momentum", help="Momentum; 0 keeps no velocity in memory.", rich_help_panel="Training")
]
DecayOption = Annotated[
    float,
    typer.Option(
        "--weight-decay",
        help="Added to the gradient of every parameter, times the parameter.",
        rich_help_panel="Training",
    ),
]
BnOption = Annotated[
    Bn,
    typer.Option(
        "--bn",
        help="BatchNormalization: train uses and updates the statistics of the whole batch; frozen uses the model's.",
        rich_help_panel="Training",
    ),
]
DropoutOption = Annotated[
    float | None,
    typer.Option(
        "--dropout",
        min=0.0,
        max=0.99,
        help="Overrides the ratio of every Dropout; 0 turns it off.",
        rich_help_panel="Training",
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="Of shuffling and dropout masks.", rich_help_panel="Training")
]
PlanOption = Annotated[
    str,
    typer.Option(
        "--plan",
        help="How layers are cut over the devices: auto (a search for the fastest), single, batch (samples), "
        "grid:RxC (tiles of the image), channel (output channels), random:SEED, or a plan.json.",
        rich_help_panel="Plan",
    ),
]
HaloOption = Annotated[
    HaloChoice,
    typer.Option(
        "--halo",
        help="What tiles need of their neighbours: exchange it, recompute it, or whichever is predicted to be faster.",
        rich_help_panel="Plan",
    ),
]
DumpOption = Annotated[
    Path | None,
    typer.Option(
        "--dump",
        help="Write the graph after each pass here, as text and Graphviz.",
        metavar="DIR",
        rich_help_panel="Looking inside",
    ),
]
StopOption = Annotated[
    str | None,
    typer.Option(
        "--stop-after",
        help=f"Stop after a pass: {', '.join(PASSES)}.",
        metavar="PASS",
        rich_help_panel="Looking inside",
    ),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", help="Show how long each pass took.", rich_help_panel="Looking inside")
]


@app.command("compile")
def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", metavar="BUILD")],
    cluster: Annotated[
        Path | None, typer.Option("--cluster", help="The devices: a cluster.toml (see README).", metavar="FILE")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Instead of --cluster: that many equal devices at 127.0.0.1.")
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="With --nodes: what they are: host, pi3, pi4 or pi5.", metavar="CPU")
    ] = "host",
    loss: LossOption = Loss.cross_entropy,
    batch: BatchOption = None,
    optimizer: OptimizerOption = Optimizer.sgd,
    lr: RateOption = 0.01,
    momentum: MomentumOption = 0.9,
    weight_decay: DecayOption = 0.0,
    bn: BnOption = Bn.train,
    dropout: DropoutOption = None,
    seed: SeedOption = 0,
    plan: PlanOption = "auto",
    halo: HaloOption = HaloChoice.auto,
    dump: DumpOption = None,
    stop_after: StopOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Compile a model for a cluster: one folder per device, to be copied there.

    Then, on each device:  fusetile-runtime BUILD/nodes/NAME --data DATA
    """
    if (cluster is None) == (nodes is None):
        raise UserError("give either --cluster FILE (your devices) or --nodes N (that many at 127.0.0.1)")
    devices = read_cluster(cluster) if cluster else local_cluster(nodes or 1, target=target)
    training = _training(loss, batch, lr, momentum, weight_decay, bn, dropout, seed, plan, halo)
    _compile(model, devices, training, out, dump=dump, stop_after=stop_after, verbose=verbose)
    console.print(devices_table(read_plan(out)))
    _say(f"Wrote {out}: plan.json and a folder per device, nodes/{{{','.join(node.name for node in devices.nodes)}}}")
    _say(f"Next: fusetile explain {out} shows the plan. Copy each folder to its device and start there:")
    _say("  fusetile-runtime NAME --data DATA")


@app.command("train")
def train_command(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="A .npz or a folder of .npy: inputs under the model's input names (or x), targets under y "
            "(or y0, y1, ...).",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder to write; trained.onnx will be in it.", metavar="OUT")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Node processes to start on this machine.")] = 1,
    loss: LossOption = Loss.cross_entropy,
    batch: BatchOption = None,
    optimizer: OptimizerOption = Optimizer.sgd,
    lr: RateOption = 0.01,
    momentum: MomentumOption = 0.9,
    weight_decay: DecayOption = 0.0,
    bn: BnOption = Bn.train,
    dropout: DropoutOption = None,
    seed: SeedOption = 0,
    plan: PlanOption = "auto",
    halo: HaloOption = HaloChoice.auto,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Stop after this many steps.", rich_help_panel="Run")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Passes over the data. Default: 1.", rich_help_panel="Run")
    ] = None,
    no_shuffle: Annotated[
        bool, typer.Option("--no-shuffle", help="Take the samples in order.", rich_help_panel="Run")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            help="Threads per node. Default: this machine's cores shared among the nodes.",
            rich_help_panel="Run",
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option("--log", help="Write one JSON object per step.", metavar="FILE.jsonl", rich_help_panel="Run"),
    ] = None,
    save_gradients: Annotated[
        Path | None,
        typer.Option(
            "--save-gradients", help="Write the last step's gradients.", metavar="FILE.npz", rich_help_panel="Run"
        ),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Compile for this machine, train on N local node processes, and write OUT/trained.onnx."""
    if steps is not None and epochs is not None:
        raise UserError("give --steps or --epochs, not both")
    training = _training(loss, batch, lr, momentum, weight_decay, bn, dropout, seed, plan, halo)
    devices = local_cluster(nodes, ports=free_ports(nodes))
    options = RunOptions(data, steps, epochs, no_shuffle, threads, log, save_gradients)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the node processes must end, and the folder must go
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    with tempfile.TemporaryDirectory(prefix="fusetile-") as folder:
        build = _compile(model, devices, training, Path(folder) / "build", verbose=verbose)
        train_locally(build, devices, options, out)
    _say(f"Trained model: {out / 'trained.onnx'} (passes onnx.checker)")


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="A finished run: the lowest-ranked node's folder, or its run folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write.", metavar="trained.onnx")],
) -> None:
    """Put the weights of a finished run into the model that was compiled: the same nodes and names, new weights."""
    export_run(run, out)
    _say(f"Wrote {out} (passes onnx.checker)")


@app.command("explain")
def explain_command(
    build: Annotated[Path, typer.Argument(help="What `fusetile compile` wrote.", metavar="BUILD")],
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead.")] = False,
) -> None:
    """Show a plan: groups of layers, who computes which box, bytes on the wire, time and memory per device."""
    explain_build(build, console, as_json=as_json)


console = Console()


def _training(
    loss: Loss,
    batch: int | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    bn: Bn,
    dropout: float | None,
    seed: int,
    plan: str,
    halo: HaloChoice,
) -> Training:
    for name, value, low in (("--lr", lr, 0.0), ("--momentum", momentum, 0.0), ("--weight-decay", weight_decay, 0.0)):
        if not low <= value < float("inf"):
            raise UserError(f"{name} {value}: must be a number of at least {low:g}")
    return Training(
        loss=loss.value,
        batch=batch,
        learning_rate=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        bn=bn.value,
        dropout=dropout,
        seed=seed,
        plan=plan,
        halo=halo.value,
    )


def _compile(
    model: Path,
    devices: Cluster,
    training: Training,
    build: Path,
    *,
    dump: Path | None = None,
    stop_after: str | None = None,
    verbose: bool = False,
) -> Path:
    if stop_after and stop_after not in PASSES:
        raise UserError(f"--stop-after {stop_after!r}: choose one of {', '.join(PASSES)}")
    with CompileProgress(console, f"Compiling {model.name} for {len(devices.nodes)} node(s)") as progress:
        trace = Trace(progress.stage, progress.advance, dump, stop_after or "")
        try:
            compile_model(model, cluster=devices, training=training, build=build, trace=trace)
        finally:
            if verbose:
                progress.times(trace.seconds)
    return build


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors end with one message and the exit status of their class."""
    try:
        status = app(args=arguments, standalone_mode=False)
        if status:  # commands return nothing: typer has caught a Ctrl-C
            _fail("stopped by Ctrl-C", status)
    except Stopped as stopped:
        console.print(f"Stopped after {stopped}.")
    except FusetileError as error:
        _fail(str(error), error.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped by Ctrl-C", 130)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", UserError.exit_status)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        _usage(error)


def _say(line: str) -> None:
    """Print a line that may hold paths: never wrapped, never read as markup."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _usage(error: Any) -> None:
    """A mistake in the command line, as click reports it."""
    if hasattr(error, "show"):
        error.show()
    sys.exit(error.exit_code)


def _fail(message: str, status: int) -> None:
    print(f"fusetile: error: {message}", file=sys.stderr)
    sys.exit(status)
