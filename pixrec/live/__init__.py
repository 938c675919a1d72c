"""What changes between two versions of an index: events, items and feedback."""
