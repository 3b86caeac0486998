"""The node's ``/metrics`` for Prometheus: :mod:`.instances` and :mod:`.node` (what is told), :mod:`.text` (the format),
:mod:`.http` (where). The names are an interface: docs/guide/metrics.md has them all, and a test compares."""
