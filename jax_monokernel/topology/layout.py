"""Draws a topology's groups as boxes in boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jax_monokernel.topology.model import Group, Topology

# One for each memory domain; told apart by people who see colours differently too (Okabe and Ito's palette).
DOMAIN_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#999999")
INK, LINE, PAPER = "#222222", "#8a8a8a", "#f4f4f2"


class Layout:
    """Boxes in boxes. One unit is a square of size 1; y goes down."""

    def __init__(self, axes: Any, topology: Topology, look: Callable[[int], tuple[Any, str]]) -> None:
        self.axes, self.topology, self.look = axes, topology, look
        self.width, self.height = 0.0, 0.0
        most = max((len(g.units) for _, g in topology.root.walk()), default=1)
        self.columns = max(1, math.ceil(math.sqrt(most * 1.4)))

    def draw(self) -> None:
        """Draws all of it, and sets the limits of the axes."""
        self.width, self.height = self._box(self.topology.root, 0.0, 0.0)
        self.axes.set_xlim(-0.6, self.width + 0.6)
        self.axes.set_ylim(self.height + 0.6, -0.6)

    def scale(self) -> float:
        """Inches of a unit's square."""
        return min(0.42, 15 / self.width, 15 / self.height)

    def inches(self) -> tuple[float, float]:
        """A good size for the figure."""
        return max(self.width * self.scale(), 5.5), max(self.height * self.scale(), 2.5) + 1.2

    def _size(self, group: Group) -> tuple[float, float]:
        """Width and height of a group's box."""
        if not group.children:
            columns = min(self.columns, max(1, len(group.units)))
            width = max(columns, 0.28 * len(_label(group)) + 0.3)
            return width + 0.8, math.ceil(len(group.units) / columns) + 1.5
        sizes = [self._size(child) for child in group.children]
        rows = self._rows(group)
        width = max(sum(sizes[i][0] for i in row) + 0.6 * (len(row) - 1) for row in rows)
        height = sum(max(sizes[i][1] for i in row) for row in rows) + 0.6 * (len(rows) - 1)
        memory = self._memory_width(group)
        return width + 1.0 + memory, height + 1.7

    def _rows(self, group: Group) -> list[list[int]]:
        """Which children stand beside each other."""
        count = len(group.children)
        columns = max(1, round(math.sqrt(count))) if count > 3 else count
        if group.children[0].children and count == 2:
            columns = 2
        if not group.children[0].children:
            columns = 1 if count <= 2 and len(group.children[0].units) > 24 else max(columns, math.ceil(count / 3))
            if all(len(c.units) <= 4 for c in group.children):
                columns = min(count, max(4, math.ceil(math.sqrt(count * 1.6))))
        return [list(range(i, min(i + columns, count))) for i in range(0, count, columns)]

    def _memory_width(self, group: Group) -> float:
        if group is self.topology.root and len(self.topology.domains) == 1 and self.topology.domains[0].stacks:
            return 4.4
        return 4.4 if group.near and len(self.topology.domains) > 1 and self._owner(group) else 0.0

    def _owner(self, group: Group) -> bool:
        """Whether the memory that is near a group is drawn in its box: it is, in the outermost box that names it."""
        return next(g for _, g in self.topology.root.walk() if g.near == group.near) is group

    def _box(self, group: Group, x: float, y: float) -> tuple[float, float]:
        width, height = self._size(group)
        if not group.children:
            self._units(group, x, y, width, height)
            return width, height
        is_root = group is self.topology.root
        self._rectangle(x, y, width, height, "#ffffff" if is_root else PAPER, LINE if is_root else "#b0b0a8")
        self.axes.text(x + 0.5, y + 0.62, _label(group), va="center", fontsize=9 if is_root else 8, color=INK)
        at = y + 1.2
        for row in self._rows(group):
            left, tallest = x + 0.5, 0.0
            for i in row:
                child_width, child_height = self._box(group.children[i], left, at)
                left += child_width + 0.6
                tallest = max(tallest, child_height)
            at += tallest + 0.6
        if self._memory_width(group):
            domains = group.near or (0,)
            each = (height - 1.7) / len(domains)
            for i, d in enumerate(domains):
                self._memory(d, x + width - 4.4, y + 1.2 + i * each, each)
        return width, height

    def _units(self, group: Group, x: float, y: float, width: float, height: float) -> None:
        self._rectangle(x, y, width, height, "#ffffff", LINE)
        self.axes.text(x + 0.4, y + 0.55, _label(group), va="center", fontsize=7.5, color=INK)
        columns = min(self.columns, max(1, len(group.units)))
        for i, unit in enumerate(group.units):
            colour, text = self.look(unit)
            left, top = x + 0.4 + i % columns, y + 1.0 + i // columns
            self._rectangle(left + 0.05, top + 0.05, 0.9, 0.9, colour, "none")
            self.axes.text(left + 0.5, top + 0.52, text, ha="center", va="center", fontsize=5.5, color=INK)

    def _memory(self, domain: int, x: float, y: float, height: float) -> None:
        d = self.topology.domains[domain]
        colour = DOMAIN_COLOURS[domain % 8]
        stacks = max(1, d.stacks)
        each = height / stacks
        for i in range(stacks):
            top = y + i * each + 0.1
            for layer in range(4):  # a stack, seen from above and a little from the side
                off = 0.12 * (3 - layer)
                self._rectangle(x + 0.2 + off, top + off, 3.2, each - 0.7, colour, "#ffffff")
        size = f"\n{d.bytes / (1 << 30):.0f} GiB" if d.bytes else ""
        words = d.name.replace("'s ", "'s\n")
        middle = y + 0.1 + (each - 0.7) / 2  # of the first stack
        self.axes.text(x + 1.8, middle, f"{words}{size}", ha="center", va="center", fontsize=6.5, color=INK)

    def _rectangle(self, x: float, y: float, width: float, height: float, face: Any, edge: str) -> None:
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=edge, linewidth=0.8))


def _label(group: Group) -> str:
    count = len(group.all_units())
    return group.name if group.kind in ("core",) else f"{group.name} · {count}"
