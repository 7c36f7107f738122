"""Descriptions and traces by models, on Ray Data."""
