"""From a config to a RayService on EKS: render, validate, deploy, watch.

``render/``    makes manifests from a config and a cluster profile; pure, the same bytes each time
``validate/``  checks manifests without a cluster
``live/``      talks to an API server: apply, watch, explain, roll back, prune, delete, read logs

``live/api_server`` alone imports the Kubernetes client, and only when it connects; nothing here
imports Ray, vLLM or torch.
"""
