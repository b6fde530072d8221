"""The command `fusetile`: compile, train, export, explain, simulate, profile."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fusetile import api
from fusetile.cluster import Cluster, local_cluster, read_cluster
from fusetile.command_line import spread
from fusetile.errors import FusetileError, UserError
from fusetile.explain import devices_table, explain_build, read_plan, recomputed_text
from fusetile.local import REPORT, export_run, free_ports
from fusetile.options import Training
from fusetile.pipeline import PASSES
from fusetile.progress import CompileProgress
from fusetile.run_options import RunOptions
from fusetile.trace import Stopped, Trace

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train convolutional networks on a handful of small computers, with no server.",
    epilog="Example: fusetile train model.onnx --data digits.npz --nodes 4 --batch 32 --epochs 5 -o out",
)


Model = Annotated[
    Path, typer.Argument(help="The network: an ONNX file, as exported by PyTorch and others.", metavar="MODEL.onnx")
]
DataOption = Annotated[
    Path,
    typer.Option(
        "--data",
        help="An .npz or a folder of .npy: inputs under the model's input names (or x), targets under y (or y0, ...). "
        "Or a folder of images: a folder per class, or images and labels (YOLO's boxes), images and masks (classes per "
        "pixel), input and target. Or the data.yaml of a YOLO dataset.",
    ),
]
ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", help="The devices: a cluster.toml (see README).", metavar="FILE")
]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Instead of --cluster: that many equal devices at 127.0.0.1.")
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        help="With --nodes: what they are: host, pi3, pi3b+, pi4, pi5, zero2w, or pi3-32 etc. for 32-bit systems.",
        metavar="CPU",
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
@spread
def compile_command(
    model: Model,
    training: Training,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", metavar="BUILD")],
    cluster: ClusterOption = None,
    nodes: NodesOption = None,
    target: TargetOption = "host",
    dump: DumpOption = None,
    stop_after: StopOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Compile a model for a cluster: one folder per device, to be copied there.

    Then, on each device:  fusetile-runtime BUILD/nodes/NAME --data DATA
    """
    devices = _devices(cluster, nodes, target)
    title = f"Compiling {model.name} for {len(devices.nodes)} node(s)"
    with _watched(title, dump=dump, stop_after=stop_after, verbose=verbose) as trace:
        api.compile(model, out=out, cluster=devices, training=training, trace=trace)
    plan = read_plan(out)
    console.print(devices_table(plan))
    _say(recomputed_text(plan))
    _say(f"Wrote {out}: plan.json and a folder per device, nodes/{{{','.join(node.name for node in devices.nodes)}}}")
    _say(f"Next: fusetile explain {out} shows the plan. Copy each folder to its device and start there:")
    given = "--data DATA --val DATA" if training.validation else "--data DATA"
    source = devices.with_source(training.source).source
    if source is None:
        _say(f"  fusetile-runtime NAME {given}")
    else:
        _say(f"  fusetile-runtime {devices.nodes[source].name} {given}")
        if len(devices.nodes) > 1:
            _say("  fusetile-runtime NAME, on the others")


@app.command("train")
@spread
def train_command(
    model: Model,
    data: DataOption,
    training: Training,
    run: RunOptions,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder to write; trained.onnx will be in it.", metavar="OUT")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Node processes to start on this machine.")] = 1,
    verbose: VerboseOption = False,
) -> None:
    """Compile for this machine, train on N local node processes, and write OUT/trained.onnx."""
    title = f"Compiling {model.name} for {nodes} node(s)"
    api.train(
        model,
        data,
        out=out,
        nodes=nodes,
        training=training,
        run=run,
        quiet=False,
        watch=lambda: _watched(title, verbose=verbose),
    )
    _say(f"Trained model: {out / 'trained.onnx'} (passes onnx.checker); losses and plan in pictures: {out / REPORT}")


@app.command("export")
def export_command(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run (the lowest-ranked node's folder, or OUT), a folder of checkpoints, or a file in it.",
            metavar="RUN",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write.", metavar="trained.onnx")],
) -> None:
    """Put the weights of a run or checkpoint into the model that was compiled: the same nodes and names."""
    export_run(run, out)
    _say(f"Wrote {out} (passes onnx.checker)")


@app.command("explain")
def explain_command(
    build: Annotated[Path, typer.Argument(help="What `fusetile compile` wrote.", metavar="BUILD")],
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead.")] = False,
) -> None:
    """Show a plan: its step time and critical path, what other plans would take, and who computes which box when."""
    explain_build(build, console, as_json=as_json)


@app.command("simulate")
@spread
def simulate_command(
    model: Model,
    training: Training,
    cluster: ClusterOption = None,
    nodes: NodesOption = None,
    target: TargetOption = "host",
    traced: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Compile the plan for this computer, run every device's program here, one after the other, and scale "
            "what each op takes to the device's profile.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the time of a step on a cluster that need not be there: no kernels are compiled, unless with --trace."""
    from fusetile.simulation import show, simulate_model

    devices = _devices(cluster, nodes, target)
    with _progress(f"Simulating {model.name} on {len(devices.nodes)} node(s)", quiet=as_json) as progress:
        trace = Trace(progress.stage, progress.advance)
        found = simulate_model(model, cluster=devices, training=training, traced=traced, trace=trace)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        show(found, console)


@app.command("profile")
def profile_command(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder to write: bundles, or with --here profiles.", metavar="OUT")
    ],
    cluster: ClusterOption = None,
    nodes: NodesOption = None,
    target: TargetOption = "host",
    here: Annotated[
        bool, typer.Option("--here", help="With --nodes: measure this computer, divided among so many node processes.")
    ] = False,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="With --here: how long to measure.")] = 10.0,
) -> None:
    """Measure devices for the planner: one bundle per device, to be copied and run there.

    On each device, all at the same time:  fusetile-runtime profile OUT/nodes/NAME
    Then name what it wrote in cluster.toml:  profile = "FILE.toml"
    """
    from fusetile.profiling import profile_here, write_probes

    if here and (nodes is None or target != "host"):
        raise UserError("--here measures this computer: give --nodes N, and neither --cluster nor --target")
    devices = local_cluster(nodes, ports=free_ports(nodes)) if here and nodes else _devices(cluster, nodes, target)
    with _progress(f"Profiling {len(devices.nodes)} node(s)") as progress:
        trace = Trace(progress.stage, progress.advance)
        if here:
            made = profile_here(devices, out, seconds=seconds, trace=trace)
        else:
            write_probes(devices, out, trace=trace)
    if here:
        _say(f'Wrote {", ".join(map(str, made))}: name them in cluster.toml, profile = "FILE.toml"')
    else:
        _say(f"Wrote {out}: a folder per device, nodes/{{{','.join(node.name for node in devices.nodes)}}}")
        _say("Copy each to its device and start there, at the same time:")
        _say("  fusetile-runtime profile NAME")
        _say('Then name what it wrote, NAME/profile.toml, in cluster.toml instead of a device: profile = "FILE.toml"')


console = Console()


def _devices(cluster: Path | None, nodes: int | None, target: str) -> Cluster:
    """What --cluster, or --nodes and --target say."""
    if (cluster is None) == (nodes is None):
        raise UserError("give either --cluster FILE (your devices) or --nodes N (that many at 127.0.0.1)")
    return read_cluster(cluster) if cluster else local_cluster(nodes or 1, target=target)


def _progress(title: str, *, quiet: bool = False) -> CompileProgress:
    return CompileProgress(Console(quiet=True) if quiet else console, title)


@contextmanager
def _watched(
    title: str, *, dump: Path | None = None, stop_after: str | None = None, verbose: bool = False
) -> Iterator[Trace]:
    """A compilation that is shown."""
    if stop_after and stop_after not in PASSES:
        raise UserError(f"--stop-after {stop_after!r}: choose one of {', '.join(PASSES)}")
    with _progress(title) as progress:
        trace = Trace(progress.stage, progress.advance, dump, stop_after or "", _say)
        try:
            yield trace
        finally:
            if verbose:
                progress.times(trace.seconds)


def joined(arguments: Sequence[str]) -> list[str]:
    """`--anchors 1,2 3,4` is one option with one value, also without quotes."""
    words: list[str] = []
    for word in arguments:
        if len(words) > 1 and words[-2] == "--anchors" and re.fullmatch(r"[\d.]+,[\d.]+", word):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors end with one message and the exit status of their class."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # processes must end, and what is half written must go
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    try:
        status = app(args=joined(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
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
