"""One side of a comparison: an engine in a process of its own, driven by JSON lines.

Started by ``vllm_ext.bench.decode``; arguments: a JSON object with ``model``,
``attention_backend`` (or null), ``max_model_len``, ``batch`` and ``kv_bytes``.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

MARK = "@@vllm-ext-bench "


def serve(options: dict[str, Any]) -> None:
    """Answers requests from standard input until it closes.

    A request is ``{"prompts": [[token ids]], "max_tokens": n}``; the answer, one marked
    line on standard output, is ``{"seconds": wall time, "tokens": generated in all}``.
    """
    from vllm import LLM, SamplingParams

    backend = {"attention_backend": options["attention_backend"]}
    llm = LLM(
        model=options["model"],
        max_model_len=options["max_model_len"],
        max_num_seqs=options["batch"],
        kv_cache_memory_bytes=options["kv_bytes"],
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        additional_config=options["additional_config"],
        seed=0,
        **(backend if options["attention_backend"] else {}),
    )
    print(MARK + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        params = SamplingParams(
            temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(MARK + json.dumps({"seconds": seconds, "tokens": num_tokens}), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
