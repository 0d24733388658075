"""Commands against a Kubernetes API server: apply, watch, explain, roll back, read logs."""
