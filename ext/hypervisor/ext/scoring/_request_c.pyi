"""Native twin of _request_py: the same names, the same behaviour, over a C struct."""

from hypervisor.ext.scoring._request_py import Request as Request
