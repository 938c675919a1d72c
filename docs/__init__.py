"""The pages of the documentation, and what puts the site together."""
