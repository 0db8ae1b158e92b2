"""What lab 04 asks: guesses before figures, and questions with an answer to every option."""

from __future__ import annotations

from labkit.course.contents import Prediction, Quiz

PREDICTIONS = (
    Prediction("04.p1", "Bytes a decode step moves with K and V repeated, over grouped attention's", "times", 1.2),
    Prediction("04.p2", "Time of a decode step with K and V repeated, over that of MHA", "times", 1.5),
    Prediction("04.p3", "What Llama 3 70B keeps per token, over what DeepSeek-V3 keeps", "times", 1.2),
    Prediction("04.p4", "Perplexity of the lab model with its KV heads merged, over the original's", "times", 3.0),
    Prediction("04.p5", "Cache of Qwen3 30B-A3B on 16 GPUs together, over that on one", "times", 1.05),
)  # fmt: skip

QUIZZES = (
    Quiz(
        "04.q1",
        "A model has 32 query heads and 8 KV heads. Which KV head does query head 13 read?",
        {"a": "KV head 1", "b": "KV head 5", "c": "KV head 3", "d": "KV head 4"},
        {"a": "That is 13 // 8. Divide by the query heads per KV head, 32 / 8 = 4.",
         "b": "That is 13 % 8, the order that `repeat` makes. Trained weights expect neighbours to share.",
         "c": "13 // 4. Query heads 12 to 15 share it.",
         "d": "4 is num_queries_per_kv. Head 13 stands in the fourth group, and counting starts at 0."},
        "c",
    ),
    Quiz(
        "04.q2",
        "A team replaces MHA by GQA with 8 KV heads for 64 query heads. The cache is an eighth, and decoding became "
        "slower. What is the likeliest cause?",
        {"a": "K and V are repeated to 64 heads at each step.", "b": "Eight KV heads make more attention scores.",
         "c": "The K and V projections became larger.", "d": "The smaller cache is read more often per step."},
        {"a": "Each step then copies all that is held, eight times as large, and reads the copy: 17 times the cache's "
              "bytes in place of MHA's 8.",
         "b": "Scores are counted per query head, and their number did not change.",
         "c": "They shrank with the number of KV heads.",
         "d": "Once per step, like any cache, unless somebody expands it first."},
        "a",
    ),
    Quiz(
        "04.q3",
        "A prompt of 8,000 tokens is prefilled. MHA is replaced by GQA with a quarter of the KV heads. Attention "
        "computes how many scores, compared with before?",
        {"a": "A quarter", "b": "A sixteenth", "c": "Four times as many", "d": "As many"},
        {"a": "A quarter of the keys are kept. Each of them meets four times as many queries.",
         "b": "Neither the queries nor the tokens became fewer.",
         "c": "Sharing keys adds no queries.",
         "d": "Every query head still meets every key it may see. Projections and bytes shrink, scores do not."},
        "d",
    ),
    Quiz(
        "04.q4",
        "DeepSeek-V3 runs on 8 GPUs, its heads divided among them. How much of one request's cache does each GPU "
        "keep?",
        {"a": "An eighth", "b": "All of it", "c": "A half", "d": "None of it"},
        {"a": "Heads are what is divided here, and one vector per token serves all 128 of them.",
         "b": "Every head needs the whole vector, so every GPU keeps it: 8 copies, unless it is divided by requests or "
              "tokens instead.",
         "c": "There are no two parts, one for K and one for V: both come from one vector.",
         "d": "Its heads attend to all tokens; they must read them somewhere."},
        "b",
    ),
    Quiz(
        "04.q5",
        "Three KV heads of a trained model are averaged into one and it talks nonsense. Why do models with one KV head "
        "work all the same?",
        {"a": "They have wider heads.", "b": "They add up heads in place of averaging.",
         "c": "They were trained with it.", "d": "They use several caches."},
        {"a": "PaLM's are wider, Falcon 7B's are not, and both work.",
         "b": "A sum is a mean times three: another scale, the same mixture. Section 4 tried a scale: still ruined.",
         "c": "All query heads learned to ask one set of keys. Here they ask keys that no longer exist.",
         "d": "They have one, and it is small. That was the purpose."},
        "c",
    ),
    Quiz(
        "04.q6",
        "A model with 8 KV heads moves from 8 GPUs to 32. What happens to the cache of one request on each GPU?",
        {"a": "It falls to a quarter.", "b": "It stays as it is.", "c": "It falls to a half.",
         "d": "It grows fourfold."},
        {"a": "For that a GPU would have to keep a quarter of a head.",
         "b": "One head is the least a GPU can keep, so four GPUs keep the same one.",
         "c": "A GPU with one head of K and V cannot go below it.",
         "d": "All GPUs together keep four times as much. Each keeps one head, as before."},
        "b",
    ),
    Quiz(
        "04.q7",
        "A chat of 300 tokens with Qwen2.5-7B, one user. With MHA, how many more bytes would its decode step read?",
        {"a": "Under 1% more", "b": "About 9% more", "c": "Seven times as many", "d": "Half as many again"},
        {"a": "The cache alone: 0.12 GB in place of 0.02 GB, beside 15 GB of weights. But MHA's projections of K and V "
              "are larger as well.",
         "b": "1.23 GB of larger projections and 0.10 GB of cache, beside 15 GB: the cache is the lesser part.",
         "c": "Only if the step read nothing but K and V. It reads 15 GB of weights.",
         "d": "That would take some 20,000 tokens, or as many over several users."},
        "b",
    ),
)  # fmt: skip
