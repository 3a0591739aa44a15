"""From a trained student to a small file and a fast model."""
