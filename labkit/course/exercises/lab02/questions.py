"""What lab 02 asks: guesses before figures, and questions with an answer to every option."""

from __future__ import annotations

from labkit.course.exercise import Prediction, Quiz

PREDICTIONS = (
    Prediction("02.p1", "Tokens whose K and V a layer computes in 16 passes without a cache", "tokens", 1.05),
    Prediction("02.p2", "Bytes that one token adds to the cache of the whole model", "bytes", 1.1),
    Prediction("02.p3", "How much faster 200 new tokens are with the cache", "times", 1.3),
    Prediction("02.p4", "What a growing cache of the whole model moves to take 200 tokens", "MB", 1.3),
    Prediction("02.p5", "Prefill's tokens per second over decode's", "times", 1.5),
    Prediction("02.p6", "Tokens that a stateless server runs for each one that a stateful server runs", "times", 1.2),
    Prediction("02.p7", "Layers whose keys change when the first token changes", "layers", 1.0),
)  # fmt: skip

QUIZZES = (
    Quiz(
        "02.q1",
        "Why are K and V of old tokens cached, and their queries not?",
        {"a": "Queries are too large.", "b": "An old token's query is never used again.",
         "c": "Queries change at every step.", "d": "Queries are the same for all tokens."},
        {"a": "A query head is as large as a key head. Size is not the reason.",
         "b": "A query asks once, when its token is new. Keys and values are read by every later token.",
         "c": "An old token's query would be the same if it were computed again, as its key is. Nobody asks for it.",
         "d": "Each token has its own, from its own hidden state and position."},
        "b",
    ),
    Quiz(
        "02.q2",
        "A prompt of 1,000 tokens, 500 generated with a cache. How many tokens' K and V does each layer compute?",
        {"a": "500", "b": "1,000", "c": "1,499", "d": "1,500"},
        {"a": "The prompt needs K and V too: prefill computes them.",
         "b": "The new tokens need K and V too, all but the last.",
         "c": "1,000 in prefill, which gives the first new token, and 499 in decode. The last token is never run.",
         "d": "Close. The last new token is returned but never run, so its K and V are never computed."},
        "c",
    ),
    Quiz(
        "02.q3",
        "With a cache, the total of attention's reads over a generation of N tokens grows as",
        {"a": "N: that is what the cache is for", "b": "N squared: each step reads all that is held",
         "c": "N cubed", "d": "constant"},
        {"a": "That is the projections. Step i still reads i keys and i values, and 1 + 2 + ... + N is quadratic.",
         "b": "Step i reads i tokens. The cache saves computing them, not reading them.",
         "c": "That is attention without a cache: step i has i rows of i scores.",
         "d": "Each step reads more than the one before."},
        "b",
    ),
    Quiz(
        "02.q4",
        "A cache of 40 tokens is kept. The next prompt is exactly those 40 tokens. How many must be run?",
        {"a": "0", "b": "1", "c": "40", "d": "41"},
        {"a": "Then there are no logits: the cache holds K and V, not the model's answer to them.",
         "b": "The last one, to get its logits. 39 are reused.",
         "c": "39 of them have their K and V in the cache already.",
         "d": "There is no 41st token yet. It is what the run will tell."},
        "b",
    ),
    Quiz(
        "02.q5",
        "The first word of a kept system prompt changes. In which layers are the other tokens' keys still right?",
        {"a": "All", "b": "The first", "c": "None", "d": "The last"},
        {"a": "Above the first layer a token's hidden state has read the changed token.",
         "b": "A first-layer key comes from its own token and position. Above, hidden states have read others.",
         "c": "In the first layer a key depends on its own token and position only.",
         "d": "The last layer is the furthest from the embeddings: the change has passed through all layers below."},
        "b",
    ),
    Quiz(
        "02.q6",
        "A growing cache and a preallocated one hold the same 500 tokens. Which statement is true?",
        {"a": "The preallocated one always takes less memory.", "b": "The growing one reads less in attention.",
         "c": "The growing one moves all it holds at each append; the other takes its capacity from the start.",
         "d": "They give different tokens."},
        {"a": "It takes its capacity, however few tokens it holds. That is the price.",
         "b": "Both hand attention the same 500 tokens.",
         "c": "Time against memory: quadratic copying against slack. Lab 06 removes both.",
         "d": "They hold the same numbers."},
        "c",
    ),
    Quiz(
        "02.q7",
        "Temperature goes from 0 to 1. What changes in the cache after 20 tokens?",
        {"a": "Its size", "b": "The work to fill it", "c": "Only which tokens it holds, if others were drawn",
         "d": "Its dtype"},
        {"a": "Size comes from shapes and the number of tokens.",
         "b": "One token a step is run either way.",
         "c": "Temperature acts on logits, after all K and V of the step are stored.",
         "d": "dtype comes from the model's K and V."},
        "c",
    ),
)  # fmt: skip
