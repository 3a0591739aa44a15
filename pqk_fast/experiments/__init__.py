"""Whole runs; their stages as tasks that recipes share; the tables, pictures and pages made of their records."""
