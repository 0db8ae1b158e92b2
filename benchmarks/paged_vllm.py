"""vLLM's side of `benchmarks.paged`: run by the Python of vLLM's own environment, it imports nothing of labkit.

    python -P paged_vllm.py MODEL_FOLDER DTYPE MAX_NEW_TOKENS KV_BYTES

Its batch API, without a server and HTTP between: the most that vLLM gives. Reads one line of JSON after another, a list
of prompts of token ids each, and answers each with one line that begins with `MARK`: {"seconds", "answers"}. Prefix
caching is off: a prompt that comes again is computed again. Blocks of 128 tokens are vLLM's default on a CPU.
"""

from __future__ import annotations

import json
import sys
import time

MARK = "labkit-answer "


def main() -> None:
    """Load the model, then serve."""
    from vllm import LLM, SamplingParams

    folder, dtype, count, kv_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    llm = LLM(
        folder, dtype=dtype, enforce_eager=True, block_size=128, max_model_len=1024, enable_prefix_caching=False,
        kv_cache_memory_bytes=kv_bytes, disable_log_stats=True,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": prompt} for prompt in json.loads(line)]
        start = time.perf_counter()
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        seconds = time.perf_counter() - start
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        print(MARK + json.dumps({"seconds": seconds, "answers": answers}), flush=True)


if __name__ == "__main__":
    main()
