"""The policy that the queue asks: of each model, the one that its settings name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.config.settings import RoutingConfig
from serve_app.gateway.directory import Model
from serve_app.gateway.ledger import Entry
from serve_app.gateway.policy import FewestRequests, Policy
from serve_app.gateway.replicas import Board, FrontEnd, Replica
from serve_app.gateway.routing import prefix
from serve_app.gateway.routing.choice import CacheAware, least_busy
from serve_app.gateway.stages import Call

_MEDIA = {"images", "audio", "videos"}
"""What a replica says it takes beside text."""


class RoundRobin(Policy):
    """Each replica in turn; for comparison."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}
        """By model: the replica that had the latest call."""

    def choose(self, live: Sequence[FrontEnd], call: Call) -> FrontEnd:
        ids = sorted({it.replica.id for it in live})
        last = self._last.get(call.model.name, "")
        turn = next((id for id in ids if id > last), ids[0])
        self._last[call.model.name] = turn
        return least_busy([it for it in live if it.replica.id == turn])


@dataclass
class _Routed:
    """One model's cache-aware choice."""

    choice: CacheAware
    prompts: dict[str, prefix.Prompt] = field(default_factory=dict)
    """By call that has not been accounted for yet."""


class Router(Policy):
    """Chooses by each model's ``routing``, and learns from the ledger what calls took.

    Calls that generate nothing, and models whose engines keep no prefixes, go to the replica with
    the fewest requests, whatever the policy.
    """

    def __init__(self, board: Board, default: RoutingConfig) -> None:
        self._board = board
        self._default = default
        self._fewest, self._in_turn = FewestRequests(), RoundRobin()
        self._routed: dict[str, _Routed] = {}
        board.heard = self._heard

        self.chose: Callable[[str, str], None] = lambda model, reason: None
        """Told of each choice among several replicas: the model, and why."""

        self.predicted: Callable[[str, float, int, int], None] = lambda *told: None
        """Told of each call that was chosen for by what is cached: its model, the tokens that were
        believed to be cached, those that were, and those of its prompt."""

    def choose(self, live: Sequence[FrontEnd], call: Call) -> FrontEnd:
        model = call.model
        replicas = {it.id for it in self._board.replicas_of(model.name)}
        config = self._config(model)
        if len(replicas) < 2:
            return self._fewest.choose(live, call)
        if config.policy == "round_robin":
            self.chose(model.name, "round_robin")
            return self._in_turn.choose(live, call)
        if not (routed := self._by_cache(call, config)):
            self.chose(model.name, "least_loaded")
            return self._fewest.choose(live, call)
        if routed.choice.replicas > len(replicas):
            routed.choice.keep(replicas)
        front_end = routed.choice.choose(call.id, self._prompt(routed, call), live)
        self.chose(model.name, routed.choice.reason)
        return front_end

    def waits_for(
        self, live: Sequence[FrontEnd], call: Call, full: Mapping[Replica, int]
    ) -> tuple[Replica, float] | None:
        if not (routed := self._by_cache(call, self._config(call.model))):
            return None
        return routed.choice.waits_for(self._prompt(routed, call), live, full)

    def key(self, call: Call) -> bytes:
        routed = self._routed.get(call.model.name)
        prompt = routed.prompts.get(call.id) if routed else None
        return prefix.key(prompt.blocks) if prompt else b""

    def first_byte(self, call: Call) -> None:
        if routed := self._routed.get(call.model.name):
            routed.choice.first_byte(call.id)

    def left(self, call: Call) -> None:
        if routed := self._routed.get(call.model.name):
            routed.choice.ended(call.id)

    def entered(self, entry: Entry) -> None:
        if not (routed := self._routed.get(entry.model)):
            return
        routed.prompts.pop(entry.id, None)
        if (sent := routed.choice.used(entry.id, entry.usage)) and (usage := entry.usage):
            self.predicted(entry.model, sent.cached, usage.cached_tokens, usage.prompt_tokens)

    def _by_cache(self, call: Call, config: RoutingConfig) -> _Routed | None:
        """The model's cache-aware choice, if it is for this call."""
        if config.policy != "cache_aware" or not prefix.generates(call.request.path):
            return None
        model = call.model
        if model.config and model.config.engine.get("enable_prefix_caching") is False:
            return None
        routed = self._routed_of(model.name)
        routed.choice.config = config
        return routed

    def _routed_of(self, model: str) -> _Routed:
        routed = self._routed.get(model)
        if routed is None:
            for name in [it for it in self._routed if not self._board.replicas_of(it)]:
                del self._routed[name]  # nothing of what is known is left there
            routed = self._routed[model] = _Routed(CacheAware())
        return routed

    def _heard(self, model: str, replica: Replica, key: str) -> None:
        """Another gateway has sent a prompt, and so chooses for this model by what is cached."""
        if not self._board.knows(replica):
            return  # it drains
        choice = self._routed_of(model).choice
        before = choice.replicas
        choice.heard(replica, prefix.blocks_of(key))
        if choice.replicas > before:  # others may have gone since the last one came
            choice.keep({it.id for it in self._board.replicas_of(model)})

    def _config(self, model: Model) -> RoutingConfig:
        own = model.config.routing if model.config else None
        if own is None:
            return self._default
        return self._default.model_copy(
            update={name: getattr(own, name) for name in own.model_fields_set}
        )

    def _prompt(self, routed: _Routed, call: Call) -> prefix.Prompt:
        prompt = routed.prompts.get(call.id)
        if prompt is None:
            takes = self._board.about.get(call.model.name, {}).get("takes")
            prompt = routed.prompts[call.id] = prefix.of(
                call,
                session=routed.choice.config.session_affinity,
                media=takes is None or not _MEDIA.isdisjoint(takes),
            )
        return prompt
