"""A view of a tree in a terminal while a model writes it: a panel for each thread, with the end of its text."""

import dataclasses
import io
import itertools
import re
import threading
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from apr_jax.threads import Thread
from apr_jax.threads.observer import Observer

FRAMES = 12  # a second
COLUMN = 42  # least width of a child's panel, in characters
CHILD_LINES, ROOT_LINES = (2, 6), (4, 14)  # fewest and most lines of text in a panel
WRITING, WAITING, RETURNED, NOTHING, FAILED = "decodes", "waits", "returned a result", "returned nothing", "failed"
COLORS = {WRITING: "cyan", WAITING: "yellow", RETURNED: "green", NOTHING: "bright_black", FAILED: "red"}
FORCED = "bright_black"  # color of text that the system inserted: prompts and joins


@dataclasses.dataclass
class Lane:
    """A thread that the view shows. `tokens` are (id, whether the model sampled it) of its own context."""

    label: str  # root, child 0, child 0.1: the number among its parent's children
    tokens: list[tuple[int, bool]]
    state: str = WRITING
    children: int = 0


class View(Observer):
    """The view of one tree. `decode` converts token ids to text; `result` is the protocol's.

    Events arrive on the event loop, while `frame` may be called by the thread that refreshes the terminal.
    """

    def __init__(
        self, title: str, decode: Callable[[Sequence[int]], str], result: Callable[[str], str | None],
        begin: float, keep_picture: bool = False,
    ):  # fmt: skip
        self.title, self.decode, self.result, self.begin = title, decode, result, begin
        self.end: float | None = None  # when the tree ended; it and `begin` are seconds of `time.perf_counter`
        self.lanes: dict[tuple[int, ...], Lane] = {}
        self.sampled = 0  # tokens, those of a broken connection included
        self.svg: str | None = None  # with `keep_picture`, the frame just before the first thread ended
        self._keep_picture = keep_picture
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ events

    def started(self, name: tuple[int, ...], depth: int, prompt: Sequence[int]) -> None:
        with self._lock:
            label = "root"
            if depth:
                parent = self.lanes[name[:-2]]
                label = f"child {parent.children}" if depth == 1 else f"{parent.label}.{parent.children}"
                parent.children += 1
            self.lanes[name] = Lane(label, [(token, False) for token in prompt])

    def decoded(self, name: tuple[int, ...], at: int, ids: Sequence[int]) -> None:
        with self._lock:
            self.lanes[name].tokens[at:] = [(token, True) for token in ids]
            self.sampled += len(ids)

    def replaced(self, name: tuple[int, ...], token: int) -> None:
        with self._lock:
            self.lanes[name].tokens[-1:] = [(token, False)]

    def spawned(self, name: tuple[int, ...], call: int, children: int) -> None:
        with self._lock:
            self.lanes[name].state = WAITING

    def joined(self, name: tuple[int, ...], call: int, ids: Sequence[int]) -> None:
        with self._lock:
            self.lanes[name].tokens[-call:] = [(token, False) for token in ids]
            self.lanes[name].state = WRITING

    def ended(self, name: tuple[int, ...], thread: Thread) -> None:
        if self._keep_picture and self.svg is None:
            self.svg = picture(self)
        with self._lock:
            lane = self.lanes[name]
            found = self.result(self.decode([token for token, _ in lane.tokens]))
            lane.state = FAILED if thread.failure else NOTHING if found is None else RETURNED

    # ------------------------------------------------------------------ frames

    def frame(self, width: int, height: int) -> RenderableType:
        """Return the view for a terminal of `width` columns and `height` lines: the root above its children."""
        with self._lock:
            root, *children = list(self.lanes.values()) or [Lane("root", [])]
            columns = max(1, min(len(children), width // COLUMN))
            lines, shown, root_lines = _fit(len(children), columns, height)
            order = sorted(range(len(children)), key=lambda i: (children[i].state != WRITING, -i))  # running ones first
            kept = [children[i] for i in sorted(order[:shown])]
            grid = Table.grid(expand=True)
            for _ in range(columns):
                grid.add_column(ratio=1)
            for at in range(0, len(kept), columns):
                grid.add_row(*(self._panel(lane, lines) for lane in kept[at : at + columns]))
            return Group(self._panel(root, root_lines), grid, self._foot(len(children) - len(kept)))

    def _panel(self, lane: Lane, lines: int) -> Panel:
        color = COLORS[lane.state]
        title = Text(f"{lane.label} {lane.state}, {len(lane.tokens):,} tokens", style=color)
        body = Text(no_wrap=True, overflow="ellipsis")
        for sampled, run in itertools.groupby(lane.tokens, key=lambda token: token[1]):
            body.append(printable(self.decode([token for token, _ in run])), style="" if sampled else FORCED)
        rows = list(body.split("\n", allow_blank=False))[-lines:]
        rows += [Text()] * (lines - len(rows))
        cropped = Text("\n", no_wrap=True, overflow="ellipsis").join(rows)
        return Panel(cropped, title=title, title_align="left", border_style=color, padding=(0, 1))

    def _foot(self, left_out: int) -> Text:
        now = time.perf_counter() if self.end is None else self.end
        running = sum(lane.state == WRITING for lane in self.lanes.values())
        count = len(self.lanes)
        state = f"{count} thread{'s' if count > 1 else ''}, {running} decoding, {self.sampled:,} tokens sampled"
        if not self.sampled:
            state = "compiles what no earlier run has" if self.lanes else "loads the model"
        elif left_out:
            state += f", {left_out} threads not shown"
        foot = f"{self.title}: {state}, {now - self.begin:.1f} s"
        return Text(foot, style="bold", no_wrap=True, overflow="ellipsis")


class Frames:
    """The view as a renderable of rich: each time it is drawn it fits the terminal of that moment."""

    def __init__(self, view: View):
        self.view = view

    def __rich_console__(self, console, options):
        yield self.view.frame(options.max_width, console.size.height - 1)


def _fit(children: int, columns: int, height: int) -> tuple[int, int, int]:
    """Return (lines in a child's panel, children that are shown, lines in the root's panel) for a terminal."""
    rows = -(-children // columns)
    least = ROOT_LINES[0] + 2 + 1  # the root's panel with its border, and the last line
    fitting = max(1, (height - least) // (CHILD_LINES[0] + 2))
    rows = min(rows, fitting)
    lines = min(CHILD_LINES[1], (height - least) // rows - 2) if rows else 0
    lines = max(CHILD_LINES[0], lines)
    root = height - 3 - rows * (lines + 2)
    return lines, min(children, rows * columns), min(ROOT_LINES[1], max(ROOT_LINES[0], root))


def printable(text: str) -> str:
    """Return a model's text with a mark in place of each character that could control a terminal."""
    return "".join(one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in text)


def picture(view: View, width: int = 120, height: int = 34) -> str:
    """Return the present frame as an SVG image that loads no other files."""
    console = Console(
        record=True, width=width, height=height, force_terminal=True, color_system="truecolor", file=io.StringIO()
    )
    console.print(view.frame(width, height))
    return re.sub(r"@font-face *\{.*?\}", "", console.export_svg(title=view.title), flags=re.DOTALL)
