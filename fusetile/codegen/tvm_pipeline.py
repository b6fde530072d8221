"""TVMScript -> object file with plain C functions: no packed calling convention, no symbols of TVM's runtime.

TVM's own lowering ends in MakePackedAPI, whose functions need the runtime library. Here a short pass takes its place
that turns buffer parameters into raw pointers. Machine code is then made by TVM's LLVM or by zig's.
"""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx import compilation_pipeline
from tvm.tirx.buffer import is_buffer_var

from fusetile.codegen.script import function_of
from fusetile.codegen.zig import zig_cc

PIPELINE = "fusetile"


def _plain_function(function: Any, module: Any, context: Any) -> Any:
    parameters, declarations = [], []
    for parameter in function.params:
        if is_buffer_var(parameter):
            data = tirx.Var(f"{parameter.name}_data", tvm.ir.PointerType(tvm.ir.PrimType(parameter.dtype)))
            parameters.append(data)
            declarations.append(tirx.DeclBuffer(parameter, data=data))
        else:
            parameters.append(parameter)
    body = tirx.SeqStmt([*declarations, function.body]) if declarations else function.body
    return tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)


def _pipeline() -> Any:
    """TVM's s_tir pipeline, with plain functions at its end."""
    _, _, finalize_device = compilation_pipeline.PIPELINE_MAP["s_tir"]()
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.prim_func_pass(_plain_function, opt_level=0, name="fusetile.PlainFunction"),
    ]

    def lower(module: Any, context: Any) -> Any:
        return tvm.ir.transform.Sequential(passes)(module)

    host_passes = [tirx.transform.LowerIntrin()]
    lowering = tvm.transform.module_pass(lower, opt_level=0)
    return lowering, lambda: tvm.ir.transform.Sequential(host_passes), finalize_device


compilation_pipeline.register_tir_pipeline(PIPELINE, _pipeline)


def build(source: str, target: dict[str, Any]) -> Any:
    """Compile the TVMScript function `kernel` in `source`; `inspect_source("ll" or "asm")` of the result shows it."""
    function = function_of(source)
    s_tir.analysis.verify_well_formed(tvm.IRModule.from_expr(function))
    tvm_target = tvm.target.Target(target)
    with tvm_target:
        return tirx.build(function, target=tvm_target, pipeline=PIPELINE)


def compile_object(source: str, target: dict[str, Any], zig: Sequence[str], path: Path) -> None:
    """Write the object file of a kernel, with zig's LLVM and its flags `zig` if there are any, else with TVM's; `path`
    appears complete or not at all."""
    module = build(source, target)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / "kernel.o"
        if zig:
            compile_ir(module.inspect_source("ll"), zig, made)
        else:
            module.write_to_file(str(made), "o")
        os.replace(made, path)


def assembly(source: str, target: dict[str, Any], zig: Sequence[str]) -> str:
    """The assembly of a kernel, made as its object is."""
    module = build(source, target)
    if not zig:
        return str(module.inspect_source("asm"))
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "kernel.s"
        compile_ir(module.inspect_source("ll"), [*zig, "-S", "-g0"], made)
        return made.read_text()


def compile_ir(ir: str, zig: Sequence[str], path: Path) -> None:
    """Compile LLVM IR, as TVM writes it, with zig: to an object or, with -S among the flags, to assembly."""
    text = path.with_suffix(".ll")
    text.write_text(ir)
    result = zig_cc("-c", "-O2", "-fPIC", *zig, "-o", str(path), str(text))
    if result.returncode:
        raise RuntimeError(result.stderr)


def answer(line: str) -> str:
    """Do a job {symbol, source, target, zig, path}; answers {symbol, error}. Both are one line of JSON."""
    job = json.loads(line)
    error = ""
    try:
        compile_object(job["source"], job["target"], job["zig"], Path(job["path"]))
    except Exception:  # whatever TVM raises is reported under the kernel's name
        error = traceback.format_exc(limit=-2)
    return json.dumps({"symbol": job["symbol"], "error": error})
