"""The core: a model, its sites, one run, one edit, one sweep, one result."""
