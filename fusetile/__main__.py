"""The command `fusetile`, also `python -m fusetile`: says what is missing where only the runtime is installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from fusetile.cli import main as command_line
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fusetile"):
            raise
        print(
            f"fusetile: error: the compiler needs the package {error.name}: pip install 'fusetile[compiler]'. "
            "A device that only trains needs none of it: fusetile-runtime",
            file=sys.stderr,
        )
        sys.exit(2)
    command_line()


if __name__ == "__main__":
    main()
