"""schemathesis against the gateway's OpenAPI document, in front of scripted replicas: `make fuzz`.

    python tests/fuzz/openapi.py SCHEMATHESIS [its options]

SCHEMATHESIS is its command, in an environment of its own.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile

from harness.scripted import GatewayProcess, Upstream

# What the document cannot say: which ids there are, and what a model's own server refuses.
CHECKS = ",".join(
    ("not_a_server_error", "status_code_conformance", "content_type_conformance",
     "response_headers_conformance", "response_schema_conformance")
)  # fmt: skip


async def main(command: str, *options: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        usage = {"usage_db": f"sqlite:///{folder}/usage.db", "usage_spool": f"{folder}/spool"}
        async with Upstream() as upstream, GatewayProcess(upstream, front=True, **usage) as gateway:
            run = await asyncio.create_subprocess_exec(
                *(command, "run", f"{gateway.base_url}/openapi.json"),
                *("--checks", CHECKS, *options),
                cwd=folder,  # it leaves files
            )
            return await run.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(os.path.abspath(sys.argv[1]), *sys.argv[2:])))
