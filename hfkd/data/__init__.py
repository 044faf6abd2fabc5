"""Data for students and teachers: tables of tasks, loaders with canonical columns, splits. Imports nothing else of hfkd."""
