"""The procedural city: a street world that any camera can be put into."""
