"""What the tests stand on: real servers, and scripted ones for what vLLM cannot do on demand."""

import os

# `serve run` gives a cluster of its own a token (~/.ray/auth_token) and turns its use on only
# for itself. A driver that joins it has to say so before Ray is first imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
# Tests start what they need, and reach it directly, whatever this shell is set up for.
os.environ.pop("RAY_ADDRESS", None)
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1,localhost,::1"]))
# All that tests start stays on the loopback interface.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# As `serve-app run` does: Ray would run replicas at nice 15, behind whatever else there is.
os.environ.setdefault("RAY_worker_niceness", "0")
