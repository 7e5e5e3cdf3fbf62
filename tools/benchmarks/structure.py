"""Reports the structure of a checkout: statements and lines by folder, rooms and floors, upward imports, circles.

    python -m tools.benchmarks.structure
    python -m tools.benchmarks.structure --root=/path/to/a/checkout --out=structure.png

A room is a folder of `apr_jax`, or a module at its top; `experiments` and `tools` are one room each. A room is on a
floor, and may import from floors below. An arrow in the figure is an import. Modules are parsed, not executed.
Statements are those of the syntax tree.
"""

import ast
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags

from apr_jax.errors import UserError
from apr_jax.io.files import whole
from tools import command

FLOORS = (  # a room may import from lower floors, and from rooms of its own floor without circles
    ("errors", "checks", "settings", "interrupt", "devices", "compilation", "io", "text", "threads", "model"),
    ("tasks",),
    ("rollout", "data"),
    ("train",),
    ("evaluate", "export", "trained"),
    ("experiments", "tools"),
)
FOLDERS = ("apr_jax", "experiments", "tools", "benchmarks", "tests")


@dataclasses.dataclass(frozen=True)
class Module:
    """One Python file of a checkout."""

    name: str  # as in imports: "apr_jax.model.cache"
    path: Path  # relative to the checkout
    statements: int
    lines: int
    imports: frozenset[str]  # full names of modules, or of objects in modules

    @property
    def room(self) -> str:
        """The room that the module is in."""
        first, *rest = self.name.split(".")
        return rest[0] if first == "apr_jax" and rest else first


def read_modules(root: Path) -> list[Module]:
    """Return all modules in the `FOLDERS` of a checkout, sorted by path. Raises UserError if there are none."""
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    if not paths:
        raise UserError(f"{root} is not a checkout: it has no Python file in {', '.join(FOLDERS)}")
    return [read_module(root, path) for path in paths]


def read_module(root: Path, path: Path) -> Module:
    """Parse the Python file at `path` in the checkout `root`."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, path)
    parts = path.relative_to(root).with_suffix("").parts
    package = parts[:-1]  # a relative import begins here
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            before = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*before, *([node.module] if node.module else [])))
            imports.update(f"{source}.{alias.name}" for alias in node.names)
    name = ".".join(package if parts[-1] == "__init__" else parts)
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
    return Module(name, path.relative_to(root), statements, text.count("\n"), frozenset(imports))


def module_links(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Return, for each module name, the names of the given modules that it imports."""
    modules = list(modules)
    names = {module.name for module in modules}
    links = {}
    for module in modules:
        found = {name if name in names else name.rpartition(".")[0] for name in module.imports}
        links[module.name] = (found & names) - {module.name}
    return links


def room_links(modules: Iterable[Module]) -> Counter:
    """Count the modules of a room that import from another room: (room, other room) -> number of modules."""
    modules = list(modules)
    rooms = {module.name: module.room for module in modules}
    pairs = Counter()
    for name, others in module_links(modules).items():
        pairs.update({(rooms[name], rooms[other]) for other in others} - {(rooms[name], rooms[name])})
    return pairs


def floor_of(room: str) -> int:
    """Return the number of the floor, from 0, that a room is on in `FLOORS`. Raises UserError if it is on none."""
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor
    raise UserError(f"{room} has no floor: add it to FLOORS in tools/benchmarks/structure.py")


def upward(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the imports (room, other room) where the other room is on a higher floor."""
    return sorted((room, other) for room, other in pairs if floor_of(other) > floor_of(room))


def circles(links: dict[str, set[str]]) -> list[list[str]]:
    """Return the circles of a graph: groups of two or more nodes with paths between all of them.

    These are the strongly connected components by Tarjan's algorithm.
    """
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in sorted(links.get(node, ())):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(links):
        if node not in number:
            visit(node)
    return sorted(found)


def by_room(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """Return, for each room, the rooms that it imports."""
    links: dict[str, set[str]] = {}
    for room, other in pairs:
        links.setdefault(room, set()).add(other)
    return links


# ---------------------------------------------------------------------- report and figure


def table(modules: Sequence[Module]) -> str:
    """Return a table of files, statements and lines, for each folder and in total for each top folder."""
    rows: dict[str, list[int]] = {}
    for module in modules:
        first, *rest = module.path.parts[:-1]
        for name in {first, "/".join((first, *rest[:1]))}:
            row = rows.setdefault(name, [0, 0, 0])
            row[:] = row[0] + 1, row[1] + module.statements, row[2] + module.lines
    lines = [f"{'':<22}{'files':>7}{'statements':>12}{'lines':>8}"]
    for name, counts in sorted(rows.items()):
        title = f"  {name.partition('/')[2]}" if "/" in name else name
        lines.append(f"{title:<22}{counts[0]:>7}{counts[1]:>12}{counts[2]:>8}")
    return "\n".join(lines)


def report(modules: Sequence[Module]) -> str:
    """Return the table of folders, the floors, the upward imports and the circles of rooms as text."""
    source = [module for module in modules if module.name.partition(".")[0] != "tests"]
    pairs = room_links(source)
    rooms = {module.room for module in source} - {"apr_jax"}
    lines = [table(modules), ""]
    for floor, names in reversed(list(enumerate(FLOORS))):
        lines.append(f"floor {floor}: {', '.join(name for name in names if name in rooms)}")
    if unplaced := sorted(rooms - {name for names in FLOORS for name in names}):
        lines.append(f"on no floor: {', '.join(unplaced)}")
    placed = [pair for pair in pairs if not set(pair) & set(unplaced) and "apr_jax" not in pair]
    up, round_ = upward(placed), circles(by_room(pairs))
    lines.append(f"imports from a higher floor: {', '.join(f'{a} -> {b}' for a, b in up) or 'none'}")
    lines.append(f"circles of rooms: {'; '.join(' - '.join(group) for group in round_) or 'none'}")
    return "\n".join(lines)


def levels_of(pairs: Iterable[tuple[str, str]], rooms: Iterable[str]) -> dict[str, int]:
    """Return the floor of each room. A room without a floor is put on the highest floor that it imports from."""
    floors = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    levels = {room: floors.get(room, 0) for room in rooms}
    for _ in levels:  # repeated, since rooms without a floor may form chains; a chain has at most all rooms
        for room, other in pairs:
            if room not in floors:
                levels[room] = max(levels[room], levels[other])
    return levels


def implied(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the imports (room, other) where other imports lead from room to other, too. None is of a circle."""
    links = by_room(pairs)
    together = {room: group for group in circles(links) for room in group}

    def reached(room: str, seen: set[str]) -> set[str]:
        for other in links.get(room, set()) - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    return {
        (room, other)
        for room, others in links.items()
        for other in others
        if other not in together.get(room, ()) and any(other in reached(step, set()) for step in others - {other})
    }


def draw(modules: Sequence[Module], path: Path) -> None:
    """Draw a PNG of the rooms on their floors, with their statements, and an arrow for each import between rooms.

    Downward arrows that other arrows imply are left out. Rooms without a floor are dashed.
    """
    from matplotlib.figure import Figure  # here, since the table does not need it

    house = [module for module in modules if module.name.partition(".")[0] != "tests" and module.room != "apr_jax"]
    pairs = {pair: count for pair, count in room_links(house).items() if "apr_jax" not in pair}
    sizes: Counter = Counter()
    for module in house:
        sizes[module.room] += module.statements
    levels = levels_of(pairs, sizes)
    left_out = implied(pair for pair in pairs if levels[pair[0]] >= levels[pair[1]])
    width, height = 14.0, 1.7  # of the picture, and of a floor
    where = {}
    for level in range(len(FLOORS)):
        order = [name for name in FLOORS[level] if name in sizes]
        names = order + sorted(name for name in sizes if levels[name] == level and name not in order)
        step = width / max(len(names), 1)
        for i, name in enumerate(names):
            shift = 0.2 * step * (-1) ** level if len(names) > 1 else (-0.3 if level % 2 else 0.1) * width
            where[name] = ((i + 0.5) * step + shift, height * level)  # arrows pass between the boxes of a floor
    figure = Figure(figsize=(width, height * len(FLOORS)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set_xlim(-1.3, width + 0.6)
    axes.set_ylim(-0.6, height * len(FLOORS) - 0.7)
    for level in range(len(FLOORS)):
        axes.axhspan(height * level - 0.45, height * level + 0.45, color="#F2F2F2", zorder=0)
        axes.text(-1.2, height * level, f"floor {level}", va="center", color="#777777")
    boxes = {
        name: axes.text(
            x, y, f"{name}\n{sizes[name]}", ha="center", va="center", fontsize=11, zorder=4,
            bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": "#333333",
                  "ls": "-" if any(name in names for names in FLOORS) else "--"},
        )
        for name, (x, y) in where.items()
    }  # fmt: skip
    for pair, count in sorted(pairs.items()):
        (x, y), (to_x, to_y) = where[pair[0]], where[pair[1]]
        down, level = y > to_y, y == to_y
        if pair in left_out:
            continue
        bend = (0.18 + 0.5 / abs(to_x - x)) * (-1 if to_x > x else 1) if level else 0.0 if down else 0.15
        arrow = {
            "arrowstyle": "-|>", "color": "#777777" if down else "#0072B2" if level else "#D55E00",
            "lw": 0.8 + 0.3 * count**0.7, "connectionstyle": f"arc3,rad={bend}", "mutation_scale": 13,
            "patchA": boxes[pair[0]].get_bbox_patch(), "patchB": boxes[pair[1]].get_bbox_patch(),
        }  # fmt: skip
        axes.annotate("", xy=(to_x, to_y), xytext=(x, y), zorder=2 if down else 3, arrowprops=arrow)
    title = (
        "Rooms with their statements. Imports: grey downwards (less those that others imply), blue on a floor, red up"
    )
    axes.set_title(title, loc="left", fontsize=12)
    with whole(path) as part:
        figure.savefig(part, format="png", facecolor="white")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("root", str(command.ROOT), "Folder of the checkout.", flag_values=values)
    flags.DEFINE_string("out", None, "PNG to draw.", flag_values=values)


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    modules = read_modules(Path(values["root"].value).absolute())
    print(report(modules))
    if values["out"].value:
        draw(modules, Path(values["out"].value))


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
