"""The innermost loops of a profile that multiply: their share of a kernel, and how they use registers and loads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.emulated.emulator import Instruction, Profile

MULTIPLY = re.compile(r"(fmla|fmls|vmla\.f32|vfma\.f32) [vq]\d+")
LOAD = re.compile(r"(ld[rp]|ldur|ld1r?|vld1\S*|vldr|vldm\S*) ")
STACK = re.compile(r"\[(sp)\b")
BRANCH = re.compile(r"(?:b\.?\w*|cbn?z|tbn?z) (?:.*, )?#0x([0-9a-f]+)$")
VECTOR = re.compile(r"\b[vqds](\d+)\b")


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop: the function that it is in, its instructions, and the vector multiply-adds among them."""

    function: str
    instructions: tuple[Instruction, ...]
    multiplies: int

    @property
    def executed(self) -> int:
        return sum(instruction.count for instruction in self.instructions)

    @property
    def executed_multiplies(self) -> int:
        return sum(i.count for i in self.instructions if MULTIPLY.match(i.text))

    @property
    def stack(self) -> list[str]:
        """Instructions that touch the stack."""
        return [i.text for i in self.instructions if STACK.search(i.text)]

    def load_distances(self) -> list[int]:
        """Per vector register that is loaded, after how many instructions (1: the next) the first one reads it."""
        body, found = [i.text for i in self.instructions], []
        for at, text in enumerate(body):
            if not LOAD.match(text):
                continue
            for register in VECTOR.findall(text.split("[")[0]):
                later = (*range(at + 1, len(body)), *range(at + 1))
                uses = (n for n, j in enumerate(later, 1) if register in VECTOR.findall(body[j]))
                found.append(next(uses))
        return found


def multiplies(profile: Profile) -> int:
    """Executed vector multiply-adds."""
    every = (i for part in profile.functions.values() for i in part)
    return sum(i.count for i in every if MULTIPLY.match(i.text))


def hot_loops(profile: Profile, share: float) -> list[Loop]:
    """The innermost loops that execute at least this share of all multiply-adds, the hottest first."""
    total = multiplies(profile)
    loops = [loop for name, part in profile.functions.items() for loop in _innermost(name, part)]
    hot = [loop for loop in loops if loop.executed_multiplies >= share * total > 0]
    return sorted(hot, key=lambda loop: -loop.executed_multiplies)


def typical_distance(loops: Sequence[Loop]) -> tuple[int, float]:
    """The least and the median distance from a load to its first use, over loops."""
    distances = [distance for loop in loops for distance in loop.load_distances()]
    return (min(distances), median(distances)) if distances else (0, 0.0)


def _innermost(name: str, part: Sequence[Instruction]) -> list[Loop]:
    """Loops, from the target of a branch backwards to the branch, that hold no other one."""
    first = part[0].address
    spans = []
    for i in part:
        if (target := BRANCH.match(i.text)) and first <= int(target[1], 16) <= i.address:
            spans.append((int(target[1], 16), i.address))
    found = []
    for low, high in spans:
        if any((a, b) != (low, high) and low <= a and b <= high for a, b in spans):
            continue
        body = tuple(i for i in part if low <= i.address <= high)
        if count := sum(bool(MULTIPLY.match(i.text)) for i in body):
            found.append(Loop(name, body, count))
    return found
