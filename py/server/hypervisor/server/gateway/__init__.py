"""The HTTP side of the server: liveness, readiness and metrics."""
