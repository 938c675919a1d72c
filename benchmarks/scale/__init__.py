"""What grows with the catalog and the log, and what does not."""
