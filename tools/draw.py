"""Draws a thread tree: as indented text for a terminal, or as one HTML page that loads no other files."""

import dataclasses
import html
import math
from collections.abc import Callable, Iterator, Sequence

from apr_jax.threads import Block, Spawn, Thread, ThreadTree, metrics

FAINT = 0.5  # in HTML, tokens that were sampled with a lower probability are underlined


@dataclasses.dataclass(frozen=True)
class Span:
    """A block on the time axis. Time is counted in sequential tokens, so children begin where their call ends."""

    kind: str  # prompt, written, forced, call or join
    start: int
    block: Block

    @property
    def end(self) -> int:
        return self.start + len(self.block)


@dataclasses.dataclass
class Lane:
    """A thread on the time axis: its blocks, and the times when it waited for children."""

    label: str  # root, 0, 0.1, ...: the number among the children of its parent, after the parent's label
    level: int  # 0 for the root
    thread: Thread
    start: int
    parent: int | None  # number of the parent's lane
    spans: list[Span] = dataclasses.field(default_factory=list)
    waits: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (end of a call, start of its join)

    @property
    def name(self) -> str:
        return self.label if self.level == 0 else f"child {self.label}"

    @property
    def end(self) -> int:
        return self.spans[-1].end if self.spans else self.start

    @property
    def size(self) -> int:
        return sum(len(span.block) for span in self.spans)


def lanes_of(tree: ThreadTree) -> list[Lane]:
    """Return the lanes of all threads, depth first. The latest end is `sequential_tokens` of the tree."""
    lanes: list[Lane] = []

    def place(thread: Thread, start: int, label: str, level: int, parent: int | None) -> int:
        me, count = len(lanes), 0
        lane = Lane(label, level, thread, start, parent)
        lanes.append(lane)
        now = start

        def add(kind: str, block: Block) -> None:
            nonlocal now
            lane.spans.append(Span(kind, now, block))
            now += len(block)

        for index, item in enumerate(thread.blocks):
            if isinstance(item, Block):
                add("prompt" if index == 0 else "written" if item.sampled else "forced", item)
                continue
            for block in item.call:
                add("call" if block.sampled else "forced", block)
            called = now
            for child in item.children:
                name = str(count) if level == 0 else f"{label}.{count}"
                now = max(now, place(child, called, name, level + 1, me))
                count += 1
            lane.waits.append((called, now))
            add("join", item.join)
        return now

    place(tree.root, 0, "root", 0, None)
    return lanes


class Drawing:
    """Draws one tree. `decode` converts token ids to text (None for a tree of text); `result` is the protocol's."""

    def __init__(
        self,
        tree: ThreadTree,
        decode: Callable[[Sequence[int]], str] | None,
        result: Callable[[str], str | None],
    ):
        self.tree, self.decode, self.result = tree, decode, result
        self.lanes = lanes_of(tree)
        self.unit = "tokens" if decode else "characters"

    def text(self, block: Block) -> str:
        return self.decode(block.content) if self.decode else block.content

    def outcome(self, thread: Thread) -> str:
        """Return a phrase that says whether a thread returned a result or failed."""
        if thread.failure is not None:
            return f"FAILED ({thread.failure})"
        content = [part for block in thread.context for part in block.content]
        found = self.result(self.decode(content) if self.decode else "".join(content))
        return "returned nothing" if found is None else "returned a path"

    def costs(self) -> str:
        """Return one line with the tree's numbers of tokens and children."""
        tree, unit = self.tree, self.unit
        return (
            f"{metrics.total_tokens(tree):,} {unit} in all, {metrics.sequential_tokens(tree):,} one after another, "
            f"longest context {metrics.longest_context(tree):,}, {metrics.children(tree)} children"
        )

    # ------------------------------------------------------------------ terminal

    def terminal(self, lines: int = 8) -> str:
        """Return the tree as text, with children indented below their call.

        Lines after ":" were inserted by the system, lines after "|" were written by the model. At most `lines` lines of
        each block are shown (0: all).
        """
        return "\n".join(self._thread_lines(self.tree.root, "root", "", lines)) + "\n"

    def _thread_lines(self, thread: Thread, label: str, indent: str, lines: int) -> Iterator[str]:
        size = sum(len(block) for item in thread.blocks for block in own_blocks(item))
        yield f"{indent}{label}: {size:,} {self.unit}, {self.outcome(thread)}"
        count = 0
        indent += "  "
        for index, item in enumerate(thread.blocks):
            if isinstance(item, Block):
                kind = "prompt" if index == 0 else "written" if item.sampled else "forced"
                yield from self._block_lines(kind, item, indent, lines)
                continue
            for block in item.call:
                yield from self._block_lines(f"call of {len(item.children)}", block, indent, lines)
            for child in item.children:
                yield from self._thread_lines(child, f"child {count}", indent + "  ", lines)
                count += 1
            yield from self._block_lines("join", item.join, indent, lines)

    def _block_lines(self, kind: str, block: Block, indent: str, lines: int) -> Iterator[str]:
        yield f"{indent}{kind}, {len(block):,} {self.unit}"
        rows = self.text(block).strip("\n").split("\n")
        shown = rows if lines <= 0 or len(rows) <= lines + 1 else rows[:lines]
        bar = "|" if block.sampled else ":"
        yield from (f"{indent}  {bar} {row}".rstrip() for row in shown)
        if len(shown) < len(rows):
            yield f"{indent}  {bar} ... {len(rows) - len(shown)} more lines"

    # ------------------------------------------------------------------ HTML

    def page(self, title: str, verdict: str, right: bool) -> str:
        """Return the HTML page. Threads are lanes over sequential tokens; a click on a lane opens the thread's text."""
        head = f"<h1>{html.escape(title)} <b class={'right' if right else 'wrong'}>{html.escape(verdict)}</b></h1>"
        keys = "".join(f"<span class=key><i class={kind}></i>{label}</span>" for kind, label in _KEYS)
        texts = "".join(self._details(number, lane) for number, lane in enumerate(self.lanes))
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
            f"<style>{_STYLE}</style>{head}<p>{html.escape(self.costs())}</p><p>{keys}</p>{self._svg()}"
            f"<p class=note>Click a thread to read it. Underlined: sampled with a probability below {FAINT:g}.</p>"
            f"{texts}<script>{_SCRIPT}</script></html>\n"
        )

    def _svg(self) -> str:
        left, width, row, top = 170, 1000, 24, 26
        end = max(lane.end for lane in self.lanes) or 1
        bottom = top + row * len(self.lanes)

        def x(time: int) -> float:
            return round(left + (width - left - 12) * time / end, 2)

        parts = []
        for tick in _ticks(end):
            parts.append(f'<path class=grid d="M{x(tick)} {top - 4}V{bottom}"/><text x={x(tick)} y=14>{tick:,}</text>')
        for number, lane in enumerate(self.lanes):
            y = top + row * number
            if lane.parent is not None:
                parent = top + row * lane.parent + row / 2
                parts.append(f'<path class=link d="M{x(lane.start)} {parent}V{y + row / 2}"/>')
        for number, lane in enumerate(self.lanes):
            y = top + row * number
            summary = self._summary(lane)
            look = "wrong" if lane.thread.failure else "name"
            mark = "failed" if lane.thread.failure else f"{lane.size:,}"
            parts.append(f'<a href="#t{number}" data-thread={number}><title>{html.escape(summary)}</title>')
            parts.append(f"<rect class=hit x=0 y={y} width={width} height={row} />")
            parts.append(f"<text class={look} x={8 + 12 * min(lane.level, 6)} y={y + 16}>{lane.name}: {mark}</text>")
            for start, stop in lane.waits:
                parts.append(f'<path class=wait d="M{x(start)} {y + row / 2}H{x(stop)}"/>')
            for span in lane.spans:
                begin = x(span.start)
                wide = max(x(span.end) - begin, 0.8)
                parts.append(f"<rect class={span.kind} x={begin} y={y + 4} width={wide:.2f} height={row - 8} />")
            parts.append("</a>")
        axis = f"<text x=8 y=14 class=name>sequential {self.unit}</text>"
        return f'<svg viewBox="0 0 {width} {bottom + 6}" role=img>{axis}{"".join(parts)}</svg>'

    def _details(self, number: int, lane: Lane) -> str:
        blocks = []
        for span in lane.spans:
            title = f"{span.kind}, {len(span.block):,} {self.unit}"
            blocks.append(f'<pre class={span.kind} title="{title}">{self._marked(span.block)}</pre>')
        opened = " open" if number == 0 else ""
        summary = f"<summary>{html.escape(self._summary(lane))}</summary>"
        return f'<details id="t{number}"{opened}>{summary}{"".join(blocks)}</details>'

    def _summary(self, lane: Lane) -> str:
        return f"{lane.name}: {lane.size:,} {self.unit}, {self.outcome(lane.thread)}"

    def _marked(self, block: Block) -> str:
        """Return the block's text as HTML, with its unlikely tokens underlined.

        Nothing is underlined in a block whose tokens, decoded one by one, do not give its text.
        """
        whole = self.text(block)
        if self.decode is None or block.logprobs is None:
            return html.escape(whole)
        tokens = [self.decode([token]) for token in block.content]
        if "".join(tokens) != whole:
            return html.escape(whole)
        parts = []
        for token, logprob in zip(tokens, block.logprobs):
            shown, p = html.escape(token), math.exp(min(logprob, 0.0))
            parts.append(f'<u title="probability {p:.2g}">{shown}</u>' if shown and p < FAINT else shown)
        return "".join(parts)


def own_blocks(item: Block | Spawn) -> tuple[Block, ...]:
    """Return the blocks of a thread's item without those of children: the block itself, or a spawn's call and join."""
    return (item,) if isinstance(item, Block) else (*item.call, item.join)


def _ticks(end: int) -> range:
    """Return about eight round numbers from 0 to `end`, for the time axis."""
    step = 10 ** max(0, len(str(end)) - 2)
    step *= next(factor for factor in (1, 2, 5, 10, 20, 50) if end / (step * factor) <= 9)
    return range(0, end + 1, step)


_KEYS = (
    ("prompt", "prompt (forced)"), ("written", "written by the model"), ("call", "call (written)"),
    ("join", "join (forced)"), ("forced", "guard (forced)"),
)  # fmt: skip
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:24px auto;max-width:1080px;padding:0 16px;color:#222;background:#fff}
h1{font-size:20px;margin:0}b.right{color:#00704f}b.wrong,.wrong{color:#b33c00}
svg{width:100%;height:auto;border:1px solid #ddd;border-radius:6px}svg text{font-size:11px;fill:#666;text-anchor:middle}
svg text.name{text-anchor:start;fill:#222}svg text.wrong{text-anchor:start;fill:#b33c00}
rect.hit{fill:transparent}a:hover rect.hit{fill:#f0f4f8}svg a{cursor:pointer}
rect.prompt,i.prompt{fill:#9aa5b1;background:#9aa5b1}rect.written,i.written{fill:#0072b2;background:#0072b2}
rect.call,i.call{fill:#d55e00;background:#d55e00}rect.join,i.join{fill:#e0b13c;background:#e0b13c}
rect.forced,i.forced{fill:#222;background:#222}
path.grid{stroke:#eee}path.link{stroke:#bbb}path.wait{stroke:#999;stroke-dasharray:2 3}
.key{margin-right:18px}.key i{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:6px}
.note{color:#666}details{border:1px solid #ddd;border-radius:6px;margin:8px 0;padding:6px 12px}summary{cursor:pointer}
pre{margin:0;padding:2px 10px;white-space:pre-wrap;overflow-wrap:anywhere;border-left:5px solid;font-size:13px}
pre.prompt{border-color:#9aa5b1;background:#f1f3f5}pre.written{border-color:#0072b2}
pre.call{border-color:#d55e00;background:#fdf1e8}pre.join{border-color:#e0b13c;background:#fdf7e3}
pre.forced{border-color:#222;background:#eee}
""".strip()
_SCRIPT = """
for (const lane of document.querySelectorAll("[data-thread]")) lane.addEventListener("click", event => {
  event.preventDefault();
  const text = document.getElementById("t" + lane.dataset.thread);
  text.open = true;
  text.scrollIntoView({behavior: "smooth", block: "start"});
});
""".strip()
