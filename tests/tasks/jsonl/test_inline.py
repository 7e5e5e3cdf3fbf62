"""Inline demonstrations: the trees that they stand for, and what is refused."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.errors import UserError
from apr_jax.tasks.jsonl.inline import check_thread, read_inline
from apr_jax.tasks.tagged.protocol import TAGS, TagProtocol, tag_spawn
from apr_jax.threads import Block, Thread

ALONE = "<return>4</return>"
HALVES = "<spawn><thread>3+9\n<return>2</return></thread><thread>4+8\n<return>2</return></thread></spawn>"
NESTED = f"a <spawn><thread>b\nc {HALVES}d <return>5</return></thread></spawn>e <return>5</return>"


def read(text, levels=2, inherit=False, prompt="3+9+4+8\n"):
    return read_inline(text, prompt, TagProtocol(None, inherit), levels)


def written(text):
    return Block(text, sampled=True)


def forced(text):
    return Block(text, sampled=False)


def test_the_tree_of_the_worked_example():
    root = read(HALVES + ALONE)
    children = [Thread((forced(f"{text}\n"), written("<return>2</return>"))) for text in ("3+9", "4+8")]
    assert root == Thread((forced("3+9+4+8\n"), tag_spawn(children, ["2", "2"]), written(ALONE)))
    assert [block.content for block in root.blocks[1].call] == [
        "<spawn><thread>3+9</thread><thread>4+8</thread></spawn>"
    ]
    assert root.blocks[1].join == forced("<join><result>2</result><result>2</result></join>")
    assert root.text == f"3+9+4+8\n<join><result>2</result><result>2</result></join>{ALONE}"


@pytest.mark.parametrize("inherit", [False, True])
def test_children_may_spawn_and_inherit(inherit):
    root = read(NESTED, inherit=inherit)
    (child,) = root.children
    assert [block.content for block in child.context][:2] == ["b\n", "c "] and len(child.children) == 2
    assert [thread.inherits for thread in root.walk()] == [False, inherit, inherit, inherit]
    assert child.blocks[-1] == written("d <return>5</return>") and root.blocks[1] == written("a ")
    check_thread(root, "3+9+4+8\n", TagProtocol(None, inherit), 2)


def test_a_child_that_returns_nothing_joins_as_nothing():
    root = read("<spawn><thread>1\nno</thread><thread>2\n</thread></spawn>")
    assert root.blocks[1].join.content == "<join><nothing/><nothing/></join>" and root.blocks[-1] == written("")
    assert read("") == Thread((forced("3+9+4+8\n"), written("")))


@pytest.mark.parametrize(
    "text, says",
    [
        ("</spawn>", "</spawn>"), ("a<join>", "'a'"), ("<return>", "''"), ("<return></return>", "''"),
        ("<return>4", "</return>"), ("<return>a<b</return>", "'a<b'"), ("</return>", "</return>"),
        ("<return><return>4</return>", "''"), ("<spawn></spawn>", "<thread>"), ("<spawn>x<thread>", "'x'"),
        ("<spawn><thread>1\n</thread>", "</spawn>"), ("<spawn><thread>1</thread></spawn>", "'1'"),
        ("<spawn><thread>\n</thread></spawn>", "'\\n'"), ("<spawn><thread>a<b\n</thread></spawn>", "'a<b\\n'"),
        ("<spawn><thread>1\n", "</thread>"), ("<spawn><thread>1\n</thread></spawn></thread>", "</thread>"),
        (NESTED.replace("c ", f"c {NESTED}"), "last level"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_shown(text, says):
    with pytest.raises(UserError) as refused:
        read(text)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def random_text(rng, levels):
    """A demonstration that is right, of up to `levels` levels of children."""
    parts = []
    for _ in range(rng.randrange(4)):
        parts.append(rng.choice(["", "a b", "x\ny", "7 < 8", "<return>3</return>", "<return>a\nb</return>"]))
        if levels and rng.random() < 0.5:
            children = [
                f"<thread>{rng.choice('pqr')}\n{random_text(rng, levels - 1)}</thread>"
                for _ in range(rng.randint(1, 3))
            ]
            parts.append(f"<spawn>{''.join(children)}</spawn>")
    return "".join(parts)


@given(st.integers(0, 10**9), st.booleans())
def test_every_right_text_is_a_tree_that_a_rollout_could_have(seed, inherit):
    rng = random.Random(seed)
    text = random_text(rng, 2)
    root = read(text, inherit=inherit)
    check_thread(root, "3+9+4+8\n", TagProtocol(None, inherit), 2)

    def inline(thread):
        """The text that the thread was read from: children inside their calls."""
        parts = []
        for item in thread.blocks[1:]:
            if isinstance(item, Block):
                parts.append(item.content)
            else:
                parts += [
                    "<spawn>",
                    *(f"<thread>{child.blocks[0].content}{inline(child)}</thread>" for child in item.children),
                    "</spawn>",
                ]
        return "".join(parts)

    assert inline(root) == text


@given(st.integers(0, 10**9))
def test_any_text_is_a_tree_or_one_line_of_an_error(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice([*TAGS, *TAGS, "a", "\n", "<", "7"]) for _ in range(rng.randrange(14)))
    try:
        check_thread(read(text), "3+9+4+8\n", TagProtocol(None), 2)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
