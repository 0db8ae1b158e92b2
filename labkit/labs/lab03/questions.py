"""What lab 03 asks: guesses before figures, and questions with an answer to every option."""

from __future__ import annotations

from labkit.course.contents import Prediction, Quiz

PREDICTIONS = (
    Prediction("03.p1", "Bytes that one token adds to the cache of Llama 3.1 70B in float16", "bytes", 1.05),
    Prediction("03.p2", "GiB that the weights of Qwen2.5-7B take at two bytes each", "GiB", 1.05),
    Prediction("03.p3", "Requests of 8K tokens that fit on one 80 GB GPU beside Qwen2.5-7B", "requests", 1.15),
    Prediction("03.p4", "A step of 32 users with 8K tokens each, over a step of one such user", "times", 1.2),
    Prediction("03.p5", "Operations per byte of a decode step of one user, 16-bit weights, short context",
               "operations per byte", 1.3),
    Prediction("03.p6", "A 20-call conversation without prompt caching, over the same with it", "times", 1.25),
    Prediction("03.p7", "A request with a thought of 10,000 tokens, over one with an answer of 300", "times", 1.3),
    Prediction("03.p8", "GB that a GPU must have for Qwen2.5-7B and 20 users of 16K tokens", "GB", 1.1),
)  # fmt: skip

QUIZZES = (
    Quiz(
        "03.q1",
        "40 layers, 40 query heads, 10 KV heads, head_dim 128; K and V go from float16 to float8, without scales. How "
        "many bytes does a token add then?",
        {"a": "51,200", "b": "102,400", "c": "204,800", "d": "409,600"},
        {"a": "That is K alone. V is kept as well.",
         "b": "2 x 40 layers x 10 KV heads x 128 x 1 byte.",
         "c": "That is the figure for 16 bits.",
         "d": "That counts the 40 query heads. Queries are not kept."},
        "b",
    ),
    Quiz(
        "03.q2",
        "A text gives 40 GB for 128K tokens of Llama 3 70B; 131,072 x 327,680 bytes are 42.9 GB. What happened?",
        {"a": "It left out one layer in sixteen.", "b": "Its cache was quantized.",
         "c": "It counted in GiB and wrote GB.", "d": "It took 128,000 for 128K."},
        {"a": "All 80 are in: 80 x 4,096 bytes are 327,680.",
         "b": "8 bits would halve the figure; 7% less is no quantization.",
         "c": "40 x 2**30 bytes are 42.9 x 10**9: 7% at this size. A 40 GB GPU is short of it either way.",
         "d": "128,000 tokens are 41.9 GB, and 39.1 GiB: neither is 40."},
        "c",
    ),
    Quiz(
        "03.q3",
        "One 80 GB GPU holds Qwen2.5-7B and 31 users of 32K tokens, all in 16 bits. Which change lets the most users "
        "in?",
        {"a": "Weights from 16 to 8 bits", "b": "K and V from float16 to int8", "c": "A tenth more memory",
         "d": "A tenth more bandwidth"},
        {"a": "It frees 7 GiB, once: room for three more. The cache of all users is the larger part here.",
         "b": "Every request becomes little more than half as large, at 8.5 bits a number with scales and zero points: "
              "59 fit.",
         "c": "All 8 GiB go to the cache, less the reserve: room for four more.",
         "d": "Bandwidth makes steps shorter. It holds nobody's tokens."},
        "b",
    ),
    Quiz(
        "03.q4",
        "Decode of 8 users with short contexts waits for memory. What does a ninth do to a step's time?",
        {"a": "One eighth more", "b": "Almost nothing", "c": "It halves it", "d": "It doubles it"},
        {"a": "That would be so if each user needed a reading of the weights of their own.",
         "b": "The weights are read once for all nine; only a short K and V come on top.",
         "c": "More work is never less time. It is the time per token, over all users, that falls.",
         "d": "Nothing here doubles: one more user of nine, and the weights are shared."},
        "b",
    ),
    Quiz(
        "03.q5",
        "At a context of 100,000 tokens, more and more users join a batch. Where does the intensity of decode go?",
        {"a": "Up, without end", "b": "To nothing", "c": "To the device's ridge",
         "d": "To a level that model and context set"},
        {"a": "Only the weights are shared. Each user brings K and V, and the operations for them.",
         "b": "Operations and bytes both grow; their ratio settles.",
         "c": "The ridge belongs to the device. The model and its context know nothing of it.",
         "d": "Once K and V outweigh the weights, each user adds operations and bytes in one ratio, for Qwen2.5-7B "
              "9.5 operations per byte: batching is used up."},
        "d",
    ),
    Quiz(
        "03.q6",
        "Reading cached input costs a tenth. When is the saving on a whole bill far from 90%?",
        {"a": "When answers are long, or calls few", "b": "When the prefix is long",
         "c": "When there are many calls", "d": "When messages are short"},
        {"a": "Answers have the output price, cached or not, and a first call finds nothing in the cache.",
         "b": "A long prefix, sent again and again, is what caching is best at.",
         "c": "The more calls, the more of what is sent was sent before.",
         "d": "Short messages add little new input, so most of it is cached."},
        "a",
    ),
    Quiz(
        "03.q7",
        "A floor says 4.2 ms per token; a benchmark on that device measured 476 ms. What follows?",
        {"a": "The floor is wrong by a factor of 100.", "b": "Memory bandwidth is the bottleneck there.",
         "c": "The batch was too large.", "d": "Something other than reading memory takes the time."},
        {"a": "A floor is what no run can beat. That one is slower says nothing against it.",
         "b": "Reading all the bytes takes 4.2 ms. What takes the other 472 is something else.",
         "c": "More users make a step longer, but 100 times would need a cache of 100 times the weights.",
         "d": "At 1% of the bandwidth the device mostly waits: for calls, copies, or a model that is not all on it."},
        "d",
    ),
)  # fmt: skip
