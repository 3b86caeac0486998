"""What instances use: where to read it (:mod:`.sources`, :mod:`.cgroups`), reading it (:mod:`.service`), who gets it.

One service samples all running instances; everything that wants figures (calls, watchers, heartbeats, metrics) is
served from what it has. The reading itself, the rates and the history are ``hypervisor.ext.stats_sampler``. Nothing
here knows a driver: a driver says where its instances' figures are.
"""
