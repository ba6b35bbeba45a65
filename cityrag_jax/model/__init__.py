"""Networks: the Wan 2.1 transformer and autoencoder, and CityRAG's branches."""
