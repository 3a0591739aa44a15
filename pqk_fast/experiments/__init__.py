"""Whole runs: a recipe's stages in order, their results and the record."""
