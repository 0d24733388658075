"""KubeRay's operator 1.7 as a model: what it does to RayServices, and to RayClusters below them.

It follows ``ray-operator/controllers/ray``; each docstring names the function that it stands for.
Beside the API server it has machines (machines.py) for its pods and a Serve for each head. What it
has not: Gateway and HTTPRoute (their weights are in the status only), Redis, the timeout of an
initialization, and Ray's autoscaler, whose patches of ``replicas`` a test makes by hand.

A test takes single steps (:meth:`Operator.reconcile`, :meth:`Operator.step`), lets all settle
(:meth:`Operator.settle`), or lets it go on beside the command under test (:func:`running`).
"""

from operator_model.operator import Operator, running

__all__ = ["Operator", "running"]
