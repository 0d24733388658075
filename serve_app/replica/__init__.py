"""One model server, from its start to its last drain. vLLM is imported in this package only."""
