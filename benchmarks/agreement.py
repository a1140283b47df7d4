"""An executor against transformers on the same checkpoint: logits, top-1 and greedy text.

    python benchmarks/agreement.py NAME MODEL TEXT [--positions 8192] [--context 1024]
        [--backend torch] [--dtype fp32]

The text is cut into windows of --context tokens, both sides compute every position's logits, and
the top-1 tokens are compared; then both continue prompts from the text greedily. transformers runs
in fp32 with plain ("eager") attention. Writes results/agreement-NAME.json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from kbit.checkpoint.reader import open_checkpoint
from kbit.engine.executor import Executor, load_executor
from kbit.engine.tokenizer import Tokenizer
from record import save

PROMPT_TOKENS = 24


@torch.no_grad()
def compare(executor: Executor, peer: Any, windows: list[np.ndarray]) -> dict[str, Any]:
    """Top-1 agreement and the largest difference of logits, over every position of the windows."""
    agreed, worst, gaps = 0, 0.0, []
    for window in windows:
        expected = peer(torch.from_numpy(window)[None]).logits[0].numpy()
        cache = executor.new_cache(1, len(window))
        found = executor.forward([window], cache, all_logits=True)[0]
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
        same = found.argmax(-1) == expected.argmax(-1)
        agreed += int(same.sum())
        for position in np.flatnonzero(~same):
            top = np.sort(expected[position])[-2:]
            gaps.append(float(top[1] - top[0]))
    positions = sum(map(len, windows))
    return {
        "positions": positions,
        "top1_agreement": agreed / positions,
        "top1_disagreements": positions - agreed,
        "peer_margin_where_disagreeing_max": max(gaps, default=0.0),
        "largest_difference_over_largest_logit": worst,
    }


def continuation(executor: Executor, prompt: np.ndarray, tokens: int) -> list[int]:
    """Greedy token ids through the cache, one at a time."""
    cache = executor.new_cache(1, len(prompt) + tokens)
    piece, result = prompt, []
    for _ in range(tokens):
        logits = executor.forward([piece], cache)[0]
        result.append(int(logits.argmax()))
        piece = np.array(result[-1:])
    return result


@torch.no_grad()
def peer_continuation(peer: Any, prompt: np.ndarray, tokens: int) -> list[int]:
    """The same with transformers' cache."""
    past, piece, result = None, torch.from_numpy(prompt)[None], []
    for _ in range(tokens):
        out = peer(piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        result.append(int(out.logits[0, -1].argmax()))
        piece = torch.tensor([result[-1:]])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens a prompt")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.model)
    executor = load_executor(checkpoint, args.backend, dtype=args.dtype)
    ids = Tokenizer.load(args.model, checkpoint.config).encode(args.text.read_text("utf-8"))
    count = min(args.positions, len(ids)) // args.context
    windows = list(ids[: count * args.context].reshape(count, args.context))
    peer = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    result = compare(executor, peer, windows)
    prompts = [windows[i % count][:PROMPT_TOKENS] for i in range(args.prompts)]
    texts = [
        (continuation(executor, p, args.tokens), peer_continuation(peer, p, args.tokens))
        for p in prompts
    ]
    result["greedy_prompts"] = len(texts)
    result["greedy_tokens_each"] = args.tokens
    result["greedy_texts_equal"] = sum(ours == theirs for ours, theirs in texts)
    print(result)
    command = (
        f"python benchmarks/agreement.py {args.name} MODEL {args.text.name} "
        f"--positions {args.positions} --context {args.context} --prompts {args.prompts} "
        f"--tokens {args.tokens} --backend {args.backend} --dtype {args.dtype}"
    )
    save(f"agreement-{args.name}", command, {"model": args.model.name, **result})


if __name__ == "__main__":
    main()
