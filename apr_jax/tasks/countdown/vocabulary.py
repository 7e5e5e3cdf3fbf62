"""The Countdown tokenizer: the phrases and numbers of the trace language that are one token each."""

from apr_jax.errors import UserError
from apr_jax.tasks.countdown import trace
from apr_jax.text.tokenizer import Tokenizer

# A prompt's tokens must not depend on the text after it, so no token may extend past the end of a prompt. A prompt ends
# with the "]" of an operations list, before its line end. So "]\n" is one token only after a digit, where none ends.
PHRASES = (
    "Token Budget: ", "Sub Call Budget: ",
    "Moving to Node #0", "Current State: ", ":[", ", ", "], Operations: [", "'", "', '", "[]", "']", "['",
    "], Operations: ['", "], Operations: []",
    "Exploring Operation: ", ", Resulting Numbers: [",
    "Generated Node #0", ": ", "] Operation: ",
    " equal: Goal Reached\n", " unequal: No Solution\n", trace.NO_SOLUTION,
    "Start Sub Search at level ", ": Moving to Node #0", "Exit Sub Search at level ",
    "No solution found in sub search\n",
    trace.SPAWN_OPEN, trace.SPAWN_CLOSE, trace.JOIN_OPEN, trace.JOIN_CLOSE,
    "<Start Sub Search ", "> Moving to Node #0", "<Goal Reached in Sub Search ", "<No Solution in Sub Search ",
    " at level ", " at Node #0", ">\n",
)  # fmt: skip
LINE_END_AFTER_NUMBERS = r"(?<=[0-9])\]\n"
NODE_STEP = r",[0-9](?![0-9])"  # ",3" in "#0,3", the name of a node; not a number of the problem
NUMBER = r"[0-9]+"
SMALLEST_MAX_NUMBER = 9  # numbers up to 9 are characters, which are always tokens


def countdown_tokenizer(max_number: int) -> Tokenizer:
    """Return a tokenizer with one token for each phrase and for each number up to `max_number`.

    Larger numbers are spelled in digits. Raises UserError for a `max_number` below 9.
    """
    if max_number < SMALLEST_MAX_NUMBER:
        raise UserError(f"numbers up to 9 are characters, so max_number is at least 9, was given {max_number}")
    tokens = ["]\n", *(f",{step}" for step in range(10)), *(str(number) for number in range(10, max_number + 1))]
    return Tokenizer.build(PHRASES, (LINE_END_AFTER_NUMBERS, NODE_STEP, NUMBER), tokens)
