"""The other side of benchmarks.step: one framework, one network, in a process of its own.

    python -m benchmarks.peers eager|channels_last|compile|onnxruntime FOLDER LOSS THREADS

FOLDER holds model.onnx and data.npz. For every line with a number on standard input it does that many training steps
and answers with their seconds; to `peak` with the peak of its resident memory in MB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 3
Step = Callable[[], object]


def main() -> None:
    """Get ready, then answer until the input ends."""
    kind, folder, loss, threads = sys.argv[1:]
    data = np.load(Path(folder) / "data.npz")
    make = onnxruntime_step if kind == "onnxruntime" else torch_step
    step = make(Path(folder) / "model.onnx", data["x"], data["y"], loss=loss, threads=int(threads), kind=kind)
    for _ in range(WARM_UP):
        step()
    for line in sys.stdin:
        answer = peak_MB() if line.strip() == "peak" else [timed(step) for _ in range(int(line))]
        print(json.dumps(answer), flush=True)


def timed(step: Step) -> float:
    """Seconds."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_MB() -> float:
    """Of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def torch_step(model: Path, x: np.ndarray, y: np.ndarray, *, loss: str, threads: int, kind: str) -> Step:
    """A step of the ONNX model's network, its nodes done by PyTorch's functions."""
    import torch

    torch.set_num_threads(threads)
    network: Any = torch_network(model)
    x_NCHW, target = torch.from_numpy(x), torch.from_numpy(y)
    if kind == "channels_last":
        network = network.to(memory_format=torch.channels_last)
        x_NCHW = x_NCHW.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    forward = torch.compile(network) if kind == "compile" else network
    measure = torch.nn.functional.mse_loss if loss == "mse" else torch.nn.functional.cross_entropy

    def step() -> None:
        optimizer.zero_grad()
        measure(forward(x_NCHW), target).backward()
        optimizer.step()

    return step


def torch_network(model: Path) -> Any:
    """A module with the nodes of an ONNX file."""
    import onnx
    import torch
    from onnx import helper, numpy_helper

    graph = onnx.load(model).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    numbers = {name for n in graph.node if n.op_type in ("Clip", "Dropout", "Resize") for name in n.input[1:] if name}
    running = {name for n in graph.node if n.op_type == "BatchNormalization" for name in n.input[3:]}
    readers = [name for node in graph.node for name in node.input]
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.names = {name: name.replace(".", "_") for name in sorted(arrays.keys() - numbers)}
            for name, attribute in self.names.items():
                value = torch.from_numpy(arrays[name].copy())
                if name in running:
                    self.register_buffer(attribute, value)
                else:
                    self.register_parameter(attribute, torch.nn.Parameter(value))
            self.steps = [self._step(i, node) for i, node in enumerate(graph.node)]

        def _step(self, index: int, node: Any) -> tuple[Any, list[str], list[str], str, list[str]]:
            """Function, inputs, weights, output, and the names that nothing reads afterwards."""
            attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            constants = [arrays[name] for name in node.input if name in numbers]
            alone = readers.count(node.input[0]) == 1 and node.input[0] != graph.input[0].name
            inputs = [name for name in node.input if name and name not in numbers]
            maps = [name for name in inputs if name not in arrays]
            weights = [self.names[name] for name in inputs if name in arrays]
            function = torch_function(node.op_type, attrs, constants, inplace=alone)
            return function, maps, weights, node.output[0], [name for name in maps if last[name] == index]

        def forward(self, x: Any) -> Any:
            values = {graph.input[0].name: x}
            for function, maps, weights, output, dead in self.steps:
                values[output] = function(*(values[m] for m in maps), *(getattr(self, w) for w in weights))
                for name in dead:
                    del values[name]
            return values[graph.output[0].name]

    return Network()


def torch_function(kind: str, attrs: dict[str, Any], constants: list[np.ndarray], *, inplace: bool) -> Any:
    """What PyTorch has for an ONNX node, of its maps and then its weights."""
    import torch
    from torch.nn import functional as f

    strides, pads = attrs.get("strides"), attrs.get("pads", [0, 0])[:2]
    match kind:
        case "Conv":
            return lambda x, w, b=None: f.conv2d(x, w, b, strides, pads, attrs["dilations"], attrs["group"])
        case "ConvTranspose":
            return lambda x, w, b: f.conv_transpose2d(x, w, b, strides)
        case "Gemm":
            return f.linear
        case "BatchNormalization":
            new, epsilon = 1 - attrs["momentum"], attrs["epsilon"]
            return lambda x, w, b, mean, var: f.batch_norm(x, mean, var, w, b, True, new, epsilon)
        case "Relu":
            return lambda x: f.relu(x, inplace)
        case "LeakyRelu":
            return lambda x: f.leaky_relu(x, attrs["alpha"], inplace)
        case "Clip":
            low, high = (value.item() for value in constants)
            return lambda x: f.hardtanh(x, low, high, inplace)
        case "Dropout":
            return lambda x: f.dropout(x, constants[0].item(), True)
        case "MaxPool":
            return lambda x: f.max_pool2d(x, attrs["kernel_shape"], strides, pads)
        case "AveragePool":
            return lambda x: f.avg_pool2d(x, attrs["kernel_shape"], strides, pads)
        case "GlobalAveragePool":
            return lambda x: f.adaptive_avg_pool2d(x, 1)
        case "Resize":
            return lambda x: f.interpolate(x, scale_factor=constants[0][2:].tolist())
        case "Add":
            return torch.add
        case "Concat":
            return lambda *parts: torch.cat(parts, attrs["axis"])
        case "Flatten":
            return lambda x: x.flatten(1)
    raise SystemExit(f"it is not known here which function of PyTorch is ONNX's {kind}")


# -- ONNX Runtime ------------------------------------------------------------------------------------------------------


def onnxruntime_step(model: Path, x: np.ndarray, y: np.ndarray, *, loss: str, threads: int, kind: str) -> Step:
    """A step of ONNX Runtime's on-device training. The training graph is made in a process of its own."""
    from onnxruntime import SessionOptions
    from onnxruntime.training import api

    folder = model.parent / "onnxruntime"
    make = f"from benchmarks.peers import write_artifacts; write_artifacts({str(model)!r}, {str(folder)!r}, {loss!r})"
    made = subprocess.run([sys.executable, "-c", make], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"ONNX Runtime: {(made.stderr.strip().splitlines() or [''])[-1]}")
    options = SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    state = api.CheckpointState.load_checkpoint(str(folder / "checkpoint"))
    module = api.Module(str(folder / "training_model.onnx"), state, session_options=options)
    optimizer = api.Optimizer(str(folder / "optimizer_model.onnx"), module)
    module.train()

    def step() -> None:
        module(x, y)
        optimizer.step()
        module.lazy_reset_grad()

    return step


def write_artifacts(model: str, folder: str, loss: str) -> None:
    """The training graph of a model whose BatchNorms are switched to training."""
    import onnx
    from onnxruntime.training import artifacts

    proto = onnx.load(model)
    constant = {name for n in proto.graph.node if n.op_type in ("Clip", "Dropout", "Resize") for name in n.input[1:]}
    for node in proto.graph.node:
        if node.op_type == "BatchNormalization":
            constant |= set(node.input[3:])
            node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
            node.output.extend(f"{name}.next" for name in node.input[3:])
        if node.op_type == "Dropout":
            node.input.append("training")
            node.output.append(f"{node.output[0]}.mask")
    if any(node.op_type == "Dropout" for node in proto.graph.node):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "training"))
    names = [tensor.name for tensor in proto.graph.initializer if tensor.name not in {*constant, "training"}]
    kinds = artifacts.LossType
    Path(folder).mkdir(exist_ok=True)
    artifacts.generate_artifacts(
        proto,
        requires_grad=names,
        frozen_params=[],
        loss=kinds.MSELoss if loss == "mse" else kinds.CrossEntropyLoss,
        optimizer=artifacts.OptimType.SGD,
        artifact_directory=folder,
    )


if __name__ == "__main__":
    main()
