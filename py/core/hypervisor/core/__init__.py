"""What every part of Hypervisor shares: domain values, errors, names, states, clock, ids, retry, logging, TLS.

Core imports nothing of ours (neither the wire types nor a runtime), so server, agent and command line may all
build on it. The one exception at its edge is :mod:`hypervisor.core.grpc_errors`, which knows ``google.rpc``.
"""
