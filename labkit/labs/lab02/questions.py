"""What lab 02 asks: guesses before figures, and questions with an answer to every option."""

from __future__ import annotations

from labkit.course.contents import Prediction, Quiz

PREDICTIONS = (
    Prediction("02.p1", "Tokens whose K and V a layer computes in 16 passes without a cache", "tokens", 1.05),
    Prediction("02.p2", "How much faster 200 new tokens are with the cache", "times", 1.3),
    Prediction("02.p3", "Prefill's tokens per second over decode's", "times", 1.5),
    Prediction("02.p4", "Tokens that a growing cache moves on the way to 200", "tokens", 1.1),
    Prediction("02.p5", "Tokens that a stateless server runs for each one that a stateful server runs", "times", 1.2),
    Prediction("02.p6", "Layers whose keys change when the first token changes", "layers", 1.0),
    Prediction("02.p7", "Tokens whose K and V, in bfloat16, fill 1 GB", "tokens", 1.1),
)  # fmt: skip

QUIZZES = (
    Quiz(
        "02.q1",
        "A model without a causal mask has read 40 tokens; one token is added behind them. Whose K and V are still "
        "right in layer 5?",
        {"a": "No token's", "b": "The first token's", "c": "All 40 tokens'", "d": "All but the 40th token's"},
        {"a": "Without the mask every hidden state above layer 0 reads the new token too. Nothing there can be kept.",
         "b": "With a causal mask the first token would see itself alone. Without it, it reads the new token as well.",
         "c": "That is what the causal mask gives. Without it old tokens read the new one.",
         "d": "Distance does not matter: without a mask each token reads all the others."},
        "a",
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
        "Generation with a cache, from one token: 2,000 new tokens in place of 1,000. All K and V that attention reads "
        "on the way, added up, become about",
        {"a": "twice as much", "b": "the same", "c": "eight times as much", "d": "four times as much"},
        {"a": "The projections double. But the later steps also read more than the earlier ones.",
         "b": "Each new step reads all that is held.",
         "c": "That is attention without a cache, where step i has i rows of i scores.",
         "d": "Step i reads i tokens, and 1 + 2 + ... + N still adds up quadratically."},
        "d",
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
        "A service writes the current time into line 2 of its long system prompt. For the next request, which tokens "
        "of a kept cache can it reuse?",
        {"a": "Those before the time", "b": "All but the time's own", "c": "Those behind the time", "d": "None"},
        {"a": "Only what stands before the first difference. At the end of the prompt, the time would cost little.",
         "b": "What stands behind the time has read it: above layer 0 those keys and values change too.",
         "c": "They read the time, so they must be run again, and so must the time.",
         "d": "Line 1 is the same in both requests, and nothing in it has read the time."},
        "a",
    ),
    Quiz(
        "02.q6",
        "A growing cache and a preallocated one hold the same 500 tokens. Which statement is true?",
        {"a": "The preallocated one takes less memory.", "b": "The growing one reads less in attention.",
         "c": "The growing one moves all it holds at each append; the other takes its capacity from the start.",
         "d": "They give different tokens."},
        {"a": "It takes its capacity, however few tokens it holds. That is the price.",
         "b": "Both hand attention the same 500 tokens.",
         "c": "Time against memory: quadratic copying against slack. Lab 06 removes the copies and most of the slack.",
         "d": "They hold the same numbers."},
        "c",
    ),
    Quiz(
        "02.q7",
        "From one prompt, 20 tokens are generated twice: with the likeliest token each time, and at temperature 1. How "
        "may the caches differ?",
        {"a": "In size", "b": "In the work that filled them", "c": "In dtype",
         "d": "In the numbers they hold, from the first token drawn otherwise"},
        {"a": "Size comes from shapes and the number of tokens.",
         "b": "One token a step is run either way.",
         "c": "dtype comes from the model's K and V.",
         "d": "Another token has other keys and values, and so has every token after it."},
        "d",
    ),
)  # fmt: skip
