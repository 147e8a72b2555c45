"""Many texts at a time on the states of one model: requests join and leave at any step, and each is
written as if it were alone."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from ..data.tokenizer import encode
from ..files import read_tensors
from ..formats.fingerprint import weights_hash
from ..model.language_model import LanguageModel
from ..model.slots import Slots
from ..model.state import State
from .decode import DecodingSteps
from .prefixes import Prefixes
from .sampling import NOT_FINITE, NOT_FINITE_MESSAGE, SlotSampling, StepKind
from .scheduler import EngineStats, Request, RequestSettings, Result, Scheduler
from .session import NO_TOKENIZER, PIECE, Progress, end_token
from .session import Session as Session  # as before there was a module for it
from .session import generate_text as generate_text


class Handle:
    """A request under way. To iterate over it gives the text piece by piece, and drives the engine,
    all other requests with it. It raises ValueError where the request ends with an error."""

    def __init__(self, engine: Engine, request: Request):
        self._engine, self._request = engine, request

    @property
    def id(self) -> str | int:
        return self._request.id

    @property
    def tokens(self) -> list[int]:
        """What was written so far."""
        return self._request.ids[self._request.first :]

    @property
    def text(self) -> str:
        """The text so far, as far as it is known that no stop string begins in it."""
        return self._request.decode()

    @property
    def finish_reason(self) -> str | None:
        """None until the request has ended."""
        return self._request.finish_reason

    def __iter__(self) -> Iterator[str]:
        given = 0
        while True:
            text = self.text
            if len(text) > given:
                yield text[given:]
                given = len(text)
            elif self.finish_reason is None:
                self._engine.step()
            else:
                break
        if self._request.error is not None:
            raise ValueError(self._request.error)

    def result(self) -> Result:
        """What came of the request, once it has ended; until then this drives the engine."""
        while self.finish_reason is None:
            self._engine.step()
        return self._request.result()

    def cancel(self) -> None:
        """End the request as it is. Nothing happens where it has ended."""
        self._engine._settle()
        if self.finish_reason is None:
            self._engine._finish(self._request, "cancelled")


class Engine:
    """Writes many texts at a time with one model, each as if it were alone.

    Each step reads a piece of the prompts that wait and draws one token for every text that is
    written. Nothing runs in the background: whoever iterates over a handle drives all requests.
    Not for several threads at a time.

    slots: how many texts are written at a time; others wait. Their states are allocated here.
    capacity: the tokens that a text may have, prompt and all; needed where layers keep keys and
        values of the whole text (`ModelConfig.bounded` is False), and no limit elsewhere.
    piece: how many tokens of prompts a step reads at most. A prompt's pieces are cut at its
        multiples, counted from the prompt's first token.
    record: whether decoding steps are recorded as CUDA graphs, one for each power of two of texts,
        and then replayed. It needs a model on a GPU, and has not been measured there yet.
    prefix_bytes: how much memory the states of what prompts begin with may take, so that a shared
        beginning is read once (`prefixes.py`); 0: none are kept. They belong to the weights that
        there are: call `forget_prefixes` after weights were changed in place.
    Raises ValueError for numbers that make no sense.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int = 16,
        capacity: int = 0,
        piece: int = PIECE,
        record: bool = False,
        prefix_bytes: int = 0,
    ):
        given = (("slots", slots, 1), ("capacity", capacity, 0), ("piece", piece, 1))
        for name, value, least in (*given, ("prefix_bytes", prefix_bytes, 0)):
            if value < least:
                raise ValueError(f"{name} = {value}, but must be {least} or more")
        config = model.config
        if not (config.bounded or capacity):
            raise ValueError(
                "this model keeps keys and values of the whole text, so the engine needs a "
                "capacity: the tokens of the longest text"
            )
        self.model, self._end = model, end_token(model)
        limits = [] if config.bounded else [capacity]
        limits += [config.max_position_embeddings] if config.position == "ape" else []
        self._longest = min(limits, default=None)
        self._slots = Slots.new(model, slots, capacity)
        self._sampling = SlotSampling(slots, config.vocab_size, model.device)
        if record and model.device.type != "cuda":
            raise ValueError("record = True needs a model on a GPU")
        self._steps = DecodingSteps(model, self._slots, self._sampling, record=record)
        # as many requests may begin together before the first state is kept
        self._prefixes = Prefixes(model, prefix_bytes, patience=max(50, 4 * slots))
        self._scheduler = Scheduler(slots, piece, self._prefixes)
        self._rows: tuple[list[Request], Tensor, StepKind] | None = None
        self._requests: WeakSet[Request] = WeakSet()  # those that somebody still holds
        self._asked = self._read_count = self._written_count = 0
        self._moving = False  # whether the states in slots are being moved on

    def submit(
        self,
        prompt: str | Sequence[int],
        settings: RequestSettings | None = None,
        *,
        id: str | int | None = None,
        keep_prefix: Sequence[int] = (),
    ) -> Handle:
        """Ask for the text that continues a prompt.

        prompt: text, or token ids; an empty one starts a new text. id: what the result is called;
        by default the number of the request. keep_prefix: after how many of the prompt's tokens
        the state is put into the store of prefixes, where there is one: at the ends of a chat's
        system prompt and of its last user turn. The whole prompt stands for all but its last token,
        which is read when the text is written.
        Raises ValueError at once for a token outside the vocabulary, a text longer than the
        capacity, text without a tokenizer, or a keep_prefix outside the prompt."""
        settings = settings or RequestSettings()
        ids = self._encode(prompt) or ([] if self._end is None else [self._end])
        if not ids:
            raise ValueError("the prompt is empty, and the model has no end-of-text token to begin")
        if not all(0 < place <= len(ids) for place in keep_prefix):
            raise ValueError(f"keep_prefix = {[*keep_prefix]}, of a prompt of {len(ids):,} tokens")
        request = self._request(id, settings, ids, len(ids))
        if self._prefixes.limit:
            request.keep_at = [min(place, len(ids) - 1) for place in keep_prefix]
        return self._add(request)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: RequestSettings | Sequence[RequestSettings] | None = None,
        progress: Progress | None = None,
    ) -> list[Result]:
        """The texts that continue these prompts, in their order.

        settings: for all, or one for each. progress: called with (texts done, texts in all), each
            text after those before it.
        Raises ValueError as `submit` does, before anything is read."""
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a list; got the single {prompts!r}")
        if isinstance(settings, Sequence):
            each = [*settings]
        else:
            each = [settings or RequestSettings()] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} settings were given for {len(prompts)} prompts")
        handles: list[Handle] = []
        try:
            handles += (self.submit(*pair) for pair in zip(prompts, each, strict=True))
            for done, handle in enumerate(handles):
                while handle.finish_reason is None:
                    self.step()
                if progress is not None:
                    progress(done + 1, len(handles))
        finally:  # whatever is raised, nothing of it stays in the engine
            for handle in handles:
                handle.cancel()
        return [handle.result() for handle in handles]

    def fork(
        self,
        handle: Handle,
        prompt: str | Sequence[int] = "",
        settings: RequestSettings | None = None,
        *,
        id: str | int | None = None,
    ) -> Handle:
        """Another request that goes on from where this one is, without reading its text again.

        prompt: what follows the text; where it is empty, the fork is a copy: it also has the tokens
        that were written so far, and they count toward max_tokens. settings: by default the same,
        so that a copy with a seed writes the same.
        Raises ValueError as `submit` does; where the request has ended and did not `keep` its
        state; and where a copy's settings would have ended the text before where it is."""
        request = handle._request
        return self._go_on(
            request.ids,
            request.first,
            request.logprobs,
            self._state_of(handle),
            prompt,
            settings or request.settings,
            id,
        )

    def save_state(self, handle: Handle, path: str | Path) -> None:
        """Write a request as it is to a safetensors file, whole or not at all: its tokens, the
        state after them, and the hash of the model's weights.

        Raises ValueError where it has ended and did not `keep` its state; OSError naming the file.
        """
        request = handle._request
        state = self._state_of(handle) or State.new(self.model)
        beside = {"tokens": torch.tensor(request.ids)}
        if request.logprobs:
            beside["logprobs"] = torch.tensor(request.logprobs, dtype=torch.float64)
        metadata = {"first": str(request.first), "model": weights_hash(self.model)}
        state.save(path, beside, metadata)

    def load_state(
        self,
        path: str | Path,
        prompt: str | Sequence[int] = "",
        settings: RequestSettings | None = None,
        *,
        id: str | int | None = None,
    ) -> Handle:
        """A request that goes on from one that was saved, as `fork` would. A seed is not in the
        file: the settings name it.

        Raises ValueError or OSError in one line where the file is damaged, or was saved with other
        weights; and as `fork`."""
        tensors, metadata = read_tensors(path)
        tokens, logprobs = tensors.pop("tokens", None), tensors.pop("logprobs", None)
        place = metadata.get("first", "")
        if tokens is None or not (place.isascii() and place.isdigit() and len(place) < 19):
            raise ValueError(f"{path}: not a request that an engine saved")
        if metadata.get("model") != weights_hash(self.model):
            raise ValueError(
                f"{path}: saved with another model, or with other weights or another dtype of this "
                "one"
            )
        state = State.of_tensors(tensors, metadata, self.model, path)
        first, written = int(place), len(tokens) - int(place)
        fits = tokens.dtype == torch.int64 and tokens.dim() == 1 and len(state.seen) == 1
        fits = fits and int(state.seen[0]) < len(tokens) and 0 < first <= len(tokens)
        if logprobs is not None:
            fits = fits and logprobs.dtype == torch.float64 and logprobs.shape == (written,)
        if not fits:
            raise ValueError(f"{path}: damaged: its tokens and its state do not fit")
        scores = [] if logprobs is None else logprobs.tolist()
        settings = settings or RequestSettings()
        return self._go_on(tokens.tolist(), first, scores, state, prompt, settings, id)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        # several requests may share one state
        states = {id(r.state): r.state.nbytes for r in self._requests if r.state is not None}
        states |= {id(state): state.nbytes for state in self._prefixes.states}
        return EngineStats(
            slots=len(self._slots.seen),
            used=len(scheduler.running),
            waiting=len(scheduler.waiting),
            state_bytes=self._slots.nbytes + sum(states.values()),
            tokens_read=self._read_count,
            tokens_written=self._written_count,
            prefix_hits=self._prefixes.hits,
            tokens_saved=self._prefixes.saved,
            prefix_states=len(self._prefixes.states),
            prefix_bytes=self._prefixes.nbytes,
        )

    def forget_prefixes(self) -> None:
        """Empty the store of prefixes. Call this after weights were changed in place, because its
        states were computed with the old ones; so were those of texts under way, which go on."""
        self._prefixes.forget()

    @torch.inference_mode()
    def step(self) -> bool:
        """Read a piece of the prompts that wait, and draw one token for every text that is written.

        Returns whether anything is left to do. Whatever is raised, such as KeyboardInterrupt, may
        be followed by another step: no request is lost, and those whose states were being moved on
        are read again."""
        scheduler = self._scheduler
        self._settle()
        if pieces := scheduler.next_pieces():
            self._read(pieces)  # makes new states, and leaves the old as they are
        self._moving = True
        try:
            for request in scheduler.join():
                try:
                    self._join(request)
                except (ValueError, TypeError, OverflowError) as error:  # of this request alone
                    request.error = str(error)
                    self._finish(request, "error")
            if scheduler.running:
                self._decode()
            self._moving = False
        finally:
            self._settle()
        return bool(scheduler.running or scheduler.waiting)

    def _settle(self) -> None:
        """After a step that was interrupted some layers may have moved on, and others not."""
        if self._moving:
            self._rows = None
            self._scheduler.read_again()
            self._moving = False

    def _read(self, pieces: list[tuple[Request, int]]) -> None:
        """Read these requests up to a place in each, in one forward pass."""
        requests = [request for request, _ in pieces]
        parts = [request.ids[request.read : stop] for request, stop in pieces]
        ids = torch.tensor([[token for part in parts for token in part]], device=self.model.device)
        if len(pieces) == 1:
            _, state = self.model.hidden(ids, requests[0].state)
            states = [state]
        else:
            lengths = torch.tensor([0, *map(len, parts)])
            before = None
            if any(request.state for request in requests):
                fresh = State.new(self.model)
                before = State.stack([request.state or fresh for request in requests])
            bounds = lengths.cumsum(0).to(self.model.device)
            _, state = self.model.hidden(ids, before, cu_seqlens=bounds)
            states = [state.select([row]) for row in range(len(pieces))]
        for (request, stop), state in zip(pieces, states, strict=True):
            self._read_count += stop - request.read
            request.state, request.read = state, stop
        for request, stop in pieces:
            if stop == request.branch or stop in request.keep_at:
                self._scheduler.keep(request)

    def _join(self, request: Request) -> None:
        """Put a request whose prompt was read into its slot."""
        assert request.slot is not None
        ended = request.finish_reason  # already, where a step was interrupted at its end
        if ended or request.written >= request.settings.max_tokens:
            self._finish(request, ended or "length")
            return
        if request.state is None:
            self._slots.zero_([request.slot])
        else:
            self._slots.write_(self.model, [request.slot], request.state)
        self._sampling.put_(
            request.slot, request.settings, request.seed, request.written, request.ids
        )
        request.state = None
        self._rows = None

    def _decode(self) -> None:
        """One step of all that are running, and what it drew."""
        if self._rows is None:
            running = [*self._scheduler.running.values()]
            numbers = [request.slot for request in running]
            numbers += [-1] * ((1 << (len(running) - 1).bit_length()) - len(running))
            settings = [request.settings for request in running]
            kind = StepKind.of(settings, any(s.logprobs for s in settings))
            self._rows = running, torch.tensor(numbers, device=self.model.device), kind
        running, rows, kind = self._rows
        drawn = self._steps(rows, kind)
        tokens, logprobs = drawn.tolist()  # the step's one wait for the device
        for request, number, logprob in zip(running, tokens, logprobs, strict=False):
            token = int(number)
            if token == NOT_FINITE:
                request.error = NOT_FINITE_MESSAGE
                self._finish(request, "error")
                continue
            self._written_count += 1
            request.read += 1
            request.take(token, logprob if request.settings.logprobs else None)
            if request.finish_reason is not None:
                self._finish(request, request.finish_reason)

    def _finish(self, request: Request, reason: str) -> None:
        """End a request; its slot is free."""
        if not request.settings.keep or reason == "error":
            request.state = None
        elif request.slot is not None and request.state is None and request.read:
            request.state = self._slots.read(self.model, [request.slot])
        if request.state is not None:
            self._scheduler.keep(request)
        request.finish_reason = reason
        self._scheduler.remove(request)
        self._rows = None

    def _state_of(self, handle: Handle) -> State | None:
        """The state after the tokens that a request has read; None: it has read none."""
        self._settle()
        request = handle._request
        if handle._engine is not self:
            raise ValueError(
                f"request {request.id} is another engine's; save_state there and load_state here "
                "carry it over"
            )
        if request.slot is not None:
            return self._slots.read(self.model, [request.slot])
        if request.finish_reason is not None and request.state is None and request.read:
            raise ValueError(
                f"request {request.id} has ended, and its state was not kept; settings with "
                "keep=True keep it"
            )
        return request.state

    def _go_on(
        self,
        ids: list[int],
        first: int,
        logprobs: list[float],
        state: State | None,
        prompt: str | Sequence[int],
        settings: RequestSettings,
        id: str | int | None,
    ) -> Handle:
        """A request that goes on from a state after some of ids; the rest as in `fork`."""
        more = self._encode(prompt)
        written = [] if more else ids[first:]
        before = [*ids, *more] if more else ids[:first]
        if settings.logprobs and len(logprobs) != len(written) and not more:
            raise ValueError("logprobs: those of the tokens written so far were not kept")
        request = self._request(id, settings, before, len(before))
        scores = logprobs if settings.logprobs else [None] * len(written)
        for token, logprob in zip(written, scores, strict=False):
            if request.finish_reason is not None:
                raise ValueError(
                    "the text is already longer than these settings would write; give a prompt to "
                    "go on with, or other settings"
                )
            request.take(token, logprob)
        request.state, request.read = state, 0 if state is None else int(state.seen[0])
        request.begun = state is not None
        return self._add(request)

    def _request(
        self, id: str | int | None, settings: RequestSettings, ids: list[int], first: int
    ) -> Request:
        """A request, once it is known that it can be done."""
        vocab = self.model.config.vocab_size
        ends = settings.stop_ids
        if ends is None:
            ends = () if self._end is None else (self._end,)
        for what, tokens in (("prompt", ids), ("bias", settings.bias), ("stop_ids", ends)):
            if wrong := next((token for token in tokens if not 0 <= token < vocab), None):
                raise ValueError(f"{what}: token {wrong} is outside the vocabulary of {vocab:,}")
        if settings.stop and self.model.tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        if self._longest is not None and len(ids) + settings.max_tokens > self._longest:
            raise ValueError(
                f"{len(ids):,} tokens of prompt and {settings.max_tokens:,} to write do not fit "
                f"the {self._longest:,} that a text of this engine may have"
            )
        self._asked += 1
        name = self._asked if id is None else id
        return Request(name, settings, ids, first, frozenset(ends), self.model.tokenizer)

    def _add(self, request: Request) -> Handle:
        self._requests.add(request)
        if request.finish_reason is None:
            self._scheduler.add(request)
        elif not request.settings.keep:
            request.state = None
        return Handle(self, request)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return [operator.index(token) for token in prompt]
        if not prompt:
            return []
        if self.model.tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        return encode(self.model.tokenizer, prompt)
