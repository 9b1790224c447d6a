"""Benchmarks that stand beside the ops: correctness first, then paired timing against a baseline.

``vicostream bench append`` runs the cases of one word. To add cases, write ``cases/<word>.py``;
what a case must say is in ``registry.Case``.
Importing this package imports neither Triton, nor rich, nor matplotlib, nor typer.
"""
