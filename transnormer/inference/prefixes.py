"""States kept after what prompts begin with alike, so that a shared beginning is read once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..model.language_model import LanguageModel
    from ..model.state import State
    from .scheduler import Request

LEAST = 16  # tokens that a state found by comparing prompts must save to be worth its memory
REMEMBERED = 2**20  # tokens of prompts that later ones are compared with: 4 bytes each

_log = logging.getLogger("transnormer")


@dataclass(eq=False)
class _Node:
    """A stretch of tokens in the trie; the text up to its end is the stretches from the root down.

    tokens: int32 [n]. depth: how many tokens the text has up to the end of this stretch. below:
    what may follow, by its first token."""

    tokens: np.ndarray
    depth: int
    above: _Node | None
    below: dict[int, _Node] = field(default_factory=dict)


class Prefixes:
    """A trie of the prompts that an engine read last, with states after some of its nodes.

    A request begins from the deepest state whose tokens its prompt begins with, all but its last
    token at most, because a decoding step reads that one. Where its prompt has LEAST tokens or more
    beyond that state in common with a prompt before it, its reading is cut where the two part
    (`Request.branch`), and the engine keeps the state of that place.

    States are copies that nothing writes to. The least recently used go first.

    limit: the bytes of all states together; 0 keeps and compares nothing. patience: after so many
        requests without a hit a warning is logged, once.
    hits: how many requests began from a state. saved: the tokens that they did not read.
    """

    def __init__(self, model: LanguageModel, limit: int, patience: int = 50):
        self._model, self.limit, self._patience = model, limit, patience
        self.hits = self.saved = self._asked = 0
        self.forget()

    def forget(self) -> None:
        """Drop all states and prompts."""
        self._root = _Node(_array(()), 0, None)
        self._states: dict[_Node, State] = {}  # the least recently used first
        self._prompts: dict[_Node, None] = {}  # where they end; in the same order
        self._remembered = 0  # tokens of the prompts

    @property
    def states(self) -> list[State]:
        return [*self._states.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for state in self._states.values())

    def find(self, request: Request) -> None:
        """Say where a request that has not begun would begin, in its state, read and branch. This
        changes nothing here, and a later call may find more."""
        if not self.limit or request.begun:
            return
        ids = _array(request.ids[:-1])
        node, (_, alike) = self._deepest(ids), self._walk(ids)
        request.state, request.read = (self._states[node], node.depth) if node else (None, 0)
        request.branch = alike if alike - request.read >= LEAST else 0

    def begin(self, request: Request) -> None:
        """Take in that a request begins where `find` said: later ones are compared with it."""
        if not self.limit or request.begun:
            return
        request.begun = True
        first, request.counted = not request.counted, True
        self._asked += first
        if request.state is not None:
            self.hits += first
            self.saved += request.read
        elif self._asked == self._patience and not self.hits:
            _log.warning(
                "none of the first %d requests began with a stored prefix: the store costs memory "
                "and saves nothing (prefix_bytes=0 turns it off)",
                self._asked,
            )
        with self._whole_or_empty():
            if node := self._deepest(_array(request.ids[: request.read])):
                self._states[node] = self._states.pop(node)  # the most recently used
            self._remember(_array(request.ids))

    def keep(self, ids: Sequence[int], state: State, waiting: Iterable[Sequence[int]] = ()) -> None:
        """Keep a copy of a state of one row after these tokens.

        waiting: texts that are read next; the states that they would begin from are not dropped.
        Nothing is kept where the state is not finite, or is larger than the room that there is or
        can be made."""
        if not self.limit or not ids:
            return
        wanted, state = _array(ids), state.trimmed(self._model)
        node = self._deepest(wanted)
        if node is not None and node.depth == len(wanted):
            self._states[node] = self._states.pop(node)
        elif state.nbytes <= self.limit and state.finite():
            with self._whole_or_empty():
                if self._make_room(state.nbytes, waiting):
                    self._states[self._insert(wanted)] = state.clone()

    def _make_room(self, size: int, waiting: Iterable[Sequence[int]]) -> bool:
        """Drop states until `size` more bytes fit; where that cannot be, none is dropped."""
        room, dropped = self.limit - self.nbytes, []
        if room < size:
            used = {self._deepest(_array(ids[:-1])) for ids in waiting}
            for node, state in self._states.items():
                if room < size and node not in used:
                    dropped.append(node)
                    room += state.nbytes
        if room < size:
            return False
        for node in dropped:
            del self._states[node]
            self._prune(node)
        return True

    def _remember(self, ids: np.ndarray) -> None:
        """Compare later prompts with this one; the oldest are forgotten."""
        node = self._insert(ids)
        if node in self._prompts:
            del self._prompts[node]
        else:
            self._remembered += node.depth
        self._prompts[node] = None
        while self._remembered > REMEMBERED and len(self._prompts) > 1:
            oldest = next(iter(self._prompts))
            del self._prompts[oldest]
            self._remembered -= oldest.depth
            self._prune(oldest)

    # The trie.

    def _walk(self, ids: np.ndarray) -> tuple[list[_Node], int]:
        """The nodes that ids begins with, from the root down; and how many tokens ids has in common
        with the trie, which may end within the stretch of one more node."""
        path, at = [self._root], 0
        while at < len(ids) and (node := path[-1].below.get(int(ids[at]))) is not None:
            at += count_alike(node.tokens, ids[at : node.depth])
            if at < node.depth:
                break
            path.append(node)
        return path, at

    def _deepest(self, ids: np.ndarray) -> _Node | None:
        """The last node with a state that ids begins with, or is."""
        path, _ = self._walk(ids)
        return next((node for node in reversed(path) if node in self._states), None)

    def _insert(self, ids: np.ndarray) -> _Node:
        """The node at which ids ends, a new one where there is none."""
        path, at = self._walk(ids)
        node = path[-1]
        if at > node.depth:
            node = self._cut(node.below[int(ids[node.depth])], at)
        if at < len(ids):
            node.below[int(ids[at])] = _Node(ids[at:].copy(), len(ids), node)
            node = node.below[int(ids[at])]
        return node

    def _cut(self, node: _Node, depth: int) -> _Node:
        """A new node above this one, which takes the tokens of its stretch up to `depth`."""
        above = node.above
        assert above is not None
        first, rest = np.split(node.tokens, [depth - above.depth])
        upper = _Node(first.copy(), depth, above, {int(rest[0]): node})
        above.below[int(first[0])] = upper
        node.above, node.tokens = upper, rest.copy()
        return upper

    def _prune(self, node: _Node) -> None:
        """Drop nodes from this one upward, as far as nothing needs them."""
        while node.above is not None and not (
            node.below or node in self._states or node in self._prompts
        ):
            del node.above.below[int(node.tokens[0])]
            node = node.above

    @contextmanager
    def _whole_or_empty(self) -> Iterator[None]:
        """Where a change is interrupted, by Ctrl-C or for want of memory, all is forgotten."""
        try:
            yield
        except BaseException:
            self.forget()
            raise


def count_alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size


def share_beginnings(prompts: Iterable[Sequence[int]]) -> bool:
    """Whether a store would save reading: three prompts or more begin with LEAST tokens alike. The
    first is read, the second shows where they part, and the third begins there."""
    counts = Counter(tuple(ids[:LEAST]) for ids in prompts if len(ids) > LEAST)
    return max(counts.values(), default=0) > 2


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)
