"""Routers: from a text to the leaf of a tree, and so to the blocks of a hierarchical memory bank.

A frozen embedder turns a text into a vector; a tree of centroids, made by balanced k-means, turns
the vector into a leaf id. This package imports nothing else of the project, and no torch.
"""

from routers.embedders import Embedder, HashedTfidf
from routers.errors import RouterError
from routers.kmeans import Clustering
from routers.report import Occupancy, Report, markdown, report
from routers.router import EMBEDDERS, Router
from routers.sentences import SentenceTransformer
from routers.tree import Tree, nodes

__all__ = [
    "EMBEDDERS",
    "Clustering",
    "Embedder",
    "HashedTfidf",
    "Occupancy",
    "Report",
    "Router",
    "RouterError",
    "SentenceTransformer",
    "Tree",
    "markdown",
    "nodes",
    "report",
]
