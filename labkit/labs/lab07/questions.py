"""What lab 07 asks: guesses before figures, and questions with an answer to every option."""

from __future__ import annotations

from labkit.course.contents import Prediction, Quiz

PREDICTIONS = (
    Prediction("07.p1", "Share of all attention that the first token gets", "%", 1.25),
    Prediction("07.p2", "Perplexity once the first token has left the window, over the full cache's", "times", 1.25),
    Prediction("07.p3", "Tokens right of a number that is asked for when three quarters are gone, SnapKV", "%", 1.5),
)

QUIZZES = (
    Quiz(
        "07.q1",
        "A window of 256 tokens with 4 sinks has seen 1,000 tokens. Which positions does it hold?",
        {"a": "744 to 999", "b": "0 to 3 and 744 to 999", "c": "0 to 3 and 748 to 999", "d": "4 to 259"},
        {"a": "That is a window without sinks: the first token has left, and with it the model's resting place.",
         "b": "Those are 260 tokens. The budget counts the sinks.",
         "c": "4 sinks and the newest 252: 256 in all.",
         "d": "Those are the oldest after the sinks. A window keeps the newest."},
        "c",
    ),
    Quiz(
        "07.q2",
        "Why does perplexity jump when the first token leaves, though it says nothing?",
        {"a": "The model forgets the topic.", "b": "The positions held have a gap.",
         "c": "A softmax must put its weight somewhere; heads that want nothing look at the first token.",
         "d": "The mask is wrong from then on."},
        {"a": "The topic is spread over the text. One meaningless first token is enough to bring perplexity back.",
         "b": "It is with the sink kept that they have a gap, behind it, and all is well.",
         "c": "Without it the weight falls on tokens that do say something, and their values are mixed in.",
         "d": "The mask is right: the tokens held are all older than the query."},
        "c",
    ),
    Quiz(
        "07.q3",
        "A cache with a budget of 512 has seen 8,000 tokens. Which position does the next token get?",
        {"a": "511", "b": "512", "c": "7,999", "d": "8,000"},
        {"a": "That is the last slot, not a position.",
         "b": "That is the physical length. The keys that are held were turned to positions up to 7,999: the new query "
         "would stand before most of them.",
         "c": "That is the newest token seen.",
         "d": "Tokens seen, not tokens held. (Where keys are turned to their places, it is place 511.)"},
        "d",
    ),
    Quiz(
        "07.q4",
        "Three query heads share a KV head. Two need a token, one does not. What can a cache do?",
        {"a": "Keep it for two of them", "b": "Keep or drop it for all three", "c": "Keep a third of it",
         "d": "Keep it in another layer"},
        {"a": "There is only one key and one value for the three.",
         "b": "So their scores are joined first: by the mean here, by the maximum or the sum elsewhere.",
         "c": "A mean of tokens can be kept in place of several: that is merging, and changes what all three read.",
         "d": "Each layer has its own K and V."},
        "b",
    ),
    Quiz(
        "07.q5",
        "A document is read once, the cache cut to a quarter, and then users ask about it. Which policy?",
        {"a": "SnapKV: it is best at a quarter", "b": "None can be relied on: keep the document",
         "c": "A window with sinks", "d": "Random"},
        {"a": "It keeps what the last queries look at. When it decides, no question is there.",
         "b": "What will be asked for cannot be seen in attention that has not happened yet. Fewer bits keep it all.",
         "c": "It keeps the end of the document and forgets the rest.",
         "d": "It keeps each token with a chance of one quarter: a number of four tokens hardly ever whole."},
        "b",
    ),
    Quiz(
        "07.q6",
        "What does keeping a mask over dropped tokens save, when they stay in memory?",
        {"a": "Bytes", "b": "Bytes read in each step", "c": "Nothing, and the mask costs",
         "d": "Half of both"},
        {"a": "They are all there.", "b": "Attention reads K before it masks.",
         "c": "It shows what eviction does to answers. Memory and time are saved by letting go.",
         "d": "Neither is saved."},
        "c",
    ),
    Quiz(
        "07.q7",
        "4 bits keep every token in a quarter of 16 bits' bytes, eviction a quarter of the tokens in 16 bits. What can "
        "only eviction do?",
        {"a": "Save bytes in each step", "b": "Go on for ever in the same memory", "c": "Keep facts",
         "d": "Serve small models"},
        {"a": "Both do, and by as much.",
         "b": "A budget holds however long the text grows; four bits a number still grow with it.",
         "c": "4 bits keep them: lab 05 asked for them.",
         "d": "The smaller the model, the more both hurt."},
        "b",
    ),
)  # fmt: skip
