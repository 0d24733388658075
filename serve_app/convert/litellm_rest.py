"""LiteLLM's keys that are not taken over, and why."""

from __future__ import annotations

_NONE = "no counterpart"
_LIMITS = "no counterpart yet: limits for each key come with a later version"
_USAGE = "no counterpart yet: usage accounting comes with a later version"
CALLBACKS = "no counterpart yet: traces and callbacks come with a later version"
_FALLBACKS = (
    "has its own way: list them in the model's fallback, for requests for which it has no replica"
)
_OTHER_FALLBACKS = "no counterpart: a model's error is its answer, and no other model answers"
_BALANCE = "has its own way: the replica with the fewest requests in flight gets the request"
_RETRY = "has its own way: before the first byte, another replica gets the request"
_HEALTH = "has its own way: Serve checks every replica and replaces one that fails"
_CACHE = "no counterpart: answers are not cached (vLLM caches prefixes by itself)"
_REDIS = "not needed: gateways share nothing"
_DROP = "not needed: vLLM ignores parameters that it does not know"
_ONE_TIMEOUT = "no counterpart for one model; the gateway's request_timeout_s is for all"
_DATABASE = "no counterpart: the config file is all there is"
_INFORMATION = "no counterpart: information for LiteLLM's own pages and costs"
_TOOLS = "nothing by itself: set engine.enable_auto_tool_choice and engine.tool_call_parser"
CLIENTS = "no counterpart: clients send it with each request"
_PER_REQUEST = (
    "no counterpart: clients send it; engine.override_generation_config: {max_new_tokens: N} "
    "would be an upper limit"
)

_WHY_PARAM = {
    **dict.fromkeys(("rpm", "tpm", "max_parallel_requests", "max_budget", "budget_duration"),
                    _LIMITS),
    **dict.fromkeys(("weight", "order"), _BALANCE),
    **dict.fromkeys(("timeout", "stream_timeout"), _ONE_TIMEOUT),
    **dict.fromkeys(("max_retries", "num_retries"), _RETRY),
    **dict.fromkeys(("drop_params", "additional_drop_params", "allowed_openai_params"), _DROP),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), _PER_REQUEST),
    **dict.fromkeys(("seed", "stop", "n", "frequency_penalty", "presence_penalty", "user",
                     "response_format", "tools", "tool_choice", "extra_headers"), CLIENTS),
}  # fmt: skip

_WHY_SECTION = {
    "environment_variables": "no counterpart: LiteLLM's own; a model's variables are in args.env",
    "credential_list": "not needed: models run here",
    "callback_settings": CALLBACKS,
    "include": "not read: convert each of these files too",
}

_WHY_SETTING = {
    "master_key": "make keys with `serve-app keys new NAME --file keys.yaml`, and name the file in "
    "the gateway's args, keys: {file: keys.yaml}",
    **dict.fromkeys(("max_parallel_requests", "global_max_parallel_requests", "max_budget",
                     "budget_duration", "max_user_budget", "max_end_user_budget",
                     "default_internal_user_params", "default_team_settings", "custom_auth",
                     "enable_jwt_auth", "key_generation_settings",
                     "upperbound_key_generate_params", "default_key_generate_params",
                     "provider_budget_config"), _LIMITS),
    **dict.fromkeys(("fallbacks", "default_fallbacks"), _FALLBACKS),
    **dict.fromkeys(("context_window_fallbacks", "content_policy_fallbacks"), _OTHER_FALLBACKS),
    **dict.fromkeys(("num_retries", "retry_after", "retry_policy", "max_fallbacks",
                     "model_group_retry_policy"), _RETRY),
    **dict.fromkeys(("allowed_fails", "cooldown_time", "disable_cooldowns",
                     "allowed_fails_policy", "background_health_checks",
                     "health_check_interval"), _HEALTH),
    **dict.fromkeys(("routing_strategy", "routing_strategy_args"), _BALANCE),
    **dict.fromkeys(("cache", "cache_params", "enable_caching_on_provider_specific_optional_params",
                     "cache_responses"), _CACHE),
    **dict.fromkeys(("redis_host", "redis_port", "redis_password", "redis_url", "use_redis"),
                    _REDIS),
    "drop_params": _DROP,
    "modify_params": "no counterpart: requests reach vLLM as clients wrote them",
    **dict.fromkeys(("database_url", "store_model_in_db", "database_connection_pool_limit",
                     "store_prompts_in_spend_logs"), _DATABASE),
    **dict.fromkeys(("disable_spend_logs", "disable_spend_updates"), _USAGE),
    **dict.fromkeys(("set_verbose", "json_logs"), "has its own way: Ray's logs"),
    **dict.fromkeys(("alerting", "alerting_threshold", "alerting_args"),
                    "no counterpart here: `serve-app render` writes Prometheus' alerts"),
    "stream_timeout": "no counterpart: request_timeout_s is the longest silence in any answer",
    "enable_pre_call_checks": "not needed: vLLM refuses a prompt that is too long",
    "completion_model": "no counterpart: a request names its model",
}  # fmt: skip


def of_param(key: str) -> str:
    """Of an entry's ``litellm_params``, or beside them."""
    return _USAGE if "cost" in key else _WHY_PARAM.get(key, _NONE)


def of_information(key: str) -> str:
    """Of an entry's ``model_info``."""
    if key == "supports_function_calling":
        return _TOOLS
    return _USAGE if "cost" in key else _INFORMATION


def of_section(key: str) -> str:
    """Of a key at the top of the file."""
    return _WHY_SECTION.get(key, _NONE)


def of_setting(key: str) -> str:
    """Of ``litellm_settings``, ``router_settings`` or ``general_settings``."""
    return _WHY_SETTING.get(key, _NONE)
