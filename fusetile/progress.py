"""What the compiler shows while it works."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class CompileProgress:
    """A line with the current pass, a bar while plans are played and kernels compiled."""

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.title = title
        self.passed: list[str] = []
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self) -> CompileProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        elapsed = self.bar.tasks[0].elapsed or 0.0
        self.bar.stop()
        if kind is None:
            self.console.print(f"{self.title}: {elapsed:.1f} s")
            self.console.print(f"  {' > '.join(self.passed)}", style="dim", highlight=False)

    def stage(self, name: str) -> None:
        """A pass begins."""
        self.passed.append(name)
        self.bar.update(self.task, description=f"{self.title}: {name}", completed=0, total=None)

    def advance(self, done: int, total: int) -> None:
        """How far a pass is: plans that were played, kernels that are compiled."""
        self.bar.update(self.task, completed=done, total=total)

    def times(self, seconds: dict[str, float]) -> None:
        """A table of the passes' times."""
        table = Table("pass", "seconds", title="Compile time")
        for name, value in seconds.items():
            table.add_row(name, f"{value:.3f}")
        self.console.print(table)
