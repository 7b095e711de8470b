"""Commands; a package so that they can share modules and be imported by tests."""
