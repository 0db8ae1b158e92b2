"""What lab 01 asks: guesses before figures, and questions with an answer to every option."""

from __future__ import annotations

from labkit.course.contents import Prediction, Quiz

PREDICTIONS = (
    Prediction("01.p1", "By how much must one score lead another for its weight to be 100 times as large?"),
    Prediction("01.p2", "How large is the standard deviation of q · k, for vectors of 64 standard normal numbers?"),
    Prediction("01.p3", "With the mask off, by how many percent do layer 29's old keys change?", "%", within=1.5),
    Prediction("01.p4", "128 tokens, one at a time: rows computed by the wasteful loop / rows used", "times"),
    Prediction("01.p5", "What percentage of all attention goes to the first token?", "%", within=1.5),
)

QUIZZES = (
    Quiz(
        "01.q1",
        "Every score of a query rises by 5. What happens to its weights?",
        {
            "a": "Nothing.",
            "b": "They become more even.",
            "c": "They become sharper.",
        },
        {
            "a": "exp(s + 5) = exp(5) exp(s): the factor stands above and below the fraction and cancels.",
            "b": "Flatter weights come from smaller differences between scores; adding 5 to all leaves them.",
            "c": "Sharper weights come from larger differences between scores: multiply, do not add.",
        },
        "a",
    ),
    Quiz(
        "01.q2",
        "Three tokens are held; two new ones arrive together. How many keys may the first of them see?",
        {"a": "1", "b": "3", "c": "4", "d": "5"},
        {
            "a": "That is the mask without the offset: it forgets the three tokens that are held.",
            "b": "The three held, yes, and itself: a token always sees its own key.",
            "c": "Three held and itself. Its neighbour, at position 4, comes after it.",
            "d": "That is what the second new token sees. For the first, position 4 is the future.",
        },
        "c",
    ),
    Quiz(
        "01.q3",
        "A mistake leaves out the mask in layer 10, and there only. Whose K and V of old tokens stay the same?",
        {
            "a": "Layer 0's alone.",
            "b": "Those of layers 0 to 10.",
            "c": "Those of layers 0 to 9.",
            "d": "All layers' but layer 10's.",
        },
        {
            "a": "Layers 1 to 9 read hidden states too, but nothing later has come into them: their masks are on.",
            "b": "Layer 10 makes K and V from what layer 9 put out, before its own attention. Layer 11 reads the leak.",
            "c": "Layer 10 too: it makes its K and V before its own attention mixes anything in.",
            "d": "What leaks into an old token in layer 10 stays in its hidden state, and all deeper layers read that.",
        },
        "b",
    ),
    Quiz(
        "01.q4",
        "A colleague's cache keeps the queries as well. What does that change?",
        {
            "a": "Each step is faster: the old rows need not be computed again.",
            "b": "Answers improve: old tokens can ask again, now that new ones have come.",
            "c": "It goes wrong: an old token's query changes with every new token.",
            "d": "It takes more memory, and nothing reads what it holds.",
        },
        {
            "a": "The old rows are not computed again without it either: new tokens add rows, old ones are finished.",
            "b": "The mask hides the new ones from them. Asked again, they would give the same rows.",
            "c": "It does not change, for the same reason as K and V do not. It is simply not asked for again.",
            "d": "Row i belongs to query i, which is used once. Keys and values are used by every later token.",
        },
        "d",
    ),
    Quiz(
        "01.q5",
        "A counter was not reset: the prompt's positions are 500, 501, and so on. What does a RoPE model do?",
        {
            "a": "It answers as if 500 unknown tokens stood before the prompt.",
            "b": "It produces noise, since the keys are all different.",
            "c": "The same as at positions 0, 1, ..., apart from rounding, while all positions fit the trained length.",
        },
        {
            "a": "Nothing stands there: no keys are held for those positions, and scores see only distances.",
            "b": "The keys differ, and so do the queries, by the same angle. Two counts in one text do break it.",
            "c": "All keys and queries turn by the same extra angle, and scores see the difference only.",
        },
        "c",
    ),
    Quiz(
        "01.q6",
        "A head gives 90% of its weight to the first token. What follows?",
        {
            "a": "Perhaps nothing: the first token's value is short, so that little is added.",
            "b": "The first word is the most important one of the sentence.",
            "c": "The head is broken and can be removed.",
        },
        {
            "a": "Weights sum to 1 even if nothing fits; a first token with a short value is a place to put the rest.",
            "b": "You saw nearly the same share with other first words. It goes to the place, not to the meaning.",
            "c": "On another text the same head may look elsewhere. A share is no proof of use, nor of uselessness.",
        },
        "a",
    ),
)
