"""Our models as transformers' own: the model and its tokenizer. Importing this registers them and
their configuration with the Auto classes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..data.tokenizer import end_of_text_id
from ..files import FINGERPRINT
from ..model import language_model
from ..model.card import write_card
from ..model.language_model import LanguageModel
from ..model.layers import Linear, TokenPositions
from ..model.mixer import LayerState, Mixer
from ..ops.loss import linear_cross_entropy
from .cache_hf import has_place, read_cache, write_cache
from .config_hf import TransNormerConfig
from .rows import Rows, read_rows

# What collators of packed rows may give.
PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
# What says where a folder is that may lie on a hub.
PLACE_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)
# The name of the cache in outputs; transformers changed it in 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Block(GradientCheckpointingLayer, language_model.Block):
    """The block, recomputed in the backward pass where `gradient_checkpointing_enable` asked for
    it."""

    def forward(
        self, x: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        # with device_map the layers live on several devices
        return super().forward(x, state, tokens.to(x.device))


class TransNormerForCausalLM(LanguageModel, PreTrainedModel, GenerationMixin):
    """`LanguageModel` with transformers' arguments, outputs, files and `generate`. B rows, T
    tokens.

    The weights' names in files are the same, so that each side reads the other's folders.
    """

    config: Any
    lm_head: Any
    config_class = TransNormerConfig
    block = Block
    base_model_prefix = "body"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: TransNormerConfig):
        PreTrainedModel.__init__(self, config)
        own = config.own()
        self.layer_configs = own.layers
        self.build(own)
        # tied; transformers and what builds on it look for a head all the same
        if self.lm_head is None:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        PreTrainedModel.post_init(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        PreTrainedModel._init_weights(self, module)
        # transformers initialises these two itself, and parameters that it has read are marked
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            reset: Any = getattr(module, "reset_parameters", None)
            own = module.parameters(recurse=False)
            if reset and not all(getattr(p, "_is_hf_initialized", False) for p in own):
                reset()
        if isinstance(module, Mixer):
            module.reset_decay()

    # Reading.

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **packing: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, vocab], the cache and, with labels, the loss. Arguments besides these as in
        `body`.

        labels: [B, T] int64, the tokens themselves (they are shifted here); -100 does not count,
            nor does what follows padding. The loss is the mean over labels that count or, where the
            Trainer gives num_items_in_batch, their sum divided by it, as gradient accumulation
            needs. It never holds more than a slice of its logits.
        logits_to_keep: return the logits of the last so many tokens (0: of all), or of the tokens
            of an index. The loss is of all tokens whatever is kept: with labels, 1 saves the memory
            of logits that nobody reads.
        """
        if use_cache is None and labels is not None:
            use_cache = False
        read = self.body(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            cache=cache,
            **packing,
        )
        x = read.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None if labels is None else self._loss(x, labels, attention_mask, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=self.lm_head(x[:, kept]),
            hidden_states=read.hidden_states,
            **{CACHE: read.get(CACHE)},
        )
        return (
            output
            if (self.config.return_dict if return_dict is None else return_dict)
            else output.to_tuple()
        )

    def _loss(
        self, x: Tensor, labels: Tensor, mask: Tensor | None, count: int | Tensor | None
    ) -> Tensor:
        """x [B, T, D], labels [B, T], mask [B, T] -> the loss, in float32 at least."""
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if mask is not None:
            targets = targets.masked_fill(
                mask[:, -targets.shape[1] :].to(targets.device) == 0, -100
            )
        reduction = "mean" if count is None else "sum"
        weight = self.lm_head.weight
        if type(self.lm_head) in (Linear, nn.Linear) and not weight.is_meta:
            loss = linear_cross_entropy(
                x.to(weight.device), weight, targets.to(weight.device), reduction=reduction
            )
        else:  # a head with an adapter, quantised or offloaded is more than its weight
            logits = self.lm_head(x).float().flatten(0, 1)
            loss = nn.functional.cross_entropy(
                logits, targets.flatten().to(logits.device), reduction=reduction
            )
        return (
            loss
            if count is None
            else loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
        )

    def body(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **packing: Any,
    ) -> BaseModelOutputWithPast:
        """What the head reads, [B, T, D], and the cache; an output object, whatever return_dict
        says.

        input_ids: [B, T] int64; or inputs_embeds: [B, T, D], vectors in the place of their
            embeddings.
        attention_mask: [B, T] or, after tokens that were read before, [B, all]: 0 where a token is
            padding. Padding may stand at the left; at the right only where no cache is wanted.
        position_ids: [B, T]: each token's place in its row, from 0. They are checked, not obeyed: a
            row's places go on from the tokens read. Where those of one row begin again at 0,
            sequences are packed in it.
        past_key_values, cache: one thing under its two names: `DynamicCache(config=model.config)`,
            read and updated. Gradients do not flow through it.
        use_cache: None: a cache is returned where one can go on from it (not from packed or
            right-padded rows).
        packing: cu_seq_lens_q [N + 1]: where N packed sequences of one row begin and end. The rest
            of PACKING, which collators give with it, says the same again.
        Raises ValueError in one line for what cannot be read right.
        """
        if unknown := packing.keys() - PACKING:
            raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError(
                "output_attentions: the model keeps no attention weights, so none can be returned"
            )
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        shape = given.shape[:2]
        cache = past_key_values if cache is None else cache
        state = read_cache(cache, self.layer_configs, attention_mask, shape)
        seen, bounds = None if state is None else state.seen, packing.get("cu_seq_lens_q")
        if seen is not None and shape[1] == 1 and given.device.type != "cpu":
            rows = Rows(bounds=bounds)  # a look at the GPU would wait for it
        else:
            rows = read_rows(shape, attention_mask, position_ids, bounds, seen)
        if rows.no_cache_from and (use_cache or cache is not None):
            raise ValueError(
                f"no cache can go on from {rows.no_cache_from}; pass use_cache=False and no cache"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not rows.no_cache_from
            use_cache &= has_place(self.layer_configs)
        if (use_cache or cache is not None) and not has_place(self.layer_configs):
            raise ValueError(
                "transformers' cache has no place for the convolutions of softmax layers without a "
                "linear layer among them; pass use_cache=False, or write with transnormer.generate"
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        inputs: list[Tensor] | None = [] if output_hidden_states else None
        x, state = self.hidden(given, state, cu_seqlens=rows.bounds, pad=rows.pad, inputs=inputs)
        if cache is not None:
            write_cache(cache, self.layer_configs, state, shape[1])
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=None if inputs is None else (*inputs, x),
            **{CACHE: cache if use_cache else None},
        )

    # Generation.

    @property
    def _is_stateful(self) -> bool:
        """Whether what was read cannot be taken back: then transformers refuses assisted
        decoding."""
        return any(kind.bounded for kind in self.layer_configs)

    @property
    def _knows_no_length(self) -> bool:
        """Whether no layer of a cache can tell how many tokens were read, as linear ones
        cannot."""
        return all(kind.linear for kind in self.layer_configs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own, except for a cache of linear layers alone: that has no length, so this
        method finds the tokens that it has not read, and passes them on.

        From this signature transformers learns which inputs `generate` accepts."""
        cache, places = (
            kwargs.get("cache", kwargs.get("past_key_values")),
            kwargs.get("position_ids"),
        )
        if (
            self._knows_no_length
            and next_sequence_length is None
            and cache is not None
            and places is not None
        ):
            state = read_cache(cache, self.layer_configs, None, input_ids.shape)
            if state is not None and places.shape[1] == input_ids.shape[1]:
                row = int(state.seen.argmax())  # one that is not padding as far as was read
                next_sequence_length = int(places[row, -1]) + 1 - int(state.seen[row])
                if next_sequence_length < 1:
                    raise ValueError(
                        f"the cache has read {int(state.seen[row])} tokens: nothing is left to read"
                    )
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """transformers' own, but a row of padding alone has positions -1, so that its first new
        token is at 0."""
        places: Tensor = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        if mask is None or places.shape != mask.shape:
            return places
        real = mask.bool().any(1, keepdim=True)
        if not bool(real.all()):
            rows = (~real).flatten().nonzero().flatten().tolist()
            warnings.warn(
                f"rows {rows} are padding alone, so that their first token is drawn from equal "
                "logits; begin a text "
                "with the token that begins or ends texts",
                stacklevel=2,
            )
        return places.where(real, -1)

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        **options: Any,
    ) -> Any:
        if generation_config.is_assistant and self._is_stateful:
            raise ValueError(
                f"{type(self).__name__} cannot assist: its state cannot be rolled back"
            )
        if self._knows_no_length and "past_key_values" in model_kwargs:
            # before 5.24, transformers asks a cache of this name for its length, which linear
            # layers do not know
            cache = model_kwargs["past_key_values"]
            model_kwargs = {
                name: value for name, value in model_kwargs.items() if name != "past_key_values"
            }
            model_kwargs["cache"] = cache
        return super()._prefill(input_ids, generation_config, model_kwargs, **options)

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """The mask as it is: `body` reads which tokens are padding, not who sees whom."""
        return attention_mask

    # Files.

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | os.PathLike[str] | None,
        *inputs: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **options: Any,
    ) -> Any:
        """transformers' own, but strict: every weight comes from the files.

        Raises ValueError, naming the tensor, where one is missing, unknown, of another shape or not
        finite."""
        model, info = super(LanguageModel, cls).from_pretrained(
            source, *inputs, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
        problems += [f"{name} is unknown" for name in sorted(info["unexpected_keys"])]
        if not ignore_mismatched_sizes:
            problems += [
                f"{name} is {list(stored)}, not {list(wanted)}"
                for name, stored, wanted in info["mismatched_keys"]
            ]
        if model.config.tie_word_embeddings and "lm_head.weight" not in model.all_tied_weights_keys:
            problems.append(
                "lm_head.weight differs from embed_tokens.weight, which the config ties to it"
            )
        problems += [
            f"{name} holds NaN or infinity"
            for name, tensor in model.named_parameters()
            if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
        ]
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise ValueError(
                f"{source}: the weights do not fit the config: {'; '.join(problems[:4])}{more}"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any
    ) -> None:
        """transformers' own, with a model card where the folder has none. `transnormer.load` reads
        it, shards too."""
        folder = Path(save_directory)
        if is_main_process and not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_card(folder, self.config.own(), self.parameter_count())
            (folder / FINGERPRINT).unlink(missing_ok=True)
        PreTrainedModel.save_pretrained(
            self, save_directory, is_main_process=is_main_process, **options
        )


class TransNormerTokenizer(PreTrainedTokenizerFast):
    """tokenizer.json as it is. Padding goes to the left, where generation needs it.

    What begins, ends and pads texts is what tokenizer_config.json says, else config.json, else the
    end-of-text token."""

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *inputs: Any, **options: Any) -> Any:
        # Not in an __init__: a class that has one gets its tokenizer rebuilt by transformers,
        # without the merges.
        tokenizer = super().from_pretrained(source, *inputs, **options)
        try:
            place = {name: options[name] for name in PLACE_OPTIONS if name in options}
            config, _ = PreTrainedConfig.get_config_dict(source, **place)
        except OSError:  # a tokenizer alone
            config = {}
        ids = {name: config.get(f"{name}_id") for name in ("eos_token", "bos_token", "pad_token")}
        end = (
            end_of_text_id(tokenizer.backend_tokenizer)
            if ids["eos_token"] is None
            else ids["eos_token"]
        )
        for name, number in ids.items():
            number = end if number is None else number
            if getattr(tokenizer, name) is None and number is not None and number < len(tokenizer):
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
        return tokenizer


AutoConfig.register(TransNormerConfig.model_type, TransNormerConfig)
AutoModelForCausalLM.register(TransNormerConfig, TransNormerForCausalLM)
AutoTokenizer.register(TransNormerConfig, fast_tokenizer_class=TransNormerTokenizer)
