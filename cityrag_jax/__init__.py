"""CityRAG in JAX: one street photo and a path in, a grounded video out."""
