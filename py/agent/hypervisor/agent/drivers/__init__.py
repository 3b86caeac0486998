"""Drivers: one per runtime, behind one contract.

Read :mod:`hypervisor.agent.drivers.driver` first. :mod:`hypervisor.agent.drivers.manager` owns the instances of a node
and calls the drivers; the table of drivers is in :mod:`hypervisor.agent.drivers.registry`.
"""
