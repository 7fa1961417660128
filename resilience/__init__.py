"""What keeps a run alive, and ends it well."""
