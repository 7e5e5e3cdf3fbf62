"""How a checkout is built: statements and lines by folder, rooms on their floors, imports that lead upwards, circles.

    python -m tools.benchmarks.structure
    python -m tools.benchmarks.structure --root=/path/to/a/checkout --out=structure.png

A room is a folder of `apr_jax`, or one of its modules that lies in none; `experiments` and `tools` are one room each.
An arrow is an import. Modules are read as text: nothing is executed. Statements are those of the syntax tree.
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

FLOORS = (  # a room imports from floors below its own, and from its own without circles
    ("errors", "checks", "interrupt", "devices", "compilation", "io", "text", "threads", "model"),
    ("tasks",),
    ("rollout", "data"),
    ("train",),
    ("evaluate", "export"),
    ("experiments", "tools"),
)
FOLDERS = ("apr_jax", "experiments", "tools", "benchmarks", "tests")


@dataclasses.dataclass(frozen=True)
class Module:
    """One Python file of a checkout."""

    name: str  # as imported, "apr_jax.model.llama"
    path: Path  # relative to the checkout
    statements: int
    lines: int
    imports: frozenset[str]  # names of modules, or of things in them, all in full

    @property
    def room(self) -> str:
        first, *rest = self.name.split(".")
        return rest[0] if first == "apr_jax" and rest else first


def read_modules(root: Path) -> list[Module]:
    """All modules of the `FOLDERS` of a checkout, in the order of their paths. Raises UserError where there is none."""
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    if not paths:
        raise UserError(f"{root} is no checkout: it has no Python file in {', '.join(FOLDERS)}")
    return [read_module(root, path) for path in paths]


def read_module(root: Path, path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, path)
    parts = path.relative_to(root).with_suffix("").parts
    package = parts[:-1]  # of a relative import
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
    """The modules that each module imports, by name; those of other packages left out."""
    modules = list(modules)
    names = {module.name for module in modules}
    links = {}
    for module in modules:
        found = {name if name in names else name.rpartition(".")[0] for name in module.imports}
        links[module.name] = (found & names) - {module.name}
    return links


def room_links(modules: Iterable[Module]) -> Counter:
    """How many modules of a room import from another: (room, other room) -> modules."""
    modules = list(modules)
    rooms = {module.name: module.room for module in modules}
    pairs = Counter()
    for name, others in module_links(modules).items():
        pairs.update({(rooms[name], rooms[other]) for other in others} - {(rooms[name], rooms[name])})
    return pairs


def floor_of(room: str) -> int:
    """Raises UserError for a room that stands on no floor."""
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor
    raise UserError(f"{room} stands on no floor: name it in FLOORS of tools/benchmarks/structure.py")


def upward(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The imports (room, other room) from a higher floor."""
    return sorted((room, other) for room, other in pairs if floor_of(other) > floor_of(room))


def circles(links: dict[str, set[str]]) -> list[list[str]]:
    """The groups of two nodes or more that all lead to each other (Tarjan's strongly connected components)."""
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
    links: dict[str, set[str]] = {}
    for room, other in pairs:
        links.setdefault(room, set()).add(other)
    return links


# ---------------------------------------------------------------------- showing


def table(modules: Sequence[Module]) -> str:
    """Files, statements and lines of each folder, and of each top folder in all."""
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
    house = [module for module in modules if module.name.partition(".")[0] != "tests"]
    pairs = room_links(house)
    rooms = {module.room for module in house} - {"apr_jax"}
    lines = [table(modules), ""]
    for floor, names in reversed(list(enumerate(FLOORS))):
        lines.append(f"floor {floor}: {', '.join(name for name in names if name in rooms)}")
    if homeless := sorted(rooms - {name for names in FLOORS for name in names}):
        lines.append(f"on no floor: {', '.join(homeless)}")
    placed = [pair for pair in pairs if not set(pair) & set(homeless) and "apr_jax" not in pair]
    up, round_ = upward(placed), circles(by_room(pairs))
    lines.append(f"imports from a higher floor: {', '.join(f'{a} -> {b}' for a, b in up) or 'none'}")
    lines.append(f"circles of rooms: {'; '.join(' - '.join(group) for group in round_) or 'none'}")
    return "\n".join(lines)


def draw(modules: Sequence[Module], path: Path) -> None:
    """The rooms as boxes on their floors with their statements, an arrow for each import between them: grey downwards,
    blue on one floor, red upwards. A PNG."""
    from matplotlib.figure import Figure  # here: the table need not wait for it

    house = [module for module in modules if module.name.partition(".")[0] != "tests"]
    pairs = {pair: count for pair, count in room_links(house).items() if "apr_jax" not in pair}
    sizes = Counter()
    for module in house:
        sizes[module.room] += module.statements
    sizes.pop("apr_jax", None)
    homeless = sorted(set(sizes) - {name for names in FLOORS for name in names})
    levels = [[name for name in names if name in sizes] for names in FLOORS]
    if homeless:
        levels.append(homeless)
    widest = 12.0
    where = {}
    for level, names in enumerate(levels):
        for i, name in enumerate(names):
            shift = 0.5 * (level % 2)  # so that arrows pass between the boxes of a floor
            where[name] = ((i + 0.5) * widest / max(len(names), 1) + shift * (len(names) > 1), 1.6 * level)
    figure = Figure(figsize=(13, 1.5 * len(levels) + 1), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set_xlim(-1.2, widest + 0.8)
    axes.set_ylim(-0.6, 1.6 * len(levels) - 0.7)
    for level in range(len(levels)):
        title = "no floor" if homeless and level == len(levels) - 1 else f"floor {level}"
        axes.axhspan(1.6 * level - 0.45, 1.6 * level + 0.45, color="#F2F2F2", zorder=0)
        axes.text(-1.15, 1.6 * level, title, va="center", ha="left", fontsize=10, color="#777777")
    for (room, other), count in sorted(pairs.items()):
        (x, y), (to_x, to_y) = where[room], where[other]
        colour = "#AAAAAA" if y > to_y else "#0072B2" if y == to_y else "#D55E00"
        bend = -0.35 if y == to_y else 0.06
        side = 0.27 if y > to_y else -0.27 if y < to_y else 0.27
        axes.annotate(
            "", xy=(to_x, to_y + (0.27 if y >= to_y else -0.27)), xytext=(x, y - side if y != to_y else y + 0.27),
            zorder=2 if y > to_y else 3,
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 0.6 + 0.25 * count**0.7,
                        "connectionstyle": f"arc3,rad={bend}", "alpha": 0.75 if y > to_y else 1.0},
        )  # fmt: skip
    for name, (x, y) in where.items():
        axes.text(
            x, y, f"{name}\n{sizes[name]}", ha="center", va="center", fontsize=9, zorder=4,
            bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": "#333333"},
        )  # fmt: skip
    axes.set_title("Rooms, their statements, and imports (blue: same floor, red: upwards)", loc="left", fontsize=12)
    with whole(path) as part:
        figure.savefig(part, format="png", facecolor="white")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("root", str(command.ROOT), "The checkout to look at.", flag_values=values)
    flags.DEFINE_string("out", None, "A PNG to draw.", flag_values=values)


def _work(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    modules = read_modules(Path(values["root"].value).absolute())
    print(report(modules))
    if values["out"].value:
        draw(modules, Path(values["out"].value))


def main(argv: Sequence[str]) -> int:
    return command.run(__doc__, _define, _work, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
