"""What a person may write in the ``args`` and the ``user_config`` of an application.

Each is a pydantic model that refuses what it does not know; :func:`parse` says in one sentence
what is wrong.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from serve_app.config import engine_args, placeholders
from serve_app.errors import ConfigError, did_you_mean

# Serve keeps an application's name in a log file's path, and refuses a blank one.
ModelId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\s\x00-\x1f]+$")]

MAX_FRONTENDS = 16
"""The most ``frontends`` of one replica."""

MAX_REPLICAS = 10_000
"""The most replicas of one model, far above what one Ray cluster was ever seen to run."""

MAX_GATEWAYS = 1_000
"""The most gateway processes."""


class Settings(BaseModel):
    """What a person may write: it refuses what it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """To pydantic ``true`` is 1."""
        if isinstance(value, bool) and info.field_name:
            types = set(_types_in(cls.model_fields[info.field_name].annotation))
            if types & {int, float} and bool not in types:
                raise PydanticKnownError("int_type" if int in types else "float_type")
        return value


class _Args(Settings):
    """The ``args`` of an application of ours."""

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, args: Any) -> Any:
        placeholders.refuse(args)
        return args


class Resources(Settings):
    """What one replica needs beyond the GPUs that its parallelism implies."""

    device: Literal["gpu", "cpu"] = "gpu"
    """``cpu`` runs vLLM's CPU engine; then no GPU is asked for."""

    accelerator_type: str | None = Field(default=None, min_length=1)
    """A GPU type as Ray names it on a node (``H100``, ``L40S`` …); None takes any. Ray finds
    ``A100`` on both sizes of it; the rendered manifests declare ``A100-40G`` and ``A100-80G``."""

    gpu_share: float | None = Field(default=None, gt=0)
    """The part of one GPU's memory that a replica gets, such as 0.3: others share the GPU. The
    planner makes vLLM's two sizes of it; what ``engine`` sets of them holds instead. Memory is
    planned and not enforced, and the GPU's time is not divided."""

    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """The same in GiB. Ray reserves a fraction before it chooses a GPU: of ``accelerator_type``,
    else of the smallest GPU of the cluster."""

    num_cpus: float = Field(default=1.0, ge=0)
    """CPU cores reserved on the replica's node, for the engine's front ends. Where it is set,
    ``frontends: auto`` gives no more of them."""

    memory_gib: float | None = Field(default=None, gt=0)
    """Host memory reserved for the replica, in GiB."""

    swap_group: str | None = Field(default=None, max_length=40, pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of a group of models that share one GPU: some are awake on it, the others sleep in host
    memory until a request for them comes. The gateway's ``swap_groups`` has the group's terms."""

    evict_cost: float = Field(default=1.0, ge=0)
    """Of several models of a swap group that could sleep, the one with the lowest cost does."""

    @property
    def part_of_gpu(self) -> str | None:
        """The name of the setting that gives a part of a GPU; None where replicas have whole
        ones."""
        given = ("gpu_share", self.gpu_share), ("gpu_memory_gib", self.gpu_memory_gib)
        return next((name for name, value in given if value is not None), None)

    @model_validator(mode="after")
    def _one_part(self) -> Resources:
        if self.gpu_share is not None and self.gpu_memory_gib is not None:
            raise ConfigError(
                "resources.gpu_share and resources.gpu_memory_gib say the same in two units; keep "
                "one"
            )
        if self.gpu_share is not None and self.gpu_share >= 1:
            raise ConfigError(
                f"resources.gpu_share is {self.gpu_share:g}, but a part of one GPU is below 1; "
                "remove it for whole GPUs, as many as engine.tensor_parallel_size"
            )
        if "evict_cost" in self.model_fields_set and not self.swap_group:
            raise ConfigError(
                f"resources.evict_cost is {self.evict_cost:g}, but the model is in no swap group; "
                "set resources.swap_group, or remove it"
            )
        if self.part_of_gpu and self.swap_group:
            raise ConfigError(
                f"resources.{self.part_of_gpu} and resources.swap_group exclude each other: a "
                "swap group has a whole GPU; keep one"
            )
        if self.part_of_gpu and self.device == "cpu":
            raise ConfigError(f"resources.{self.part_of_gpu} needs device: gpu")
        return self


class Autoscaling(Settings):
    """Replicas follow the load that the engine reports."""

    min_replicas: int = Field(default=1, ge=0, le=MAX_REPLICAS)
    """0 lets the model go cold; the next request wakes it."""

    max_replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    """The most that the load may ask for."""

    initial_replicas: int | None = Field(default=None, ge=0)
    """Replicas at first; None starts with ``min_replicas``."""

    target_load: float = Field(default=0.7, gt=0, le=1)
    """Load to aim for, as a share of what one engine runs at once (``max_num_seqs``)."""

    upscale_delay_s: float = Field(default=10.0, ge=0)
    """Seconds that the load must stay high before a replica is added."""

    downscale_delay_s: float = Field(default=300.0, ge=0)
    """Seconds that the load must stay low before a replica is removed."""

    @model_validator(mode="after")
    def _bounds(self) -> Autoscaling:
        if self.max_replicas < max(1, self.min_replicas):
            default = "" if "max_replicas" in self.model_fields_set else " (the default)"
            raise ValueError(
                f"max_replicas is {self.max_replicas}{default}, below min_replicas "
                f"({self.min_replicas}); set it"
            )
        if self.initial_replicas is not None and not (
            self.min_replicas <= self.initial_replicas <= self.max_replicas
        ):
            raise ValueError("initial_replicas must lie between min_replicas and max_replicas")
        return self


class RoutingConfig(Settings):
    """Which replica gets a request, of a model that has several."""

    policy: Literal["cache_aware", "least_loaded", "round_robin"] = "cache_aware"
    """``cache_aware``: the replica that has the beginning of the prompt in its KV cache, until it
    is saturated. ``least_loaded``: the one with the fewest requests. ``round_robin``: each in turn,
    to compare with."""

    max_wait_for_cache_s: float = Field(default=2.0, ge=0)
    """Seconds of TTFT, at most, that a request gives for a replica that has its prompt cached.
    While no other has ample room it waits for that one as long as the ``queue`` lets it."""

    session_affinity: bool = False
    """Whether requests with the same ``X-Session-Id`` header, or the same ``prompt_cache_key`` in
    the body, go to the same replica while it has room, whatever is cached elsewhere."""


class Adapter(Settings):
    """A LoRA adapter, served under a model id of its own."""

    name: ModelId
    """The model id that clients send."""

    path: str = Field(min_length=1)
    """A local folder, a hub id or an ``s3://`` address."""


class LiveConfig(Settings):
    """The ``user_config`` of a model's deployment: what can change without a restart. Each takes
    the place of the same setting in ``args``."""

    adapters: list[Adapter] = []
    """LoRA adapters that replicas load and unload while they serve."""

    routing: RoutingConfig | None = None
    """Which replica gets a request."""

    fallback: list[ModelId] = []
    """Ids of models of which one answers where this one has no replica for a request."""

    fallback_after_s: float = Field(default=10.0, ge=0)
    """Seconds that a request waits for a replica before ``fallback`` gets it."""


class ModelConfig(_Args):
    """The ``args`` of a model's application; the application's name is the model id."""

    model: str = Field(min_length=1)
    """Hub id or local folder of the weights."""

    served_as: list[ModelId] = []
    """Further ids for the same model; ids with ``/`` belong here."""

    engine: dict[str, Any] = {}
    """vLLM's engine arguments by vLLM's own names."""

    replicas: int | None = Field(default=None, ge=1, le=MAX_REPLICAS)
    """A fixed number of replicas (1 where neither this nor ``autoscaling`` is set)."""

    autoscaling: Autoscaling | None = None
    """Replicas between two bounds; excludes ``replicas``."""

    resources: Resources = Resources()
    """What one replica needs of its node."""

    routing: RoutingConfig | None = None
    """Which of its replicas gets a request; what is not set here is as in the gateway's
    ``routing``."""

    frontends: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_FRONTENDS)] = "auto"
    """Processes of each replica that take requests, render them and stream answers: one Python
    process is busy with about 18,000 tokens per second. ``auto``: as many as the engine's expected
    rate needs and its share of the node's cores allows."""

    adapters: list[Adapter] = []
    """LoRA adapters that are loaded at the start; ``user_config`` has those that come and go."""

    fallback: list[ModelId] = []
    """Ids of models, the best first, of which one answers where this one has no replica for a
    request; not for requests that name an adapter, nor for embeddings, scores and tokens."""

    fallback_after_s: float = Field(default=10.0, ge=0)
    """Seconds that a request waits for a replica before ``fallback`` gets it; at once where the
    model cannot start, or others have waited in vain and it still has no replica."""

    cache_dir: str | None = Field(default=None, min_length=1)
    """One folder for all that makes the next start faster: downloads, compiled code and kernels,
    vLLM's start-up plan. Best on a disk that outlives the replica; one for each type of GPU.
    None: each library's own place, under the home folder."""

    env: dict[str, str] = {}
    """Environment variables of the replica and its engine, as plain text: no secrets. A replica
    also has those that its Ray started with (HF_TOKEN; on Kubernetes, the profile's ``hf_token``).
    With VLLM_PLUGINS here, ``engine`` may name what a plugin adds to vLLM's registries."""

    graceful_shutdown_timeout_s: float = Field(default=600.0, ge=0)
    """Seconds that running generations get to finish when a replica is stopped."""

    start_timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds that an engine may take to load and compile before its replica is given up."""

    hang_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds without a step of a busy engine after which its replica is replaced; 300 at least
    until the engine has finished its first request, which may compile."""

    @field_validator("frontends", mode="wrap")
    @classmethod
    def _frontends(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        numbers = f"a number from 1 to {MAX_FRONTENDS}"
        return _number_or_auto("frontends", numbers, value, check)

    @field_validator("cache_dir")
    @classmethod
    def _cache_dir(cls, folder: str | None) -> str | None:
        """A replica's working folder is Ray's, and no shell is there to read ``~``."""
        if folder is not None and not folder.startswith("/"):
            raise ValueError(f"'{folder}' must be a folder's whole path, such as /mnt/models")
        return folder

    @field_validator("env", mode="before")
    @classmethod
    def _env(cls, env: Any) -> Any:
        """YAML reads ``1`` and ``true`` as a number and a boolean; the environment has text."""
        if isinstance(env, dict):
            return {str(k): _as_text(v) for k, v in env.items()}
        return env

    @field_validator("env")
    @classmethod
    def _no_key(cls, env: dict[str, str]) -> dict[str, str]:
        if "VLLM_API_KEY" in env:
            raise ValueError(f"VLLM_API_KEY is not yours to set: {engine_args.OWNED['api_key']}")
        return env

    @model_validator(mode="after")
    def _engine(self) -> ModelConfig:
        for problem in engine_problems(self.engine, self.env):
            raise ConfigError(problem)
        return self

    @model_validator(mode="after")
    def _one_way_to_scale(self) -> ModelConfig:
        if self.replicas is not None and self.autoscaling is not None:
            raise ValueError("replicas and autoscaling exclude each other; keep one")
        if self.adapters and self.engine.get("enable_lora") is False:
            raise ValueError("adapters need engine.enable_lora; remove 'enable_lora: false'")
        if self.resources.device == "cpu" and self.resources.accelerator_type:
            raise ValueError("resources.accelerator_type needs device: gpu")
        return self

    @model_validator(mode="after")
    def _fallback(self) -> ModelConfig:
        twice = next((id for id in self.fallback if self.fallback.count(id) > 1), None)
        if twice is not None:
            raise ConfigError(f"fallback lists '{twice}' twice; remove one")
        if "fallback_after_s" in self.model_fields_set and not self.fallback:
            raise ConfigError(
                f"fallback_after_s is {self.fallback_after_s:g}, but the model has no fallback; "
                "set fallback, or remove it"
            )
        convert = self.engine.get("convert") or "auto"
        if self.fallback and (
            self.engine.get("runner") == "pooling" or convert not in ("auto", "none")
        ):
            raise ConfigError(NO_FALLBACK)
        return self

    @model_validator(mode="after")
    def _part_of_one_gpu(self) -> ModelConfig:
        part = self.resources.part_of_gpu
        for name in engine_args.SIZES if part else ():
            if (size := self.engine.get(name)) not in (None, 1):
                raise ConfigError(
                    f"resources.{part} is a part of one GPU, but engine.{name} is {size}; remove "
                    "one of the two"
                )
        if part and self.engine.get("distributed_executor_backend") not in (None, "uni"):
            raise ConfigError(
                f"resources.{part} needs vLLM's executor 'uni', in which the replica holds its "
                "part of the GPU; remove engine.distributed_executor_backend"
            )
        return self

    @model_validator(mode="after")
    def _ids_once(self) -> ModelConfig:
        ids = ids_of("", self)[1:]
        twice = next((id for id in ids if ids.count(id) > 1), None)
        if twice is not None:
            raise ValueError(f"the id '{twice}' is listed twice in served_as and adapters")
        return self

    @property
    def tensor_parallel_size(self) -> int:
        return int(self.engine.get("tensor_parallel_size") or 1)

    @property
    def pipeline_parallel_size(self) -> int:
        return int(self.engine.get("pipeline_parallel_size") or 1)

    @property
    def replica_range(self) -> tuple[int, int]:
        """The fewest and the most replicas that Serve will ask for."""
        if self.autoscaling is not None:
            return self.autoscaling.min_replicas, self.autoscaling.max_replicas
        count = self.replicas or 1
        return count, count


NO_FALLBACK = (
    "fallback is for models that generate text: the vectors and scores of another model mean "
    "something else; remove it"
)


def _number_or_auto(
    name: str, numbers: str, value: Any, check: ValidatorFunctionWrapHandler
) -> Any:
    """One sentence for the two types; and ``true`` is not 1."""
    if not isinstance(value, bool):
        with contextlib.suppress(ValidationError):
            return check(value)
    raise ConfigError(f"{name} is {_shown(value)}; give {numbers}, or auto")


def engine_problems(engine: dict[str, Any], env: Mapping[str, Any]) -> Iterator[str]:
    """Each reason why a model's ``engine`` cannot work, in one sentence.

    ``env`` is the model's; with VLLM_PLUGINS in it, a plugin may add to vLLM's registries.
    """
    elsewhere = {key: hint for key in engine if (hint := _belongs(key, engine, "engine"))}
    yield from (
        f"engine.{key} is not an argument of vLLM; {hint}" for key, hint in elsewhere.items()
    )
    rest = {key: value for key, value in engine.items() if key not in elsewhere}
    yield from engine_args.problems(rest, plugins="VLLM_PLUGINS" in env)


def _belongs(key: Any, unknown: Mapping[Any, Any], under: str) -> str | None:
    """Where one of the keys that are not known ``under`` a setting belongs, and what to write."""
    name, value = engine_args.undashed(str(key)), unknown[key]
    gpus = name in ("num_gpus", "gpus")
    if gpus and isinstance(value, float) and 0 < value < 1:
        return f"a part of a GPU is `{_line('resources', {'gpu_share': value})}`"
    if gpus:
        return (
            "a replica has as many GPUs as its engine asks for: set engine.tensor_parallel_size, "
            f"`{_line('engine', {'tensor_parallel_size': value})}`"
        )
    if under != "engine" and name in engine_args.table():
        named = {engine_args.undashed(str(k)): v for k, v in unknown.items()}
        all_of_them = {k: v for k, v in named.items() if k in engine_args.table()}
        return f"put it under engine: `{_line('engine', all_of_them)}`"
    for group, settings in (("resources", Resources), ("autoscaling", Autoscaling)):
        if under != group and name in settings.model_fields:
            return f"put it under {group}: `{_line(group, {name: value})}`"
    if under and name in ModelConfig.model_fields and name not in engine_args.OWNED:
        return f"put it beside {under}, under args: `{_line(name, value)}`"
    return None


def _line(key: str, value: Any) -> str:
    """``key: value`` as one line of YAML, without what would make it too long to read."""
    flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 20)
    text = flow.split("\n")[0]
    return f"{key}: {text if len(text) <= 100 else '…'}"


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (int, float)) else value


class KeySource(Settings):
    """Where the API keys are listed: exactly one of the two."""

    file: str | None = Field(default=None, min_length=1)
    """A YAML file on each gateway's node. It is read again within 5 s of a change."""

    secret_env: str | None = Field(default=None, min_length=1)
    """An environment variable with such a file's text."""

    @model_validator(mode="after")
    def _one(self) -> KeySource:
        if (self.file is None) == (self.secret_env is None):
            raise ValueError("give 'file' or 'secret_env', one of the two")
        return self


_USAGE_DB = re.compile(r"sqlite:///[^?#]+|postgres(ql)?://[^/?#]+/[^/?#]+(\?.*)?")


class UsageDb(Settings):
    """Where each request is recorded: exactly one of the two. A text alone is the ``url``."""

    url: str | None = None
    """``sqlite:///FILE`` or ``postgresql://USER:PASSWORD@HOST/DATABASE``."""

    secret_env: str | None = Field(default=None, min_length=1)
    """An environment variable of the gateways with such a URL: then no config has the password."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return value if isinstance(value, dict | UsageDb) else {"url": value}

    @field_validator("url", mode="before")
    @classmethod
    def _known(cls, url: Any) -> Any:
        return None if url is None else usage_url(url)

    @model_validator(mode="after")
    def _one(self) -> UsageDb:
        if (self.url is None) == (self.secret_env is None):
            raise ValueError("give 'url' or 'secret_env', one of the two")
        return self

    def address(self, environment: Mapping[str, str]) -> str:
        """The URL, also where it is in a variable of ``environment``.

        Raises:
            ConfigError: the variable is not set, or has none.
        """
        if self.secret_env is None:
            return str(self.url)
        url = environment.get(self.secret_env, "").strip()
        if not url:
            raise ConfigError(f"usage_db: the environment variable {self.secret_env} is not set")
        try:
            return usage_url(url)
        except ValueError as error:
            raise ConfigError(f"the environment variable {self.secret_env} {error}") from None


def usage_url(text: Any) -> str:
    """Check a URL for ``usage_db``. The sentence does not repeat it, whatever it is: it may have a
    password.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str) or not _USAGE_DB.fullmatch(text):
        raise ValueError(
            "must be sqlite:///FILE (with four slashes before a whole path) or "
            "postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    return text


def otlp_url(text: str) -> str:
    """Check a URL for ``otlp_endpoint``. The sentence does not repeat it: it may have a password.

    Raises:
        ValueError: it is none.
    """
    found = _OTLP.fullmatch(text)
    if not found:
        raise ValueError(
            "is no URL of a receiver of OTLP over HTTP, such as http://localhost:4318 or "
            "https://cloud.langfuse.com/api/public/otel"
        )
    if found["user"]:
        raise ValueError(
            "must have no user or password; set OTEL_EXPORTER_OTLP_HEADERS in the gateways' "
            "environment, such as Authorization=Basic%20…"
        )
    if found["port"] == "4317":
        raise ValueError("names port 4317, where receivers speak gRPC; over HTTP it is mostly 4318")
    return text


_OTLP = re.compile(
    r"https?://(?P<user>[^\s/?#]*@)?(\[[\da-fA-F:.]+\]|[^\s/?#@:]+)(:(?P<port>\d{1,5}))?(/[^\s?#]*)?"
)


class QueueConfig(Settings):
    """Where requests wait for a replica: a queue for each model, in each gateway process."""

    max_requests: int = Field(default=1024, ge=1)
    """The most that wait for one model; a request beyond it is answered with 429."""

    max_wait_s: float = Field(default=600.0, gt=0)
    """Seconds that a request waits for a replica that has room; then 503. While the model has no
    replica, ``cold_start_timeout_s`` counts instead."""


class SwapGroup(Settings):
    """How the models of a swap group take turns on their GPU."""

    awake: int = Field(default=1, ge=1)
    """The most models that are on the GPU at once; their memory must fit it together."""

    min_awake_s: float = Field(default=10.0, ge=0)
    """Seconds that a model stays awake at least while it has requests."""

    max_wait_s: float = Field(default=30.0, ge=0)
    """Seconds that a request waits for a model that sleeps before one with requests must sleep.
    One without goes to sleep as soon as another is asked for."""

    drain_s: float = Field(default=5.0, ge=0)
    """Seconds that running requests get to finish before their model sleeps. What still runs then
    is paused, and goes on when the model is awake again."""


class GatewayConfig(_Args):
    """The ``args`` of the gateway's application."""

    replicas: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_GATEWAYS)] = 1
    """Gateway processes; one relays 20,000 to 30,000 streamed tokens per second. ``auto``: one for
    every 100 requests at once, as they come and go, but no more than one for every 5 of the
    cluster's cores, and 8 in all. On Kubernetes a number."""

    num_cpus: float = Field(default=1.0, ge=0)
    """CPU cores reserved for each gateway process."""

    max_body_mib: float = Field(default=64.0, gt=0, le=1024)
    """Largest request body, in MiB; a larger one is answered with 413."""

    max_bodies_mib: float = Field(default=1024.0, gt=0)
    """Largest sum, in MiB, of the bodies of all requests that one gateway process has, which it
    keeps until their answers end; a request beyond it is answered with 503."""

    body_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds that a request's body may take to arrive; then 408."""

    connect_timeout_s: float = Field(default=5.0, gt=0)
    """Seconds to connect to a replica before another is tried."""

    cold_start_timeout_s: float = Field(default=600.0, ge=0)
    """Seconds that a request waits for a model that is starting; then 503."""

    routing: RoutingConfig = RoutingConfig()
    """Which replica gets a request; a model's own ``routing`` wins."""

    queue: QueueConfig = QueueConfig()
    """Where requests wait for a replica."""

    swap_groups: dict[str, SwapGroup] = {}
    """The terms of swap groups, by name; a group that is not here has the defaults."""

    stream_keepalive_s: float | None = Field(default=15.0, gt=0)
    """Seconds of silence at the beginning of a stream after which it gets its head and a comment,
    so that proxies and clients do not give up; what fails from then on is an error event. None: a
    stream begins with its first token."""

    request_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds that a replica may stay silent within one request; None waits for ever."""

    graceful_shutdown_timeout_s: float = Field(default=600.0, ge=0)
    """Seconds that running requests get to finish when a gateway is stopped."""

    keys: KeySource | None = None
    """The API keys that clients must send. Left out, everybody gets in who reaches the endpoint."""

    usage_db: UsageDb | None = None
    """The database that gets a row of each request, and that GET /v1/usage asks: its URL, or the
    name of an environment variable with the URL. None records nothing, but ``serve-app run`` on a
    Ray of its own has an SQLite file of this user's."""

    usage_spool: str | None = Field(default=None, min_length=1)
    """A folder on each gateway's own disk in which requests wait until the database has them. None:
    beside an SQLite file; of a PostgreSQL, in the machine's temporary folder."""

    usage_dir: str | None = Field(default=None, min_length=1)
    """A folder that gets a line of JSON for each request, without its text. A new file is begun
    after 64 MiB or a day; none is deleted."""

    access_log: bool | None = None
    """Whether each request becomes a line of JSON, without its text, in ``access_gateway_*.log``
    beside Serve's logs, 192 MiB at most of each gateway process. None: in the images yes, elsewhere
    no."""

    otlp_endpoint: str | None = Field(default=None, min_length=1)
    """Where a span of each request goes: the URL of an OpenTelemetry receiver that takes OTLP over
    HTTP, such as ``http://localhost:4318``. What it wants in headers (``Authorization``) is in the
    gateways' environment, as ``OTEL_EXPORTER_OTLP_HEADERS``. None makes no spans."""

    trace_sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """The part of the traces begun here that is sent. A trace that a client has begun is sent if
    the client's own part of it is."""

    trace_content: bool = False
    """Whether spans have the prompt's text: its last 16,384 characters."""

    page: bool = True
    """Whether a browser that opens the gateway's address gets a page: the fleet, a chat, charts.
    With false it gets the JSON that other clients get there."""

    cors_allow_origins: list[str] = []
    """Origins of the web pages that may call the API from a browser, such as
    ``https://chat.example.com``; ``*`` is any page. By default no page may."""

    @field_validator("replicas", mode="wrap")
    @classmethod
    def _replicas(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        numbers = f"a whole number from 1 to {MAX_GATEWAYS}"
        return _number_or_auto("replicas", numbers, value, check)

    @property
    def pods(self) -> int:
        """``replicas`` on Kubernetes, where each gateway has a pod of its own.

        Raises:
            ConfigError: it is ``auto``, and the number of these pods is fixed.
        """
        if self.replicas == "auto":
            raise ConfigError(
                "the gateway's replicas is auto, but on Kubernetes each gateway has a pod of its "
                "own, and the number of these pods is fixed; give a number, such as 2"
            )
        return self.replicas

    @model_validator(mode="after")
    def _one_body_has_room(self) -> GatewayConfig:
        if self.max_bodies_mib < self.max_body_mib:
            raise ValueError(
                f"max_bodies_mib is {self.max_bodies_mib:g}, below max_body_mib "
                f"({self.max_body_mib:g}); raise it, or lower max_body_mib"
            )
        return self

    @field_validator("keys", mode="before")
    @classmethod
    def _not_open_by_mistake(cls, keys: Any) -> Any:
        if keys is None:
            raise ValueError(
                "empty would let everybody in; name the keys' file, such as {file: keys.yaml}, or "
                "remove 'keys' if all may use the models"
            )
        return keys

    @field_validator("access_log", mode="before")
    @classmethod
    def _no_path(cls, value: Any) -> Any:
        if isinstance(value, str) and "/" in value:
            raise ValueError(
                f"'{value}' is a path, but it is true or false: its file is beside Serve's logs; "
                "usage_dir names a folder for such lines"
            )
        return value

    @field_validator("otlp_endpoint", mode="before")
    @classmethod
    def _no_port_alone(cls, endpoint: Any) -> Any:
        if isinstance(endpoint, int):
            raise ValueError(f"{endpoint} is no URL; write it whole: http://localhost:4318")
        return endpoint

    @field_validator("otlp_endpoint")
    @classmethod
    def _over_http(cls, endpoint: str | None) -> str | None:
        return endpoint and otlp_url(endpoint)

    @field_validator("cors_allow_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"'{origin}' is not an origin; write it as browsers send it, such as "
                    "'https://chat.example.com' (lower case, no path), or '*' for any page"
                )
        return origins


_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\sA-Z/]+")


_Model = TypeVar("_Model", bound=BaseModel)


def parse(settings: type[_Model], value: Any, where: str) -> _Model:
    """Validate ``value``, or say in one sentence what is wrong with it.

    Raises:
        ConfigError: prefixed with ``where``, naming the key and what is allowed.
    """
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: args must be a mapping, not {type(value).__name__}")
    try:
        return settings.model_validate(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(settings, error)}") from None


def _first_problem(settings: type[BaseModel], error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    loc = problem["loc"]
    if loc and loc[-1] == "[key]":  # pydantic's mark for the name of a value, not the value
        return f"{'.'.join(map(str, loc[:-2]))}: the name {loc[-2]} must be text; put it in quotes"
    key = ".".join(str(part) for part in loc)
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        unknown = {
            e["loc"][-1]: e["input"]
            for e in error.errors(include_url=False)
            if e["type"] == kind and e["loc"][:-1] == loc[:-1]
        }
        if settings is ModelConfig and (hint := _belongs(loc[-1], unknown, _parent(loc))):
            return f"'{key}' is not a setting; {hint}"
        if len(loc) == 1 and (whose := _of_the_other(settings, str(loc[-1]))):
            return f"'{key}' is not a setting here; it belongs to {whose}"
        known = _keys_at(settings, loc[:-1])
        return (
            f"'{key}' is not a setting{did_you_mean(str(loc[-1]), known)}"
            f" (known: {', '.join(known)})"
        )
    if kind == "missing":
        beside = [e for e in error.errors() if e["loc"][:-1] == loc[:-1]]
        others = [e["loc"][-1] for e in beside if e["type"] == "extra_forbidden"]
        given = f" (there is '{others[0]}'; did you mean '{loc[-1]}'?)" if others else ""
        return f"'{key}' is missing{given}"
    if kind == "string_too_short" or (value is None and kind != "value_error"):
        return f"{key} is empty; give it a value or remove it"
    shown = _shown(value)
    if kind == "string_type":
        return f"{key} is {shown}, but must be text; put it in quotes, or remove it"
    if kind == "list_type":
        return f"{key} is {shown}, but must be a list, such as [{shown}]"
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return f"{key} is {shown}, but must be a whole number"
    if kind in ("float_parsing", "float_type"):
        return f"{key} is {shown}, but must be a number, without a unit"
    if kind in ("bool_parsing", "bool_type"):
        return f"{key} is {shown}, but must be true or false"
    if kind == "value_error":
        text = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {text}" if key else text
    if kind == "dict_type":
        return f"{key} is {shown}, but must be a mapping of names to values"
    if kind == "model_type":
        keys = ", ".join(_keys_at(settings, loc))
        return f"{key} is {shown}, but must be a mapping with some of: {keys}"
    if kind == "string_pattern_mismatch":
        if loc[-1] == "swap_group":
            return (
                f"{key} is {shown}, but a group's name is of small letters and digits, and after "
                "the first also of '.', '_' and '-'"
            )
        return f"{key} is {shown}, but an id has no spaces"
    return f"{key} is {shown}, but {_lower_first(problem['msg'].removeprefix('Input '))}"


def _of_the_other(settings: type[BaseModel], key: str) -> str | None:
    """Which other application's args have a setting of this name."""
    if settings is ModelConfig and key in GatewayConfig.model_fields:
        return "the args of the gateway"
    if settings is GatewayConfig and key in ModelConfig.model_fields:
        return "the args of a model"
    return None


def _shown(value: Any) -> str:
    """A value as its reader wrote it in YAML, not as Python has it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return value.isoformat() if isinstance(value, date) else repr(value)


def _parent(loc: tuple[Any, ...]) -> str:
    return str(loc[-2]) if len(loc) > 1 else ""


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _keys_at(settings: type[BaseModel], loc: Iterable[Any]) -> list[str]:
    """The setting names of the (possibly nested) model that an error's location points to."""
    for part in loc:
        field = settings.model_fields.get(str(part))
        nested = (
            [t for t in _types_in(field.annotation) if issubclass(t, BaseModel)] if field else []
        )
        if nested:
            settings = nested[0]
    return list(settings.model_fields)


def _types_in(annotation: Any) -> list[type]:
    inner = getattr(annotation, "__args__", ())
    if inner:
        return [t for arg in inner for t in _types_in(arg)]
    return [annotation] if isinstance(annotation, type) else []


def ids_of(name: str, model: ModelConfig) -> list[str]:
    """All ids that clients can send for a model, the application's name first."""
    return [name, *model.served_as, *(adapter.name for adapter in model.adapters)]
