"""Typed, refusing reading of a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar, overload

from kbit.errors import KbitError
from kbit.models.base import ACTIVATIONS, Activation
from kbit.models.rotary import Rotary

T = TypeVar("T", int, float, bool, str, list, dict)
_REQUIRED: Any = object()

MOST_ENTRIES = 2**31 - 1  # of a dimension: more fits neither a token id nor a safetensors file
MOST_PARTS = 2**14  # layers, heads: a damaged config should not fill the memory

# Options without influence on the logits of a pretrained decoder.
HARMLESS = frozenset(
    (
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "auto_map",
        "bad_words_ids",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dropout",
        "dtype",
        "embd_pdrop",
        "embedding_dropout",
        "eos_token_id",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "init_std",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "layerdrop",
        "max_length",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "pad_token_id",
        "prefix",
        "predict_special_tokens",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "reorder_and_upcast_attn",
        "resid_pdrop",
        "return_dict",
        "sep_token_id",
        "slow_but_exact",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    )
)


class Config:
    """A config.json that remembers which options were read; `finish` refuses the others."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where
        self._read: set[str] = set()

    @overload
    def get(self, key: str | tuple[str, ...], kind: type[T]) -> T: ...
    @overload
    def get(self, key: str | tuple[str, ...], kind: type[T], default: T) -> T: ...
    @overload
    def get(self, key: str | tuple[str, ...], kind: type[T], default: None) -> T | None: ...

    def get(self, key: str | tuple[str, ...], kind: type[T], default: Any = _REQUIRED) -> T | None:
        """The option `key` (or the first present of several names) as `kind`.

        null counts as absent. Raises KbitError when it is required and absent, or of another type
        (an int passes for a float, nothing else is converted).
        """
        keys = (key,) if isinstance(key, str) else key
        self._read.update(keys)
        name = next((k for k in keys if self._values.get(k) is not None), None)
        if name is None:
            if default is _REQUIRED:
                raise KbitError(f"{self.where} lacks the option {keys[0]!r}")
            return default
        value = self._values[name]
        right = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            raise KbitError(
                f"{self.where}: the option {name!r} should be of type {kind.__name__}, "
                f"found {value!r}"
            )
        return kind(value)

    def size(
        self,
        key: str | tuple[str, ...],
        default: int | None = _REQUIRED,
        *,
        most: int = MOST_ENTRIES,
    ) -> int:
        """A required (unless defaulted) integer from 1 to `most`."""
        value = self.get(key, int, default)
        if value is None or not 1 <= value <= most:
            name = key if isinstance(key, str) else key[0]
            raise KbitError(
                f"{self.where}: the option {name!r} should be from 1 to {most}, is {value}"
            )
        return value

    @overload
    def positive(self, key: str | tuple[str, ...], default: float = _REQUIRED) -> float: ...
    @overload
    def positive(self, key: str | tuple[str, ...], default: None) -> float | None: ...

    def positive(
        self, key: str | tuple[str, ...], default: float | None = _REQUIRED
    ) -> float | None:
        """A finite number above 0; the default when absent."""
        value = self.get(key, float, default)
        if value is not None and not 0 < value < math.inf:
            name = key if isinstance(key, str) else key[0]
            raise KbitError(
                f"{self.where}: the option {name!r} should be a number above 0, is {value}"
            )
        return value

    def expect(self, key: str, default: Any, *allowed: Any) -> None:
        """Refuse any value of `key` but `default` (taken when absent) or one of `allowed`."""
        self._read.add(key)
        value = self._values.get(key)
        known = (default, *allowed)
        if value is not None and value not in known:
            names = ", ".join(repr(v) for v in known)
            raise KbitError(
                f"{self.where}: {key} = {value!r} is not supported (supported: {names})"
            )

    def ignore(self, *keys: str) -> None:
        """Options of this architecture that don't touch the logits."""
        self._read.update(keys)

    def has(self, key: str) -> bool:
        """Whether the option is there and not null."""
        return self._values.get(key) is not None

    def given(self, key: str) -> bool:
        """Whether the option is there at all: some architectures tell null from absent."""
        return key in self._values

    def split(self, hidden: int, heads: int) -> int:
        """The size of a head where heads share the hidden size evenly; refuses uneven ones."""
        if hidden % heads:
            raise KbitError(
                f"{self.where}: a hidden size of {hidden} is no multiple of {heads} heads"
            )
        return hidden // heads

    def activation(self, key: str, default: str) -> Activation:
        """The activation function named by `key`; refuses one that kbit doesn't have."""
        return ACTIVATIONS[self.choice(key, default, ACTIVATIONS)]

    def choice(self, key: str, default: str, known: Collection[str]) -> str:
        """A string that must be one of `known`."""
        value = self.get(key, str, default)
        if value not in known:
            names = ", ".join(sorted(known))
            raise KbitError(f"{self.where}: {key} = {value!r} is not supported (known: {names})")
        return value

    def windows(self, layers: int, window: int | None, default: list[str]) -> list[int | None]:
        """The window of each layer by `layer_types`, or by `default` where the option is absent."""
        kinds = self.get("layer_types", list, default)
        known = ("full_attention", "sliding_attention")
        for kind in kinds:
            if kind not in known:
                raise KbitError(
                    f"{self.where}: layer_types has {kind!r}, which is not supported "
                    f"(known: {', '.join(known)})"
                )
        if len(kinds) != layers:
            raise KbitError(
                f"{self.where}: layer_types lists {len(kinds)} layers, the model has {layers}"
            )
        if "sliding_attention" in kinds and not 1 <= (window or 0) <= MOST_ENTRIES:
            raise KbitError(f"{self.where}: sliding layers need sliding_window, found {window}")
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def rotary(
        self,
        head_dim: int,
        *,
        theta: float = 10_000.0,
        theta_key: str | tuple[str, ...] = "rope_theta",
        fraction: float = 1.0,
        fraction_key: str | tuple[str, ...] = "partial_rotary_factor",
    ) -> Rotary:
        """Rotary positions from `rope_parameters` (transformers 5), or `rope_scaling` and
        `rope_theta` beside it (before); `theta` and `fraction` are the architecture's defaults."""
        options = self.get("rope_scaling", dict, None) or self.get("rope_parameters", dict, {})
        self.ignore("rope_parameters")
        theta = self.positive(theta_key, theta)
        fraction = self.positive(fraction_key, fraction)
        return self.rotary_of(options, head_dim, theta, fraction)

    def rotary_of(
        self, options: Mapping[str, Any], head_dim: int, theta: float, fraction: float = 1.0
    ) -> Rotary:
        """Rotary positions from one dictionary of `rope_parameters`."""
        longest = self.size("max_position_embeddings")
        outer = None
        if self.given("original_max_position_embeddings"):
            outer = self.size("original_max_position_embeddings", longest)
        rope = Config(options, f"{self.where}: rope_parameters")
        kinds = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")
        kind = rope.choice("rope_type" if rope.has("rope_type") else "type", "default", kinds)
        rope.ignore("type", "rope_type")
        theta = rope.positive("rope_theta", theta)
        dim = int(head_dim * rope.positive("partial_rotary_factor", fraction))
        if dim < 2 or dim % 2 or dim > head_dim:
            raise KbitError(
                f"{self.where}: rotary positions on {dim} of {head_dim} entries of a head are "
                "not supported (it should be an even number)"
            )
        trained = longest
        if kind in ("llama3", "yarn", "longrope", "su"):
            trained = outer or rope.size("original_max_position_embeddings", longest)
        rope.ignore("original_max_position_embeddings")
        result = _scaled(rope, kind, dim, theta, trained, longest)
        rope.finish()
        return result

    def finish(self) -> None:
        """Refuse options that nobody read: one of them may change what the model computes.

        Null options, private ones (beginning with an underscore) and HARMLESS ones pass.
        """
        unknown = [
            key
            for key, value in self._values.items()
            if key not in self._read
            and key not in HARMLESS
            and value is not None
            and not key.startswith("_")
        ]
        if unknown:
            known = ", ".join(sorted(self._read))
            raise KbitError(
                f"{self.where}: the option {unknown[0]!r} = {self._values[unknown[0]]!r} is not "
                f"known to kbit and may change the model (known: {known})"
            )


def _scaled(rope: Config, kind: str, dim: int, theta: float, trained: int, longest: int) -> Rotary:
    """The scaling `kind`, with the defaults of the papers where config.json leaves them out."""
    match kind:
        case "linear":
            return Rotary(dim, theta, "linear", rope.positive("factor"))
        case "dynamic":
            return Rotary(dim, theta, "dynamic", rope.positive("factor"), trained)
        case "llama3":
            low = rope.positive("low_freq_factor")
            high = rope.positive("high_freq_factor")
            factor = rope.positive("factor")
            return Rotary(
                dim, theta, "llama3", factor, trained, low_frequency=low, high_frequency=high
            )
        case "yarn":
            factor = rope.positive("factor", longest / trained)
            wide = rope.get("mscale", float, 0.0)
            all_dim = rope.get("mscale_all_dim", float, 0.0)
            magnitude = _yarn_magnitude(factor, 1.0)
            if wide and all_dim:
                magnitude = _yarn_magnitude(factor, wide) / _yarn_magnitude(factor, all_dim)
            return Rotary(
                dim,
                theta,
                "yarn",
                factor,
                trained,
                magnitude=rope.positive("attention_factor", magnitude),
                beta_fast=rope.positive("beta_fast", 32.0),
                beta_slow=rope.positive("beta_slow", 1.0),
                truncate=rope.get("truncate", bool, True),
            )
        case "longrope" | "su":
            factor = rope.positive("factor", longest / trained)
            stretch = 1 + math.log(factor) / math.log(trained) if factor > 1 else 1.0
            short, long = rope.get("short_factor", list), rope.get("long_factor", list)
            for name, factors in (("short_factor", short), ("long_factor", long)):
                numbers = all(isinstance(f, int | float) and 0 < f < math.inf for f in factors)
                if len(factors) != dim // 2 or not numbers:
                    raise KbitError(
                        f"{rope.where}: {name} should be {dim // 2} numbers above 0, "
                        f"has {len(factors)} entries"
                    )
            return Rotary(
                dim,
                theta,
                "longrope",
                factor,
                trained,
                magnitude=rope.positive("attention_factor", math.sqrt(stretch)),
                short_factors=tuple(float(f) for f in short),
                long_factors=tuple(float(f) for f in long),
            )
    return Rotary(dim, theta)


def _yarn_magnitude(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
