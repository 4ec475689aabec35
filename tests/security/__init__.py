"""Who may do what, measured: ``python -m tests.security.matrix`` prints the table."""
