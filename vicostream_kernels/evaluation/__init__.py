"""Streaming question answering with known truth: clips, questions, scoring."""
