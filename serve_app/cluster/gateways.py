"""All gateways of the cluster: what one of them is asked, each can tell of all."""

from __future__ import annotations

import logging
from typing import Any

from ray import serve

from serve_app.cluster.serve import handle

logger = logging.getLogger("ray.serve")


class Gateways:
    """The gateways of this one's application, this one among them."""

    def __init__(self) -> None:
        context = serve.get_replica_context()
        self.own: str = context.replica_id.unique_id
        """Serve's id of this one."""

        self._deployment, self._application = context.deployment, context.app_name

    async def ask(self, method: str, timeout_s: float) -> tuple[list[Any], bool]:
        """Call a method of each running gateway; what they return, and whether all have.

        Serve waits for all or none: where one is silent for ``timeout_s``, nothing is returned.
        """
        try:
            asked = handle(self._deployment, self._application).broadcast(method)
            said = await asked.results_async(timeout_s=timeout_s, return_exceptions=True)
        except Exception as error:
            logger.warning(f"the other gateways were not asked: {error!r}")
            return [], False
        answers = [it for it in said if not isinstance(it, BaseException)]
        return answers, len(answers) == len(said)
