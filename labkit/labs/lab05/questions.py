"""What lab 05 asks: guesses before figures, and questions with an answer to every option."""

from __future__ import annotations

from labkit.course.contents import Prediction, Quiz

PREDICTIONS = (
    Prediction("05.p1", "Error of the other numbers of a group with an outlier of 20, over that without", "times", 1.4),
    Prediction("05.p2", "float16 over 2 bits in groups of 32, scales and zero points counted", "times", 1.1),
    Prediction("05.p3", "Error of keys quantized per token, over that of keys quantized per channel", "times", 1.3),
    Prediction("05.p4", "Perplexity with a 2-bit cache, over the full cache's", "times", 1.15),
    Prediction("05.p5", "KL with values quantized per channel, over that with values per token", "times", 1.6),
)  # fmt: skip

QUIZZES = (
    Quiz(
        "05.q1",
        "A group of numbers from -3 to 4.5 is quantized to 4 bits. By how much can a number be wrong?",
        {"a": "0.5", "b": "0.25", "c": "About 0.23", "d": "0.03"},
        {"a": "That is the scale, 7.5 / 15: the distance of two levels. The nearest level is never that far away.",
         "b": "16 levels leave 15 steps: the scale is 7.5 / 15 = 0.5, and the nearest level at most half of it away.",
         "c": "That divides by 16. Sixteen levels have fifteen steps between them.",
         "d": "That is 8 bits: 255 steps."},
        "b",
    ),
    Quiz(
        "05.q2",
        "4 bits in groups of 32, scale and zero point of 16 bits each. How many times smaller than float16 is a long "
        "cache?",
        {"a": "4 times", "b": "3.6 times", "c": "3.2 times", "d": "2.7 times"},
        {"a": "That counts the codes only. Each group of 32 also keeps 32 bits.",
         "b": "That is a group of 64, or no zero point: 4.5 bits.",
         "c": "4 + 32 / 32 = 5 bits, and 16 / 5 = 3.2.",
         "d": "That is a scale and a zero point of 32 bits each: 6 bits."},
        "c",
    ),
    Quiz(
        "05.q3",
        "Why are keys quantized per channel?",
        {"a": "Else channels that are large in every token set everybody's scale.",
         "b": "Scores are computed one channel at a time.",
         "c": "Then a new token can be quantized as soon as it comes.",
         "d": "Groups along tokens need fewer scales."},
        {"a": "In a group of its own a large channel spoils nobody, and its large mean goes into the zero point.",
         "b": "A score sums over channels, whichever way the groups lie.",
         "c": "The opposite: a channel's group needs as many tokens as it is long, so new tokens have to wait.",
         "d": "One scale for each group_size numbers, whichever way they lie."},
        "a",
    ),
    Quiz(
        "05.q4",
        "With an engine's new 4-bit cache answers change a little, and as many tokens fit as before. What is "
        "likeliest?",
        {"a": "4 bits are rounded up to a byte.", "b": "The scales take the rest.",
         "c": "Weights were quantized by mistake.", "d": "Numbers are rounded and stored as float16 again."},
        {"a": "With a byte a code, still twice as many would fit.",
         "b": "A scale and a zero point per 64 numbers are half a bit a number.",
         "c": "That would leave more room, and more tokens would fit.",
         "d": "Fake quantization: the error is real, the codes are never kept. Ask for bytes per token."},
        "d",
    ),
    Quiz(
        "05.q5",
        "A new way to group values lowers their reconstruction error by 10%. What does that say about the answers?",
        {"a": "They are at least 10% closer to the full cache's.", "b": "Nothing yet: measure KL or perplexity, in "
         "chunks.", "c": "They are closer, if keys stayed as they were.", "d": "Nothing: values do not matter."},
        {"a": "Section 5 has such a way, and its KL is more than twice as large.",
         "b": "It matters which numbers are wrong. Attention weighs tokens, and the error does not.",
         "c": "They did stay, in section 5, and KL rose all the same.",
         "d": "Spoiling values alone more than doubled KL."},
        "b",
    ),
    Quiz(
        "05.q6",
        "One forward pass over a text gives a 2-bit cache the full cache's perplexity, to six digits. Why?",
        {"a": "The text is too short for errors to add up.", "b": "The residual window held the text.",
         "c": "Perplexity is blind to small errors.", "d": "The pass never read a quantized number."},
        {"a": "Errors need no time to add up: read back after 32 tokens, 2 bits show.",
         "b": "It would, for a few dozen tokens. Here the text was longer.",
         "c": "In parts of 32 the same cache has a clearly worse one.",
         "d": "The cache was empty when the pass began, and attention saw K and V as they were computed."},
        "d",
    ),
    Quiz(
        "05.q7",
        "One user, a chat of 300 tokens with Qwen2.5-7B: a 4-bit cache replaces float16. How much less does a decode "
        "step read?",
        {"a": "Under 1%", "b": "About 28%", "c": "About 72%", "d": "A quarter"},
        {"a": "15 GB of weights are read either way; the cache is 0.02 GB. 4 bits pay where many tokens are held.",
         "b": "That is what is left of the cache, 4.5 / 16. The step also reads the weights.",
         "c": "The cache shrinks by that. Put it beside 15 GB of weights.",
         "d": "That would take some 140,000 tokens held."},
        "a",
    ),
)  # fmt: skip
