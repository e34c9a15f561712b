"""Data only: each file has `get_config(arg)`, and a docstring with command, hardware and result."""
