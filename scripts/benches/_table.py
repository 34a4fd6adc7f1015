"""Measurements, and tables of them: ratios first."""

import statistics
from dataclasses import dataclass, field


@dataclass
class Result:
    """One row: for each way the seconds of its runs, and of CPU that the process behind it took in each."""

    name: str
    against: str
    """The way with which the others are compared."""
    target: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def note(self, way: str, seconds: float, cpu: float) -> None:
        self.seconds.setdefault(way, []).append(seconds)
        self.cpu.setdefault(way, []).append(cpu)

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def times_as_fast(self, way: str) -> float | None:
        """As the way that it is measured against; None for that way, and where it was not measured."""
        if way == self.against or self.against not in self.seconds or way not in self.seconds:
            return None
        return self.median(self.against) / self.median(way)

    def as_json(self) -> dict[str, object]:
        ways = {
            way: {
                "seconds": self.median(way),
                "cpu": statistics.median(self.cpu[way]),
                "runs": runs,
                "ratio": self.times_as_fast(way),
            }
            for way, runs in self.seconds.items()
        }
        return {"row": self.name, "against": self.against, "target": self.target, "ways": ways}


def text(results: list[Result], ways: list[str]) -> str:
    """Two tables in Markdown: how many times as fast as the way compared with, then seconds and CPU
    seconds."""
    head = ["row", "against", "at least", *ways]
    ratios = [
        [one.name, one.against, one.target, *(_number(one.times_as_fast(way), "x") for way in ways)]
        for one in results
    ]
    plain = [[one.name, *(_seconds(one, way) for way in ways)] for one in results]
    return (
        f"{markdown(head, ratios)}\n\nseconds (CPU seconds of the process that "
        f"answers)\n\n{markdown(['row', *ways], plain)}"
    )


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def _seconds(one: Result, way: str) -> str:
    if way not in one.seconds:
        return ""
    cpu = statistics.median(one.cpu[way])
    return f"{one.median(way):.4g}" + (f" ({cpu:.2f})" if cpu else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
