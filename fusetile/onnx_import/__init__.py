"""ONNX -> Graph: static shapes, one meaning per op whatever the opset, shape arithmetic folded.

    model.onnx                                   Graph
    Shape -> Gather -> Concat -> Reshape   ==>   Reshape(x; shape = (4, 512))
    BatchNormalization                     ==>   ChannelMoments, BatchStatistics, Normalize (+ RunningStatistics)
    Gemm (transB = 0, alpha = 0.5)         ==>   Scale, Gemm (weights [K, C], transposed once)
    Transpose, LayerNormalization, MatMul  ==>   normalization and a 1x1 convolution of the tensor as it is stored
    Identity, Dropout (ratio = 0)          ==>   nothing

Nothing that depends on a trainable initializer is folded: BatchNormalization stays, convolutions keep their weights.

    files.py      reading the file, and what may be wrong with it
    unshare.py    initializers that an exporter merged because their first values are equal
    origins.py    the names of weights by what an exporter notes at its nodes
    folding.py    what is constant, and its value
    contents.py   nodes, inputs and initializers as the rest sees them
    walk.py       the import from top to bottom: inputs and batch, the rule of each node, outputs
    importer.py   what rules use: operands, parameters, new ops
    views.py      what an ONNX tensor is of a tensor of the graph: reshapes and transposes move nothing by themselves
    rules/        one rule per ONNX op
"""

from fusetile.onnx_import.walk import import_onnx

__all__ = ["import_onnx"]
