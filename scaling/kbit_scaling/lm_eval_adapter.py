"""lm-evaluation-harness over a kbit model (extra `lm-eval`).

from kbit_scaling.lm_eval_adapter import KbitLM
lm_eval.simple_evaluate(model=KbitLM("MODEL"), tasks=["piqa"])
"""

from __future__ import annotations

from typing import Any

from kbit.errors import KbitError

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
except ImportError as error:
    raise KbitError(
        "lm-evaluation-harness is not installed; install it with: pip install 'kbit[lm-eval]'"
    ) from error

import kbit
from kbit.evaluate.protocols import protocol, windows
from kbit.evaluate.score import score_windows

from .tasks import log_likelihoods


class KbitLM(LM):
    """A model of `kbit.load` as the harness' LM."""

    def __init__(self, model: str, **options: Any) -> None:
        """options: those of `kbit.load`, such as backend and device."""
        super().__init__()
        self.model = kbit.load(model, **options)

    def loglikelihood(self, requests: list[Instance], **unused: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy continuation) of each request."""
        scored = log_likelihoods(
            self.model.executor, self.model.tokenizer, [request.args for request in requests]
        )
        return [(s.log_likelihood, s.greedy) for s in scored]

    def loglikelihood_rolling(self, requests: list[Instance], **unused: Any) -> list[float]:
        """Log-likelihood of each whole text, in disjoint windows of the model's context that each
        begin with one token of the one before (the first with BOS or EOS)."""
        longest = self.model.executor.decoder.max_positions
        chosen = protocol("lm-eval", text="verbatim", context=longest).resolved(longest)
        found = []
        for request in requests:
            cut = windows(request.args[0], self.model.tokenizer, chosen)
            scores = score_windows(self.model.executor, cut)
            found.append(float(sum(s.log_likelihoods.sum() for s in scores)))
        return found

    def generate_until(self, requests: list[Instance], **unused: Any) -> list[str]:
        """Greedy (or as the request says) continuations, cut at the stop strings."""
        found = []
        for request in requests:
            prompt, settings = request.args
            stop = settings.get("until") or []
            temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
            [completion] = self.model.generate(
                prompt,
                max_tokens=int(settings.get("max_gen_toks", 256)),
                temperature=float(temperature),
                stop=[stop] if isinstance(stop, str) else list(stop),
            )
            found.append(completion.text)
        return found
