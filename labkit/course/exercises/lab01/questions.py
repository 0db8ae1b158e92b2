"""What lab 01 asks: guesses before figures, and questions with an answer to every option."""

from __future__ import annotations

from labkit.course.exercise import Prediction, Quiz

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
            "a": "They become more even.",
            "b": "They become sharper.",
            "c": "Nothing.",
        },
        {
            "a": "Flatter weights come from smaller differences between scores; adding 5 to all leaves them.",
            "b": "Sharper weights come from larger differences between scores: multiply, do not add.",
            "c": "exp(s + 5) = exp(5) exp(s): the factor stands above and below the fraction and cancels.",
        },
        "c",
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
        "Why may the keys and values of old tokens be kept, in all 30 layers?",
        {
            "a": "They are made from the token's embedding, which does not change.",
            "b": "Each layer reads hidden states that, by the causal mask, depend on nothing later.",
            "c": "They change a little with each token, but too little to matter.",
        },
        {
            "a": "True in layer 0 only. Deeper layers read hidden states, and without the mask those change.",
            "b": "A later token can reach an old one only through attention, and the mask forbids that in every layer.",
            "c": "They do not change at all. The last digits differ only because a sum was taken in another order.",
        },
        "b",
    ),
    Quiz(
        "01.q4",
        "Why are K and V kept, but not Q?",
        {
            "a": "Q is larger, so that keeping it would not pay.",
            "b": "Q of an old token changes with every new token, so it would have to be computed anew.",
            "c": "A query is used in its own token's row, once; keys and values are used by every later token.",
            "d": "Q can be computed back from K.",
        },
        {
            "a": "It is larger here (nine heads against three), but no size pays for what is never read again.",
            "b": "It does not change, for the same reason as K and V do not. It is simply not asked for again.",
            "c": "Row i of the matrix belongs to query i. New tokens add new rows; the old rows are finished.",
            "d": "They come from two different weight matrices; neither gives the other.",
        },
        "c",
    ),
    Quiz(
        "01.q5",
        "A counter was not reset: the prompt's positions are 500, 501, and so on. What does a RoPE model do?",
        {
            "a": "It answers as if 500 unknown tokens stood before the prompt.",
            "b": "The same as at positions 0, 1, ..., apart from rounding, while all positions fit the trained length.",
            "c": "It produces noise, since the keys are all different.",
        },
        {
            "a": "Nothing stands there: no keys are held for those positions, and scores see only distances.",
            "b": "All keys and queries turn by the same extra angle, and scores see the difference only.",
            "c": "The keys differ, and so do the queries, by the same angle. Two counts in one text do break it.",
        },
        "b",
    ),
    Quiz(
        "01.q6",
        "A head gives 90% of its weight to the first token. What follows?",
        {
            "a": "The first word is the most important one of the sentence.",
            "b": "Perhaps nothing: the first token's value is short here, so that the head adds little.",
            "c": "The head is broken and can be removed.",
        },
        {
            "a": "You saw the same share with another first word. It goes to the place, not to the meaning.",
            "b": "Weights sum to 1 even if nothing fits; a first token with a short value is a place to put the rest.",
            "c": "On another text the same head may look elsewhere. A share is no proof of use, nor of uselessness.",
        },
        "b",
    ),
)
