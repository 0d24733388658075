"""From a config to a RayService on EKS: render, validate, deploy, watch.

One idea a module, and arrows that point one way::

    cli ─► deploy ─► client            (the cluster: the API server, and nothing else)
     └───► render ─► manifests/…       (the files: pure functions of config and profile)
             └─► workers ─► planner.hardware  (which pods on which machines)
    cli ─► validate                    (the files, judged without a cluster)

Nothing here imports Ray, vLLM or torch, and nothing but :mod:`client` imports the Kubernetes
client, so that rendering works on a laptop with neither.
"""
