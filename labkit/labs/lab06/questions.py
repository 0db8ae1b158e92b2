"""What lab 06 asks: guesses before figures, and questions with an answer to every option."""

from __future__ import annotations

from labkit.course.contents import Prediction, Quiz

PREDICTIONS = (
    Prediction("06.p1", "Share of the reserved memory that holds a token", "%", 1.15),
    Prediction("06.p2", "Prompt tokens that are run for eight requests with one beginning", "tokens", 1.05),
    Prediction("06.p3", "Requests at once in blocks of 16, over requests with room for 2,048 each", "times", 1.15),
    Prediction("06.p4", "The block size that costs least when a block costs as much as three slots", "tokens", 1.0),
)  # fmt: skip

QUIZZES = (
    Quiz(
        "06.q1",
        "A request holds 33 tokens in blocks of 16. How many slots of its blocks are empty?",
        {"a": "None: paging wastes nothing", "b": "15", "c": "8", "d": "16"},
        {"a": "The last block is taken whole when its first token comes. It holds one token of 16 here.",
         "b": "Three blocks are 48 slots; 33 hold a token.",
         "c": "That is the average over all lengths. This request is just past the end of a block.",
         "d": "A block without any token is not taken yet. At most block_size - 1 slots are empty."},
        "b",
    ),
    Quiz(
        "06.q2",
        "block_size is 16 and a row's table is [9, 4, 30]. In which slot lies the token at position 20?",
        {"a": "20", "b": "68", "c": "148", "d": "484"},
        {"a": "That is where it lies in a cache of this row alone. Here memory belongs to everybody.",
         "b": "20 // 16 = 1: block 4. 20 % 16 = 4: slot 4 * 16 + 4.",
         "c": "That is block 9, the row's first. Position 20 is past it.",
         "d": "That is block 30, the row's third: it holds positions 32 to 47."},
        "b",
    ),
    Quiz(
        "06.q3",
        "Operating systems page memory too. What corresponds to nothing in a paged KV cache as engines have it?",
        {"a": "The page table", "b": "Copy on write", "c": "Reading from disk when a page is touched that is not there",
         "d": "Pages shared by several processes"},
        {"a": "The block table: which block holds a request's n-th group of tokens.",
         "b": "A fork shares its blocks until one of the two writes.",
         "c": "A kernel cannot stop in the middle and wait for a page. Engines decide before a step what is there, and "
         "preempt a whole request when there is too little.",
         "d": "Requests with one beginning share its full blocks."},
        "c",
    ),
    Quiz(
        "06.q4",
        "A question of 48 tokens is asked a second time; blocks of 16, all three were found. How many tokens are run?",
        {"a": "None", "b": "1", "c": "16", "d": "48"},
        {"a": "Then there would be no logits: a cache holds K and V only.",
         "b": "Only the last is needed, but its K and V would be written into a block that others read. Blocks are "
         "reused whole.",
         "c": "Two blocks are reused. The last token has to be run, and with it its block.",
         "d": "32 of them have K and V in two full blocks."},
        "c",
    ),
    Quiz(
        "06.q5",
        "Two prompts of 64 tokens differ in their first token only. How much of one serves the other?",
        {"a": "All but the first block", "b": "Nothing", "c": "63 tokens", "d": "It depends on the salt"},
        {"a": "The tokens of later blocks are equal, their K and V are not: these come from everything before.",
         "b": "K and V depend on all tokens before them, so a block's key is that of everything up to its end.",
         "c": "Blocks are reused whole, and the first difference ends all reuse.",
         "d": "A salt can only forbid reuse. Here there is none to begin with."},
        "b",
    ),
    Quiz(
        "06.q6",
        "Why not blocks of one token, which waste nothing?",
        {"a": "The table would be larger than K and V.", "b": "Kernels would read single slots, and each block costs "
         "an entry, a hash and a lookup.", "c": "Nothing could be shared.", "d": "Slots would not fit into int32."},
        {"a": "An entry has 4 bytes, a token's K and V 46,080 in the lab model and more in larger ones.",
         "b": "Bookkeeping grows with the number of blocks, and reading pieces that are too short is slow. With 16 "
         "tokens there are a sixteenth of the blocks, and under 1% of the trace's slots stay empty.",
         "c": "More could: every common token instead of every full block of them.",
         "d": "There are as many slots as before, however they are grouped."},
        "b",
    ),
    Quiz(
        "06.q7",
        "One user, one short question, nobody waits. What does paging change?",
        {"a": "The answer comes sooner.", "b": "Less memory is read in each step.", "c": "Hardly anything: there is a "
         "lookup more.", "d": "The first token comes later by the time to copy the blocks."},
        {"a": "A step reads the same weights and the same K and V.",
         "b": "As many tokens are read. They lie elsewhere.",
         "c": "Memory that nobody else wants can as well be reserved. Paging pays when many requests share one memory.",
         "d": "Nothing is copied: K and V are written to their slots at once."},
        "c",
    ),
)  # fmt: skip
