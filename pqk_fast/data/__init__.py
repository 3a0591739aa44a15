"""Data sets that fit in memory and the features made from them."""
