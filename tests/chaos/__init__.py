"""A whole gateway under seeded faults, and the audit of what became of every request: see README.md."""
