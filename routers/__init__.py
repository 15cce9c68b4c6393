"""Routers: from a text to the leaf of a tree, and so to the blocks of a hierarchical memory bank.

A frozen embedder turns a text into a vector; a tree of centroids, made by balanced k-means, turns
the vector into a leaf id. Of the project this package imports only how files are written
(`mneme.storage.files`), and no torch.
"""

if __name__ != "mneme.routers":  # under two names, it would be two packages
    raise ImportError("import mneme.routers, not routers")


from mneme.routers.embedders import Embedder, HashedTfidf
from mneme.routers.errors import RouterError
from mneme.routers.kmeans import Clustering
from mneme.routers.report import Occupancy, Report, markdown, report
from mneme.routers.router import EMBEDDERS, Router
from mneme.routers.sentences import SentenceTransformer
from mneme.routers.tree import Tree, nodes

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
