"""Write BUILD: plan.json, model.onnx, and one folder per device with its program, kernels and weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fusetile.box import slices
from fusetile.cluster import Cluster
from fusetile.codegen.assemble import Identity, assemble
from fusetile.codegen.build import build_library
from fusetile.codegen.calls import Kernel, KernelCall
from fusetile.codegen.draft import Draft
from fusetile.codegen.laid_out import LaidOut
from fusetile.codegen.targets import Target
from fusetile.errors import UserError
from fusetile.graph import Graph
from fusetile.onnx_import.files import self_contained
from fusetile.options import Training
from fusetile.picture import report_html
from fusetile.program import Program, to_json
from fusetile.report import Description, hash_of
from fusetile.runtime import safetensors
from fusetile.runtime.files import check_makeable


def write_bundle(
    build: Path,
    *,
    model: Path,
    laid: LaidOut,
    others: Mapping[str, LaidOut],
    description: Description,
    cluster: Cluster,
    training: Training,
    on_progress: Callable[[int, int], None],
) -> None:
    """`laid` is the training step, `others` are the further routines. Raises UserError if it can't be written."""
    check_replaceable(build)
    content = self_contained(model)
    identity = Identity(
        plan_hash=hash_of(description, content),
        model_hash=hashlib.sha256(content).hexdigest(),
        batch=laid.graph.tensors[laid.graph.inputs[0]].shape[0],
        seed=training.seed,
        rates=training.rates,
        accumulate=training.accumulate,
    )
    with _replaced(build) as folder, tempfile.TemporaryDirectory(dir=folder) as made:
        drafts = [[each.drafts[rank] for each in (laid, *others.values())] for rank in range(laid.plan.nodes)]
        libraries = _libraries(drafts, laid.targets, Path(made), on_progress)
        for rank, node in enumerate(cluster.nodes):
            place, library = folder / "nodes" / node.name, libraries[laid.targets[rank].name]
            place.mkdir(parents=True)
            shutil.copy(library, place)
            program = assemble(
                laid,
                cluster=cluster,
                rank=rank,
                library=library.name,
                identity=identity,
                seconds=description["nodes"][rank]["compute_seconds"],
                others=others,
            )
            (place / "program.json").write_text(to_json(program))
            _write_weights(place / "weights.safetensors", laid.graph, program)
        for place in (folder, folder / "nodes" / cluster.nodes[0].name):
            (place / "model.onnx").write_bytes(content)
        (folder / "plan.json").write_text(json.dumps({"plan_hash": identity.plan_hash, **description}, indent=1) + "\n")
        (folder / "report.html").write_text(report_html(description))


@contextmanager
def _replaced(build: Path) -> Iterator[Path]:
    """A folder that takes the place of `build` once all is written, or goes."""
    build.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{build.name}.", dir=build.parent))
    try:
        yield aside
        aside.chmod(0o755)
        if build.exists():
            shutil.rmtree(build)
        aside.rename(build)
    except OSError as error:
        raise UserError(f"can't write {build}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_replaceable(build: Path) -> None:
    """Only a build may be overwritten: raises UserError where something else is in the way, or no folder can be."""
    if build.exists() and not (build / "plan.json").is_file() and (not build.is_dir() or any(build.iterdir())):
        raise UserError(f"{build} exists and is not a build of fusetile; choose another -o, or remove it")
    check_makeable(build)


def _libraries(
    drafts: Sequence[Sequence[Draft]], targets: Sequence[Target], folder: Path, on_progress: Callable[[int, int], None]
) -> dict[str, Path]:
    """One kernel library per kind of device in `folder`, for the drafts of all its routines."""
    kernels: dict[str, dict[str, Kernel]] = {}
    for routines, target in zip(drafts, targets, strict=True):
        found = kernels.setdefault(target.name, {})
        calls = [step for draft in routines for step in draft.steps if isinstance(step, KernelCall)]
        found.update({call.kernel.symbol: call.kernel for call in calls})
    by_name = {target.name: target for target in targets}
    total = sum(map(len, kernels.values()))
    before, libraries = 0, {}
    for name, found in kernels.items():
        place, start = folder / name, before
        place.mkdir()

        def progress(done: int, _: int, start: int = start) -> None:
            on_progress(start + done, total)

        libraries[name] = build_library(found.values(), by_name[name], place, progress=progress)
        before += len(found)
    return libraries


def _write_weights(path: Path, graph: Graph, program: Program) -> None:
    shards = {shard.parameter: graph.parameters[shard.parameter].value[slices(shard.box)] for shard in program.shards}
    boxes = {shard.parameter: shard.box for shard in program.shards}
    safetensors.save(path, shards, {"boxes": json.dumps(boxes)})
