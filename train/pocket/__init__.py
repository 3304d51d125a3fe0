"""The pocket benchmark: its data, its training groups and its small model."""
