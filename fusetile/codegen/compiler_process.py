"""A process that compiles kernels: it reads jobs from standard input, one JSON object per line, and answers each with a
line."""

from __future__ import annotations

import gc
import sys
from typing import Any

NOT_INSTALLED: Any = None


def main() -> None:
    """Answer the jobs on standard input. Collecting garbage costs more time here than it saves memory: what a kernel
    leaves behind is little, and the process ends with the last one."""
    gc.disable()
    sys.modules["torch"] = NOT_INSTALLED  # TVM imports it where it is installed, for seconds and for nothing
    from fusetile.codegen.tvm_pipeline import answer

    for line in sys.stdin:
        print(answer(line), flush=True)


if __name__ == "__main__":
    main()
