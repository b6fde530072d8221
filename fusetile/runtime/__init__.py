"""What runs on a device: no compiler, only the standard library and numpy."""

import os

# numpy's linear algebra is not used here, but would start as many threads as there are cores
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
