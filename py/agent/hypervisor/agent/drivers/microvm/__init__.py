"""MicroVMs: one driver over several VMMs.

``vmm``: what a VMM has to be able to do, and the vocabulary of this package.
"""
