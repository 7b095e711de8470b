"""Images inside archives and shards, and the worker processes that load them. Knows no model."""
