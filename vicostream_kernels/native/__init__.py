"""Hands tensors to the compiled module ``_C`` as addresses, sizes and strides; one file a word."""
