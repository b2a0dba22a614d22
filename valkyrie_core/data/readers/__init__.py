"""One reader per type of corpus; each stands beside its configuration."""
