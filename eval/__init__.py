"""Measure: accuracy against visual-token budget, on questions that need no download."""
