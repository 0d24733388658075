"""Which replica a request should go to: policies compared in simulation and in real time."""
