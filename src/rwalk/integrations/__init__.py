"""Translators for training loops that belong to somebody else: one module for each host, which imports it; no maths here."""
