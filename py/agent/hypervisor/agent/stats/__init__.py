"""What instances use, read from the kernel: :mod:`.cgroups` (where), :mod:`.sampler` (what), :mod:`.rates` (how fast).

Nothing here knows a driver: a driver gives the process id of an instance and gets samples.
"""
