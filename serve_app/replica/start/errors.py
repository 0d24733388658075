"""Why an engine did not start, in one sentence that says what to change."""

from __future__ import annotations

import re

from serve_app.config.settings import ModelConfig

_TOKEN = "set HF_TOKEN where Ray runs (on EKS: the secret that the RayService refers to)"


def explain(error: str, config: ModelConfig) -> str:
    """The sentence for ``error``, which is ``"<exception type>: <its text>"``.

    An error that is not recognized keeps its own words, on one line.
    """
    model = config.model
    error = _cause(error)
    for pattern, sentence in _KNOWN:
        if re.search(pattern, error, re.IGNORECASE | re.DOTALL):
            return sentence.format(model=model, **_numbers(config))
    return f"the engine of '{model}' did not start: {_one_line(error)}"


def too_slow(phase: str, config: ModelConfig) -> str:
    """The sentence for a start that exceeded its time limit in ``phase``."""
    return (
        f"'{config.model}' did not start within start_timeout_s ({config.start_timeout_s:g} s); it "
        f"was {phase}; the replica's log says how far it came; if it only needs longer, raise "
        "start_timeout_s, and set cache_dir so that the next start need not do all of it again"
    )


def _numbers(config: ModelConfig) -> dict[str, object]:
    part, tp = config.resources.part_of_gpu, config.tensor_parallel_size
    util = config.engine.get("gpu_memory_utilization", 0.92)
    raise_both = f"raise gpu_memory_utilization (now {util}) or tensor_parallel_size (now {tp})"
    larger = f"give it a larger part of the GPU (resources.{part})"
    return {
        "tp": tp,
        "util": util,
        "more_gpu": larger if part else f"raise tensor_parallel_size (now {tp})",
        "more_memory": larger if part else raise_both,
        "len": config.engine.get("max_model_len", "the model's own"),
        "seqs": config.engine.get("max_num_seqs", "vLLM's default"),
    }


# The most specific come first: an out-of-memory error may contain the words of others.
_KNOWN: tuple[tuple[str, str], ...] = (
    (
        r"node running low on memory",  # Ray's, and an OutOfMemoryError by its type
        "the node ran out of host memory while '{model}' loaded; set resources.memory_gib to what "
        "it needs, so that it gets a node with as much, or give the nodes more",
    ),
    (
        r"/dev/shm",  # NCCL's, and "no space left on device" by its words
        "/dev/shm of the node is too small for the workers of '{model}' (tensor_parallel_size "
        "{tp}); make it larger (in a pod: an emptyDir with medium: Memory mounted there)",
    ),
    (
        r"ActorDiedError|actor died unexpectedly",
        "a worker of '{model}' died while it loaded; mostly the node ran out of host memory (dmesg "
        "says so: set resources.memory_gib), else its log on that node has the reason",
    ),
    (
        r"OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "'{model}' does not fit: the GPU ran out of memory while it loaded; "
        "{more_gpu}, use a quantized checkpoint, or lower max_num_seqs (now {seqs}) and "
        "max_model_len (now {len})",
    ),
    (
        r"Free memory on device .* is less than desired GPU memory utilization",
        "another process holds memory of the GPU that '{model}' was given; end it (nvidia-smi "
        "names it), or lower gpu_memory_utilization (now {util})",
    ),
    (
        r"No available memory for the cache blocks",
        "'{model}' leaves no GPU memory for the KV cache; {more_memory}, or lower "
        "max_num_seqs (now {seqs})",
    ),
    (
        r"GatedRepo|gated repo|access to model .* is restricted|403 Client Error",
        "'{model}' is gated and this token may not read it; accept its licence on the hub and "
        + _TOKEN,
    ),
    (
        r"401 Client Error|Invalid (user|username|token)|RepositoryNotFound"
        r"|is not a valid model identifier|Repo id must ",
        "'{model}' is neither a folder on this node nor a model that the hub shows; check the "
        "spelling, and if it is private or gated " + _TOKEN,
    ),
    (
        r"LocalEntryNotFound|couldn't connect to|Cannot reach|ConnectionError|offline mode",
        "'{model}' is not in the local cache and the hub cannot be reached; check the network, "
        "or set model to a folder that holds the weights",
    ),
    (
        r"No space left on device",
        "no space is left on the disk that '{model}' is downloaded to; give the model cache "
        "(cache_dir, else HF_HOME) a larger volume",
    ),
    (
        r"cache is needed, which is larger than the available KV cache",
        "the KV cache of '{model}' cannot hold one request of max_model_len (now {len}); lower it, "
        "or {more_memory}; serve-app plan says what fits",
    ),
    (
        r"PermissionError",
        "'{model}' may not read or write a folder that it needs, mostly cache_dir; give the user "
        "that Ray runs as access to it",
    ),
    (
        r"trust_remote_code",
        "'{model}' brings code of its own; if you trust it, set engine.trust_remote_code: true",
    ),
)


def _cause(error: str) -> str:
    """The exception alone, where Ray's error holds the traceback of a worker."""
    if not error.startswith("RayTaskError"):
        return error
    lines = re.sub(r"\x1b\[\d+m", "", error).splitlines()
    raised = (i for i in reversed(range(len(lines))) if re.match(r"[A-Za-z_][\w.]*: ", lines[i]))
    return "\n".join(lines[next(raised, 0) :])


def _one_line(error: str) -> str:
    text = " ".join(error.split())
    # pydantic names the class and counts the errors before it says what is wrong.
    found = re.search(r"Value error, (.*?) \[type=", text)
    if found:
        text = found.group(1)
    return text if len(text) <= 600 else text[:600] + " …"
