"""The gateway measured beside its peers: `make bench`. See README.md here."""
