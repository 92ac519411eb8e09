"""A gallery in a faiss index, the ranking of it for every query, and a page to look at."""
