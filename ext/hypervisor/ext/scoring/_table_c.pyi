"""Native twin of _table_py: the same names, the same behaviour, over C columns; long calls run without the GIL."""

from hypervisor.ext.scoring._table_py import NodeTable as NodeTable
