"""Benchmarks: one module per question, with the floor, the cheapest thing that could work, measured beside it.

``make bench`` runs them on the commit that is checked out, ``make bench-table`` compares with the alternatives side by
side. The targets and what they take are described in ``bench.mk``.
"""
